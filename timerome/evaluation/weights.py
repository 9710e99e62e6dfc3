"""Evidence that nothing was trained: a hash of every weight and buffer, and a count of backward passes."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..backbones import Backbone


class WeightsWatch:
    """Context manager that hashes a model's state before and after, and counts backward passes in between.

    Counted are the calls of autograd's two entry points, ``torch.autograd.backward`` and ``torch.autograd.grad``, in
    the whole process: ``Tensor.backward``, ``torch.func.grad`` and optimizers' closures go through them. Code that
    calls the C++ engine directly is not seen.

    Attributes:
        digest_before: SHA-256 of every parameter and buffer on entry.
        digest_after: the same on exit; empty before that.
        backward_passes: calls counted so far.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation import WeightsWatch
        >>> backbone = tr.load("testbed")
        >>> with WeightsWatch(backbone) as watch:
        ...     _ = backbone.logits(torch.tensor([[2, 3]]))
        >>> watch.weights_unchanged, watch.backward_passes
        (True, 0)
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.digest_before = self.digest_after = ""
        self.backward_passes = 0
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> WeightsWatch:
        self.digest_before, self.digest_after = self.backbone.state_digest(), ""
        for name in ("backward", "grad"):
            original = getattr(torch.autograd, name)
            self._originals[name] = original
            setattr(torch.autograd, name, self._counting(original))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, original in self._originals.items():
            setattr(torch.autograd, name, original)
        self._originals.clear()
        self.digest_after = self.backbone.state_digest()

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.backward_passes += 1
            return original(*args, **kwargs)

        return counted

    @property
    def weights_unchanged(self) -> bool:
        """Whether both hashes agree.

        Raises:
            RuntimeError: the block has not been left yet.
        """
        if not self.digest_after:
            raise RuntimeError("WeightsWatch.weights_unchanged: known once the with-block has been left.")
        return self.digest_before == self.digest_after

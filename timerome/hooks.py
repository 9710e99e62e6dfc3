"""The one place that registers forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .backbones import Backbone
from .coordinates import Site

OutputHook = Callable[[Tensor], Tensor | None]
EmbeddingHook = Callable[[Tensor, Tensor], Tensor | None]


class HookNeverFiredError(RuntimeError):
    """A hooked module did not run: silence would look like a null result."""


class Hooks:
    """Hooks on sites and on the embedding of a backbone, attached and removed together.

    Every module is resolved before the first hook is registered, so a wrong site leaves nothing behind. Usable as a
    context manager; :meth:`remove` may be called twice.

    Args:
        backbone: the model to hook.
        outputs: site -> function of that site's output ``(B, L, d)``; what it returns replaces the output, None keeps
            it. Modules that return tuples are handled: the first item is read and replaced.
        embedding: function of the ids ``(B, L)`` and the embeddings ``(B, L, d)``, called once at the start of each
            forward; what it returns replaces the embeddings, None keeps them.

    Raises:
        ValueError: a site does not exist.
    """

    def __init__(
        self,
        backbone: Backbone,
        outputs: Mapping[Site, OutputHook] | None = None,
        embedding: EmbeddingHook | None = None,
    ) -> None:
        self._backbone = backbone
        self._outputs = [(backbone.module(site), hook) for site, hook in (outputs or {}).items()]
        self._embedding = embedding
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def attach(self) -> Hooks:
        """Register the hooks.

        Raises:
            RuntimeError: they are registered already.
        """
        if self._handles:
            raise RuntimeError("Hooks.attach: these hooks are attached already; remove() them first.")
        try:
            if self._embedding is not None:
                self._handles.append(
                    self._backbone.embedding.register_forward_hook(_on_embedding(self._embedding), with_kwargs=True)
                )
            for module, hook in self._outputs:
                self._handles.append(module.register_forward_hook(_on_output(hook)))
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        """Unregister the hooks; nothing happens if they are not registered."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Hooks:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _on_output(hook: OutputHook) -> Callable[[nn.Module, Any, Any], Any]:
    def run(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return hook(output)
        changed = hook(output[0])
        if changed is None:
            return None
        rest = (changed, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    return run


def _on_embedding(hook: EmbeddingHook) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def run(module: nn.Module, inputs: Any, named: Any, output: Any) -> Any:
        return hook(inputs[0] if inputs else next(iter(named.values())), output)

    return run


@contextmanager
def capture(backbone: Backbone, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the outputs of ``sites`` during the forwards inside; each forward overwrites the one before.

    Yields:
        A dict that holds, after a forward, each site's output of shape ``(B, L, d)``, detached.

    Raises:
        ValueError: a site does not exist.
        HookNeverFiredError: no forward reached one of the sites.

    Example:
        >>> import torch
        >>> import timerome as tr
        >>> from timerome.hooks import capture
        >>> backbone = tr.load("testbed")
        >>> with capture(backbone, [tr.Site(3)]) as found:
        ...     _ = backbone.logits(torch.tensor([[2, 3, 4]]))
        >>> found[tr.Site(3)].shape
        torch.Size([1, 3, 192])
    """
    found: dict[Site, Tensor] = {}

    def keep(site: Site) -> OutputHook:
        def read(output: Tensor) -> None:
            found[site] = output.detach()

        return read

    with Hooks(backbone, {site: keep(site) for site in sites}):
        yield found
    silent = [str(site) for site in sites if site not in found]
    if silent:
        raise HookNeverFiredError(f"capture: no forward reached {', '.join(silent)}; run the model inside the block.")

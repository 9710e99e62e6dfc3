"""Clean activations within a byte budget: in memory as far as it reaches, the rest in a temporary file."""

from __future__ import annotations

import tempfile
from typing import IO

import torch
from torch import Tensor

from ..coordinates import Site


class ActivationStore:
    """Keeps the outputs of sites at denoising steps; what does not fit in the budget lies on disk.

    The file has no name and is gone when the store is dropped, also after a crash. Reading from it gives a copy that
    the store does not keep, so memory stays within the budget but for the one output being read.

    Args:
        budget_bytes: most bytes kept in memory; None is no limit.

    Attributes:
        resident_bytes: kept in memory.
        spilled_bytes: in the file.

    Raises:
        ValueError: the budget is negative.

    Example:
        >>> store = ActivationStore(budget_bytes=8)
        >>> store.put(0, Site(1), torch.tensor([[1.0, 2.0]]))
        >>> store.put(1, Site(1), torch.tensor([[3.0, 4.0]]))
        >>> store.resident_bytes, store.spilled_bytes, store.get(1, Site(1))
        (8, 8, tensor([[3., 4.]]))
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise ValueError(f"ActivationStore: expected budget_bytes >= 0 or None, got {budget_bytes}.")
        self.budget_bytes = budget_bytes
        self.resident_bytes = self.spilled_bytes = 0
        self._resident: dict[tuple[int, Site], Tensor] = {}
        self._spilled: dict[tuple[int, Site], tuple[int, Tensor]] = {}  # where in the file, and an empty twin
        self._file: IO[bytes] | None = None

    def put(self, step: int, site: Site, output: Tensor) -> None:
        """Keep an output ``(L, d)``."""
        size = output.numel() * output.element_size()
        if self.budget_bytes is None or self.resident_bytes + size <= self.budget_bytes:
            # A row of a larger output would keep all of it.
            self._resident[step, site] = output.clone()
            self.resident_bytes += size
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="timerome-activations-", buffering=0)  # noqa: SIM115
        self._file.seek(self.spilled_bytes)
        self._file.write(output.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._spilled[step, site] = (self.spilled_bytes, torch.empty_like(output, device="meta"))
        self._device = output.device
        self.spilled_bytes += size

    def get(self, step: int, site: Site) -> Tensor:
        """Return what was put there, on the device it came from.

        Raises:
            KeyError: nothing was.
        """
        if (step, site) in self._resident:
            return self._resident[step, site]
        start, twin = self._spilled[step, site]
        assert self._file is not None
        self._file.seek(start)
        raw = bytearray(self._file.read(twin.numel() * twin.element_size()))
        return torch.frombuffer(raw, dtype=twin.dtype).reshape(twin.shape).to(self._device)

"""A memory acting on a backbone: hooks that add it to the rows whose sequences it is addressed to."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .. import ops
from ..backbones import Backbone
from ..functional.solve import RidgeMemory
from ..hooks import Hooks
from .address import addresses
from .rows import Rows, RowTracker

if TYPE_CHECKING:
    from .memory import EditMemory


class MemoryMismatchError(ValueError):
    """A memory and a backbone do not belong together."""


def check_belongs(memory: EditMemory, backbone: Backbone) -> None:
    """Refuse a backbone other than the one the memory was built on.

    Raises:
        MemoryMismatchError: fingerprints or tokenizer digests differ; the message holds both.
    """
    for what, wanted, came in (
        ("model", memory.fingerprint, backbone.fingerprint()),
        ("tokenizer", memory.tokenizer, backbone.tokenizer_digest()),
    ):
        if wanted != came:
            raise MemoryMismatchError(
                f"EditMemory: this memory was built on a {what} with fingerprint {wanted}, but {backbone.name} has "
                f"{came}; load the {what} it was built on, or rebuild the memory from its facts."
            )


# Models that run to address rows. No memory acts on those forwards: addresses are those of the model as it is, also
# where several memories are attached, be it through several backbones around one model.
_UNEDITED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def _unedited(model: nn.Module) -> Iterator[None]:
    """Leave the forwards inside alone."""
    _UNEDITED.add(model)
    try:
        yield
    finally:
        _UNEDITED.discard(model)


class Attachment:
    """Context manager inside which a memory edits every forward of a backbone.

    With a row gate, each sequence is addressed once, at its fully masked state, by one forward without any memory; the
    answer stays for all its denoising steps. Which positions form the canvas is announced by this library's own
    samplers; in other loops it is what was masked when the sequence was first seen.

    Attributes:
        hits: rows edited, by fact id (``"*"`` for a shared memory without row gate).
        hits_by_step: rows edited, by denoising step, counted from 0 for each new batch.

    Raises:
        MemoryMismatchError: the memory was built on another model or tokenizer.
    """

    def __init__(self, memory: EditMemory, backbone: Backbone) -> None:
        check_belongs(memory, backbone)
        self.memory, self.backbone = memory, backbone
        self.hits: Counter[str] = Counter()
        self.hits_by_step: Counter[int] = Counter()
        site = memory.settings.coordinate.site
        self._hooks = Hooks(backbone, {site: self._edit}, begin=self._begin)
        self._systems = [RidgeMemory(*(t.to(backbone.device) for t in system)) for system in memory.systems]
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._active: Tensor | None = None
        self._tokens: Tensor | None = None
        self._tracker = RowTracker(backbone)
        self._step = -1

    def attach(self) -> Attachment:
        """Register the hooks; :meth:`remove` undoes it."""
        self._hooks.attach()
        return self

    def remove(self) -> None:
        """Remove the hooks; may be called twice."""
        self._hooks.remove()

    def __enter__(self) -> Attachment:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _begin(self, ids: Tensor, called: Mapping[str, Any]) -> None:
        """At the start of a forward: find out which rows get which edit."""
        if self.backbone.model in _UNEDITED:
            return
        rows = self._tracker.begin(ids, called)
        self._step = rows.step
        if self.memory.book is None:
            self._active = self._tokens = None
            return
        self._active = self._address(rows)
        self._tokens = rows.positions(self.memory.settings.coordinate.role)

    def _address(self, rows: Rows) -> Tensor:
        """Return the fact index of each row, -1 for none, ``(B,)``."""
        book = self.memory.book
        assert book is not None
        keys = [asked.key for asked in rows.asked]
        new = {key: asked for key, asked in zip(keys, rows.asked, strict=True) if key not in self._known}
        if new:
            with _unedited(self.backbone.model), self.backbone.on_canvas(None):
                found = addresses(
                    self.backbone,
                    [a.state for a in new.values()],
                    [a.canvas for a in new.values()],
                    book.site,
                    book.span,
                )
            self._known.update(zip(new, book.lookup(found).tolist(), strict=True))
        active = torch.tensor([self._known[key] for key in keys])
        while len(self._known) > 4096:
            self._known.popitem(last=False)
        return active

    def _edit(self, h: Tensor) -> Tensor | None:
        """Add the memory to a site's output ``(B, L, d)``."""
        if self.backbone.model in _UNEDITED:
            return None
        if not torch.isfinite(h).all():
            raise FloatingPointError(
                f"EditMemory: activations at {self.memory.settings.coordinate.site} are not finite; check the model's "
                "weights, dtype and inputs."
            )
        if self._active is None:
            self._count("*", len(h))
            return self._apply(h, self._systems[0], None)
        out = h
        for fact in sorted(set(self._active.tolist()) - {-1}):
            rows = (self._active == fact).nonzero().flatten().to(h.device)
            system = self._systems[0 if self.memory.settings.shared else fact]
            tokens = None if self._tokens is None else self._tokens[rows].to(h.device)
            if out is h:
                out = h.clone()
            out[rows] = self._apply(h[rows], system, tokens)
            self._count(self.memory.edits[fact].fact.id, len(rows))
        return None if out is h else out

    def _apply(self, h: Tensor, system: RidgeMemory, tokens: Tensor | None) -> Tensor:
        settings = self.memory.settings
        return ops.sparse_lowrank_residual(
            h,
            system.keys,
            system.coef,
            system.values,
            mean=system.mean,
            alpha=settings.alpha,
            sparsity=settings.sparsity,
            row_mask=tokens,
            gate_threshold=self.memory.token_threshold,
        )

    def _count(self, name: str, rows: int) -> None:
        self.hits[name] += rows
        self.hits_by_step[self._step] += rows

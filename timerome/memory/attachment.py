"""A memory acting on a backbone: hooks that add it to the rows whose sequences it is addressed to."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..coordinates import Role
from ..hooks import Hooks
from .address import Reading, addresses
from .apply import Applied, applied_at
from .rows import Asked, Rows, RowTracker

if TYPE_CHECKING:
    from .memory import EditMemory

REMEMBERED = 4096  # sequences whose address is kept


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
    # A file may lie about what it was built on.
    parts, gate = [part for edit in memory.history for part in edit.parts], memory.background.gate
    layers = [part.coordinate.layer for part in parts] + [0 if gate is None else gate.layer or 0]
    widths = {part.targets.shape[-1] for part in parts} or {backbone.hidden_size}
    if widths != {backbone.hidden_size} or max(layers) >= backbone.n_layers:
        raise MemoryMismatchError(
            f"EditMemory: this memory reaches up to layer {max(layers)} and has a width of {sorted(widths)}, but "
            f"{backbone.name} has {backbone.n_layers} layers of {backbone.hidden_size}; load the model it was built on."
        )


# Models that are read as they are: while rows are addressed or edits are made, no memory acts on their forwards, also
# where several memories are attached, be it through several backbones around one model.
_UNEDITED: Counter[int] = Counter()


@contextmanager
def unedited(model: nn.Module) -> Iterator[None]:
    """Leave the forwards inside alone, whatever is attached."""
    _UNEDITED[id(model)] += 1
    try:
        yield
    finally:
        _UNEDITED[id(model)] -= 1


class Attachment:
    """Context manager inside which a memory edits every forward of a backbone.

    With a row gate, each sequence is addressed once, at its fully masked state, by one forward without any memory; the
    answer stays for all its denoising steps. Which positions form the canvas is announced by this library's own
    samplers; in other loops it is what was masked when the sequence was first seen.

    Where the memory holds no edit, or no row may have one, no hook is registered: that costs nothing.

    Attributes:
        counts: rows edited, by edit id (``"*"`` where all edits act together) and denoising step, counted from 0 for
            each new batch.

    Raises:
        MemoryMismatchError: the memory was built on another model or tokenizer.
    """

    def __init__(self, memory: EditMemory, backbone: Backbone) -> None:
        check_belongs(memory, backbone)
        self.memory, self.backbone = memory, backbone
        self.counts: Counter[tuple[str, int]] = Counter()
        self._begin_hook = Hooks(backbone, begin=self._begin)
        self._site_hooks: Hooks | None = None
        self._on = False
        self._sets: list[frozenset[str] | None] | None = None
        self._addresses: OrderedDict[bytes, tuple[Tensor, frozenset[int]]] = OrderedDict()
        self._given: dict[tuple[bytes, frozenset[str] | None], int] = {}
        self._tracker = RowTracker(backbone)
        self._rows: Rows | None = None
        self._chosen: list[tuple[int, ...]] | None = None
        self._chosen_for: tuple[tuple[Asked, ...], list[frozenset[str] | None]] | None = None
        self._given_to: list[tuple[str, int]] = []
        self._allowed: list[frozenset[str] | None] = []
        self.refresh()

    @property
    def hits(self) -> Counter[str]:
        """Rows edited, by edit id."""
        return summed(self.counts, 0)

    @property
    def hits_by_step(self) -> Counter[int]:
        """Rows edited, by denoising step."""
        return summed(self.counts, 1)

    def attach(self) -> Attachment:
        """Let the memory act; :meth:`remove` undoes it.

        Raises:
            RuntimeError: it is attached already; or the model is sharded and the memory has a row gate.
        """
        if self._on:
            raise RuntimeError("Attachment.attach: this memory is attached already; remove() it first.")
        if self.memory.gated and any(hasattr(p, "full_tensor") for p in self.backbone.model.parameters()):
            raise RuntimeError(
                "Attachment.attach: a row gate runs the model inside the model's own forward, which a model sharded "
                "over processes cannot do; use strategy 'ddp' or a device_map, or build the memory with gate=None."
            )
        self._on = True
        try:
            self._set_hooks()
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        """Remove the hooks; may be called twice."""
        self._on = False
        self._set_hooks()

    def __enter__(self) -> Attachment:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def select(self, sets: Sequence[Iterable[str] | None] | None) -> None:
        """Say which edits each row of the coming batches may have; None, and at first, is all of them.

        A row gate still decides whether an edit that a row may have is given to it. Without one, a row has all edits
        it may have. Rows are those of the batch as the loop has it: the prompts given to :func:`timerome.generate`, the
        facts given to ``evaluate``, which put them into batches of their own and say so, or the rows of a forward in
        other loops. A forward over a multiple of them, as in classifier-free guidance, repeats them.

        Args:
            sets: for each row the ids of edits; None for all, empty for none.

        Raises:
            KeyError: no edit in force has such an id.
        """
        chosen = None if sets is None else [None if ids is None else frozenset(ids) for ids in sets]
        known = {edit.id for edit in self.memory.edits}
        for i, ids in enumerate(chosen or ()):
            if ids is not None and not ids <= known:
                raise KeyError(
                    f"Attachment.select: row {i} names {sorted(ids - known)[:5]}, but no such edit is in force; there "
                    f"are {', '.join(sorted(known)[:10]) or 'none'}."
                )
        self._sets = chosen
        self._set_hooks()

    def refresh(self) -> None:
        """Take over changes of the memory; it calls this itself."""
        self._given.clear()
        self._chosen_for = None
        self._applied = [applied_at(site, self.memory, self.backbone.device) for site in self.memory.sites]
        self._set_hooks()

    def _set_hooks(self) -> None:
        """Register what has to act, and nothing else."""
        if self._site_hooks is not None:
            self._site_hooks.remove()
            self._site_hooks = None
        self._begin_hook.remove()
        anyone = self._sets is None or any(ids is None or ids for ids in self._sets)
        if self._on and self.memory.edits and anyone:
            hooks = Hooks(self.backbone, {a.site: self._editing(a) for a in self._applied})
            self._begin_hook.attach()
            self._site_hooks = hooks
            hooks.attach()

    def _begin(self, ids: Tensor, called: Mapping[str, Any]) -> None:
        """At the start of a forward: find out which rows get which edit."""
        if _UNEDITED[id(self.backbone.model)]:
            return
        rows = self._rows = self._tracker.begin(ids, called)
        allowed = self._allowed = self._sets_of(len(ids))
        asked = rows.asked if self.memory.gated else ()
        # Mostly the same rows go on by one step.
        if self._chosen_for is None or self._chosen_for[0] is not asked or self._chosen_for[1] != allowed:
            self._chosen_for = None
            self._chosen = self._choose(rows, allowed)
            self._chosen_for = asked, allowed
            edits = Counter(i for row in self._chosen or () for i in row)
            self._given_to = [(self.memory.edits[i].id, n) for i, n in edits.items()]
        for name, n in self._given_to if self._chosen is not None else [("*", len(ids))]:
            self.counts[name, rows.step] += n

    def _choose(self, rows: Rows, allowed: list[frozenset[str] | None]) -> list[tuple[int, ...]] | None:
        """Return the indices of each row's edits; None where all rows have all."""
        if self.memory.gated:
            return [(i,) if i >= 0 else () for i in self._address(rows, allowed)]
        if all(names is None for names in allowed):
            return None
        index = {edit.id: i for i, edit in enumerate(self.memory.edits)}
        everything = tuple(index.values())
        return [
            everything if names is None else tuple(sorted(index[name] for name in names & index.keys()))
            for names in allowed
        ]

    def _sets_of(self, batch: int) -> list[frozenset[str] | None]:
        """Which edits each row of a forward may have."""
        if self._sets is None:
            return [None] * batch
        rows = self.backbone.rows
        if rows is not None and max(rows, default=-1) < len(self._sets) and batch % len(rows) == 0:
            return [self._sets[i] for i in rows] * (batch // len(rows))
        if not self._sets or batch % len(self._sets):
            raise ValueError(
                f"Attachment.select: edits were named for {len(self._sets)} rows, but a forward has {batch}; name "
                "them for each batch anew."
            )
        return self._sets * (batch // len(self._sets))

    def _address(self, rows: Rows, allowed: list[frozenset[str] | None]) -> list[int]:
        """Return the index of each row's edit, -1 for none."""
        book, known = self.memory.book, self._addresses
        assert book is not None
        keys = [asked.key for asked in rows.asked]
        new = {key: asked for key, asked in zip(keys, rows.asked, strict=True) if key not in known}
        if new:
            states, canvases = [a.state for a in new.values()], [a.canvas for a in new.values()]
            with unedited(self.backbone.model), self.backbone.on_canvas(None):
                found = addresses(self.backbone, states, canvases, book.site, book.span)
            known.update(zip(new, zip(*found, strict=True), strict=True))
        asked = list(zip(keys, allowed, strict=True))
        open_ = [pair for pair in dict.fromkeys(asked) if pair not in self._given]
        if open_:
            found = Reading(torch.stack([known[k][0] for k, _ in open_]), tuple(known[k][1] for k, _ in open_))
            free = all(names is None for _, names in open_)
            given = book.lookup(found) if free else book.lookup(found, self._permitted([n for _, n in open_]))
            self._given.update(zip(open_, given.tolist(), strict=True))
        active = [self._given[pair] for pair in asked]
        while len(known) > REMEMBERED:
            gone, _ = known.popitem(last=False)
            self._given = {pair: i for pair, i in self._given.items() if pair[0] != gone}
        return active

    def _permitted(self, allowed: list[frozenset[str] | None]) -> Tensor:
        return torch.tensor([[names is None or e.id in names for e in self.memory.edits] for names in allowed])

    def _editing(self, applied: Applied) -> Callable[[Tensor], Tensor | None]:
        """Return the hook of a site."""

        def edit(h: Tensor) -> Tensor | None:
            if _UNEDITED[id(self.backbone.model)] or self._rows is None:
                return None
            if self._chosen is not None and not any(self._chosen):
                return None
            # A sum is finite only where all entries are; asking every entry takes many times as long. A loop that is
            # announced looks at its logits.
            announced = self.backbone.loop is not None
            if not (announced or math.isfinite(h.detach().sum()) or torch.isfinite(h).all()):
                raise FloatingPointError(
                    f"EditMemory: activations at {applied.site} are not finite; check the model's weights, dtype and "
                    "inputs."
                )
            rows, gated = self._rows, self.memory.gated

            def positions(role: Role) -> Tensor | None:
                return rows.positions(role).to(h.device) if gated else None

            return applied(h, self._chosen, self._allowed, positions, self.memory.token_threshold, rows)

        return edit


def summed(counts: Counter[tuple[str, int]], by: int) -> Counter[Any]:
    """Sum counts of (edit id, step) over the other of the two."""
    total: Counter[Any] = Counter()
    for key, n in counts.items():
        total[key[by]] += n
    return total

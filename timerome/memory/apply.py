"""Add a memory's systems to a site's output, each row its own edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..coordinates import Role, Site
from ..ops import EditSets, kept_count, pack_edit_sets
from .rows import Rows
from .systems import System, strength

if TYPE_CHECKING:
    from .memory import EditMemory

Chosen = Sequence[tuple[int, ...]] | None
Positions = Callable[[Role], Tensor | None]


@dataclass
class Own:
    """Systems of single edits that share role, strength and sparsity, packed.

    Attributes:
        role: positions they act at.
        alpha: strength.
        sparsity: share of entries that are dropped.
        packed: the systems.
        place: set of each of the memory's edits, -1 for those that have none here.
    """

    role: Role
    alpha: float
    sparsity: float
    packed: EditSets
    place: list[int]

    def __call__(self, h: Tensor, chosen: Chosen, tokens: Tensor | None, threshold: float | None) -> Tensor:
        """Return ``h`` ``(B, L, d)`` with each row's edits added, one after the other in the memory's order."""
        packed = self.packed
        for sets in nth_of_each(chosen, self.place, len(h)):
            h = ops.sparse_lowrank_residual(
                h, packed.keys, packed.coef, packed.values, mean=packed.mean, alpha=self.alpha, sparsity=self.sparsity,
                row_mask=tokens, gate_threshold=threshold, edit_set=torch.tensor(sets, device=h.device),
                segments=packed.segments,
            )  # fmt: skip
        return h


@dataclass
class Together:
    """A system that edits share. Where a row may not have all of them, it is answered by the values of its own.

    Attributes:
        system: the system.
        ids: of the memory's edits.
    """

    system: System
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        self._parts: dict[frozenset[str] | None, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self,
        h: Tensor,
        chosen: Chosen,
        allowed: Sequence[frozenset[str] | None],
        tokens: Tensor | None,
        threshold: float | None,
    ) -> Tensor:
        """Return ``h`` ``(B, L, d)`` with the system added to the rows that are given one of its edits."""
        out = h
        for names in dict.fromkeys(allowed):
            rows = torch.tensor(
                [own == names and (chosen is None or bool(chosen[i])) for i, own in enumerate(allowed)], device=h.device
            )
            if not rows.any():
                continue
            keys, coef, values = self._part(names)
            mask = rows[:, None].expand(h.shape[:2]) if tokens is None else tokens & rows[:, None]
            out = ops.sparse_lowrank_residual(
                out, keys, coef, values, mean=self.system.solved.mean, alpha=self.system.alpha,
                sparsity=self.system.sparsity, row_mask=None if bool(mask.all()) else mask.contiguous(),
                gate_threshold=threshold,
            )  # fmt: skip
        return out

    def _part(self, names: frozenset[str] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The system's keys, coefficients and values, the latter of some edits only; their keys come first."""
        if names not in self._parts:
            solved, n = self.system.solved, len(self.system.owner)
            own = torch.tensor([names is None or self.ids[i] in names for i in self.system.owner.tolist()])
            mine, other = own.nonzero().flatten(), (~own).nonzero().flatten()
            order = torch.cat([mine, other, torch.arange(n, len(solved.keys))]).to(solved.keys.device)
            mine = mine.to(order.device)
            part = solved.keys[order], solved.coef[order][:, mine].contiguous(), solved.values[mine]
            if len(self._parts) > 64:  # sets of edits that are named by chance do not come again
                self._parts.clear()
            self._parts[names] = part
        return self._parts[names]


class ByPlace:
    """Edits that change each place of the answer by what it needs.

    Args:
        tables: of each of the memory's edits what its places are changed by, strength and sparsity included,
            ``(places, d)``; None for those that have none here.
    """

    def __init__(self, tables: list[Tensor | None]) -> None:
        own = [table for table in tables if table is not None]
        numbers = iter(range(len(own)))
        self.place = [-1 if table is None else next(numbers) for table in tables]
        self.table = torch.cat([*own, own[0].new_zeros(1, own[0].shape[1])])
        self._nothing = len(self.table) - 1  # the line that changes nothing
        sizes = torch.tensor([len(table) for table in own])
        self._first, self._last = sizes.cumsum(0) - sizes, sizes - 1
        self._changes: tuple[Chosen, Tensor, torch.dtype, list[Tensor]] | None = None

    def __call__(self, h: Tensor, chosen: Chosen, rows: Rows) -> Tensor:
        """Return ``h`` ``(B, L, d)`` with each row's edits added where masked answer tokens are predicted."""
        kept = self._changes
        if kept is None or kept[0] is not chosen or kept[1] is not rows.places or kept[2] is not h.dtype:
            kept = self._changes = chosen, rows.places, h.dtype, self._of(chosen, rows.places, h)
        for change in kept[3]:
            h = h.addcmul(change, rows.masked.to(h).unsqueeze(-1))
        return h

    def _of(self, chosen: Chosen, places: Tensor, h: Tensor) -> list[Tensor]:
        """What a row's first edit adds to each position if masked, its second, and so on, ``(B, L, d)`` like ``h``."""
        found = []
        for edit in map(torch.tensor, nth_of_each(chosen, self.place, len(places))):
            of = edit.clamp_min(0)[:, None]
            line = self._first[of] + places.clamp_min(0).minimum(self._last[of])
            line = torch.where(edit[:, None] < 0, self._nothing, line)
            found.append(self.table[line.to(h.device)].to(h.dtype))
        return found


def nth_of_each(chosen: Chosen, place: list[int], rows: int) -> Iterator[list[int]]:
    """Yield the place of each row's first edit that has one, then of its second, and so on; -1 where there is none."""
    given = [tuple(range(len(place)))] * rows if chosen is None else chosen
    mine = [[place[i] for i in row if place[i] >= 0] for row in given]
    for n in range(max(map(len, mine), default=0)):
        yield [row[n] if n < len(row) else -1 for row in mine]


@dataclass
class Applied:
    """All that is added at one site.

    Attributes:
        site: where.
        own: packed systems of single edits.
        together: systems that edits share.
        by_place: edits by place of the answer; None where there are none.
    """

    site: Site
    own: list[Own]
    together: list[Together]
    by_place: ByPlace | None

    def __call__(
        self,
        h: Tensor,
        chosen: Chosen,
        allowed: Sequence[frozenset[str] | None],
        positions: Positions,
        threshold: float | None,
        rows: Rows,
    ) -> Tensor:
        """Return ``h`` ``(B, L, d)`` with the rows' edits added.

        Args:
            h: the site's output.
            chosen: indices of the edits given to each row; None is all of them to all.
            allowed: ids of the edits each row may have; None is all.
            positions: of a role, where edits act, boolean ``(B, L)``; None is everywhere.
            threshold: of the token gate.
            rows: of the forward.
        """
        for own in self.own:
            h = own(h, chosen, positions(own.role), threshold)
        for shared in self.together:
            h = shared(h, chosen, allowed, positions(shared.system.place.role), threshold)
        return h if self.by_place is None else self.by_place(h, chosen, rows)


def applied_at(site: Site, memory: EditMemory, device: torch.device) -> Applied:
    """Put what a memory adds at a site on a device, ready to be applied."""
    groups: dict[tuple[Role, float, float], list[System]] = {}
    together: list[Together] = []
    ids = tuple(edit.id for edit in memory.edits)
    for system in memory.systems:
        if system.place.site != site:
            continue
        if memory.settings.shared:
            together.append(Together(system.to(device), ids))
        else:
            groups.setdefault((system.place.role, system.alpha, system.sparsity), []).append(system)
    own = []
    for (role, alpha, sparsity), systems in groups.items():
        place = [-1] * len(ids)
        for s, system in enumerate(systems):
            place[int(system.owner[0])] = s
        solved = [system.solved for system in systems]
        packed = pack_edit_sets([(s.keys, s.coef, s.values, s.mean) for s in solved]).to(device)
        own.append(Own(role, alpha, sparsity, packed, place))
    return Applied(site, own, together, _by_place(site, memory, device))


def _by_place(site: Site, memory: EditMemory, device: torch.device) -> ByPlace | None:
    groups: dict[tuple[float, float], dict[int, Tensor]] = {}
    for i, edit in enumerate(memory.edits):
        part = next((p for p in edit.parts if p.coordinate.site == site), None)
        if part is not None and edit.settings.by_place:
            alike = groups.setdefault((edit.settings.sparsity, strength(edit.settings)), {})
            alike[i] = part.targets
    tables: list[Tensor | None] = [None] * len(memory.edits)
    for (sparsity, alpha), own in groups.items():
        offsets = torch.cat(list(own.values())).to(device)
        kept = kept_count(offsets.shape[1], sparsity)
        changes = ops.sparsify_add(torch.zeros_like(offsets), offsets, kept, alpha=alpha)
        for i, table in zip(own, changes.split([len(t) for t in own.values()]), strict=True):
            tables[i] = table
    return ByPlace(tables) if groups else None

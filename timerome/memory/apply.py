"""Add a memory's systems to a site's output, each row its own edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        rows = [tuple(range(len(self.place)))] * len(h) if chosen is None else chosen
        mine = [[self.place[i] for i in row if self.place[i] >= 0] for row in rows]
        for n in range(max(map(len, mine), default=0)):
            sets = torch.tensor([row[n] if n < len(row) else -1 for row in mine], device=h.device)
            packed = self.packed
            h = ops.sparse_lowrank_residual(
                h, packed.keys, packed.coef, packed.values, mean=packed.mean, alpha=self.alpha, sparsity=self.sparsity,
                row_mask=tokens, gate_threshold=threshold, edit_set=sets, segments=packed.segments,
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


@dataclass
class ByPlace:
    """Edits that change each place of the answer by what it needs.

    Attributes:
        tables: of each of the memory's edits what its places are changed by, strength and sparsity included,
            ``(places, d)``; None for those that have none here.
    """

    tables: list[Tensor | None]

    def __call__(self, h: Tensor, chosen: Chosen, rows: Rows) -> Tensor:
        """Return ``h`` ``(B, L, d)`` with each row's edits added where masked answer tokens are predicted."""
        out, tokens = h, rows.positions("object")
        given = [range(len(self.tables))] * len(h) if chosen is None else chosen
        for row, edits in enumerate(given):
            tables = [table for table in (self.tables[i] for i in edits) if table is not None]
            if not tables:
                continue
            where = tokens[row].nonzero().flatten()
            if not len(where):
                continue
            if out is h:
                out = h.clone()
            places = rows.places[row].index_select(0, where)
            for table in tables:
                change = table.index_select(0, places.clamp(0, len(table) - 1).to(table.device))
                out[row].index_add_(0, where.to(h.device), change.to(h))
        return out


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
    tables: list[Tensor | None] = []
    for edit in memory.edits:
        part = next((p for p in edit.parts if p.coordinate.site == site), None)
        if part is None or not edit.settings.by_place:
            tables.append(None)
            continue
        offsets = part.targets.to(device)
        kept = kept_count(offsets.shape[1], edit.settings.sparsity)
        tables.append(ops.sparsify_add(torch.zeros_like(offsets), offsets, kept, alpha=strength(edit.settings)))
    return ByPlace(tables) if any(table is not None for table in tables) else None

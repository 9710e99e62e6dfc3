"""What an attachment takes of a memory: its edits, frozen, with their tensors where the model is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ... import ops
from ...backbones import Backbone
from ...coordinates import Role, Site
from ...functional.answers import answer_scores, resumable
from ...ops import EditSets, pack_edit_sets
from ..answer_gate import LONG, Act, Follows, Row, Verdict, act, verdict
from ..edits import Edit, Placed, RelationHead, Watch
from ..naming import Name, Named, NameIndex
from ..systems import System

Allowed = frozenset[str] | None  # ids of the edits a row may have; None is all


@dataclass(frozen=True)
class Compiled:
    """The edits in force of one state of a memory, ready to be asked and applied. It never changes.

    Attributes:
        backbone: the model.
        edits: in force, in order.
        systems: the solved ridge systems.
        index: what the edits' subjects are called.
        tokens: of each gated edit, its watches and their tokens, on the model's device.
        targets: of each placed edit, what is put in place.
    """

    backbone: Backbone
    edits: tuple[Edit, ...]
    systems: tuple[System, ...]
    index: NameIndex
    tokens: tuple[tuple[tuple[Watch, tuple[Tensor, ...]], ...], ...]
    targets: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, backbone: Backbone, edits: Sequence[Edit], systems: Sequence[System]) -> Compiled:
        """Put edits on the model's device."""
        device = backbone.device
        gated = [edit.gate for edit in edits]
        names = [Name.of(gate.names if gate else (), gate.wordings if gate else ()) for gate in gated]
        tokens = tuple(
            tuple(
                (watch, tuple(torch.tensor(way, device=device) for way in watch.tokens))
                for watch in (gate.watches if gate else ())
            )
            for gate in gated
        )
        targets = tuple(e.change.targets.to(device) if isinstance(e.change, Placed) else None for e in edits)
        moved = tuple(system.to(device) for system in systems)
        return cls(backbone, tuple(edits), moved, NameIndex(names), tokens, targets)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where the edits act."""
        return tuple(dict.fromkeys(site for edit in self.edits for site in edit.change.sites))

    @cached_property
    def number(self) -> dict[str, int]:
        """Index of each edit by its id."""
        return {edit.id: i for i, edit in enumerate(self.edits)}

    @cached_property
    def ungated(self) -> tuple[int, ...]:
        """Edits that act whatever is asked."""
        return tuple(i for i, edit in enumerate(self.edits) if edit.gate is None)

    @cached_property
    def gated(self) -> bool:
        """Whether any edit has a gate."""
        return len(self.ungated) < len(self.edits)

    def relation(self, edit: int) -> RelationHead | None:
        """The relation head of an edit."""
        gate = self.edits[edit].gate
        return None if gate is None else gate.relation

    @cached_property
    def relates(self) -> bool:
        """Whether any edit has a relation head."""
        return any(self.relation(i) is not None for i in range(len(self.edits)))

    def taught(self, edit: int, masked: Sequence[int], way: int) -> Act:
        """Return how an edit acts on a row whose question is its own: what it says is the whole answer."""
        change = self.edits[edit].change
        ways = len(change.tokens) if isinstance(change, Placed) else 1
        return Act(self.edits[edit].id, masked[0], len(masked), min(way, ways - 1), True)

    @cached_property
    def name_tokens(self) -> Tensor:
        """Tokens that names of the edits' subjects are written with."""
        tokens = {t for edit in self.edits if edit.gate for own in edit.gate.spellings for t in own}
        return torch.tensor(sorted(tokens), dtype=torch.int64)

    @cached_property
    def _long(self) -> tuple[tuple[int, ...], Tensor]:
        """Edits whose answers are nobody else's, and the first tokens of these."""
        found = [
            (i, way[:1])
            for i, watches in enumerate(self.tokens)
            for _, ways in watches
            for way in ways
            if len(way) >= LONG
        ]
        return tuple(i for i, _ in found), torch.cat([first for _, first in found] or [torch.zeros(0).long()])

    def named(self, text: str, allowed: Allowed) -> list[Named]:
        """Return the gated edits that a text names and its row may have."""
        return [n for n in self.index.find(text) if allowed is None or self.edits[n.edit].id in allowed]

    def spelt(self, ids: Sequence[int], allowed: Allowed) -> list[Named]:
        """Return the edits whose subject stands in a row of tokens as it is usually written, without a tokenizer."""
        row = " ".join(map(str, ids))
        return [
            Named(i, "named", "")
            for i, edit in enumerate(self.edits)
            if edit.gate is not None
            and (allowed is None or edit.id in allowed)
            and any(f" {' '.join(map(str, own))} " in f" {row} " for own in edit.gate.spellings)
        ]

    def unnamed(self, row: Row, but: Sequence[Named], allowed: Allowed) -> list[Named]:
        """Return the edits whose answers are nobody else's, and may be about to begin somewhere in a row."""
        edits, first = self._long
        if not edits or not len(row.at):
            return []
        near = (row.log_p[:, first.to(row.log_p.device)].amax(0) > -6.0).tolist()
        known = {n.edit for n in but}
        found = dict.fromkeys(i for i, maybe in zip(edits, near, strict=True) if maybe and i not in known)
        return [Named(i, "unnamed", "") for i in found if allowed is None or self.edits[i].id in allowed]

    def verdicts(self, row: Row, candidates: Sequence[Named]) -> list[Verdict]:
        """Return what the gates of some candidates say of a row, the likeliest first."""
        found = [verdict(n.edit, self.edits[n.edit], n.how, row, self.tokens[n.edit]) for n in candidates]
        return sorted(found, key=lambda v: (v.said, v.over), reverse=True)

    def scores(self, row: Row, found: Verdict) -> list[float]:
        """Return the score of a verdict's answer at each position of a row."""
        ways = next((ways for watch, ways in self.tokens[found.edit] if watch is found.watch), ())
        return answer_scores(row.log_p, row.at, row.ids, ways[found.way]).tolist() if ways else []

    def acts(self, row: Row, candidates: Sequence[Named], before: Sequence[Act], follows: Follows) -> list[Act]:
        """Return the edits at work in a row: those that were before, and those whose gates are open now."""
        found = list(before)
        eos = self.backbone.eos_id
        for v in self.verdicts(row, candidates):
            if not v.said:
                break
            for one in v.places:
                if not any(self._covers(a, one) for a in found):
                    found.append(act(one, self.edits[v.edit], row, eos, follows))
        return found

    def _covers(self, one: Act, other: Verdict) -> bool:
        """Whether an edit at work leaves another no room, or is that other one."""
        size = max(one.length, self._size(one))
        return other.start + other.length > one.start and (one.ends or other.start < one.start + size)

    def _size(self, one: Act) -> int:
        """Tokens that an edit at work puts in place."""
        change = self.edits[self.number[one.edit]].change
        return len(change.tokens[one.way]) if isinstance(change, Placed) else one.length

    def resumes(self, ids: Tensor, masked: Tensor, candidates: Sequence[Named]) -> list[int]:
        """Return where answers that candidates give may have been begun in a row that was not seen before."""
        return sorted({at for n in candidates for way in self._says(n.edit) for at in resumable(ids, masked, way)})

    def _says(self, edit: int) -> list[Tensor]:
        """Tokens of what an edit says, each way of spelling it; none where only a tokenizer could tell."""
        change, targets, says = self.edits[edit].change, self.targets[edit], self.edits[edit].says
        if isinstance(change, Placed) and targets is not None:
            tokens = self.backbone.predictions(targets).argmax(-1).cpu()
            return [tokens[torch.tensor(way)] for way in change.tokens]
        if says is None or self.backbone.tokenizer is None:
            return []
        return [torch.tensor(self.backbone.encode(text)) for text in (" " + says, says)]

    # Applying --------------------------------------------------------------------------------------------------------

    def place(self, h: Tensor, row: int, columns: Tensor, at: Tensor, acts: Sequence[Act]) -> None:
        """Write what placed edits say into the last block's output ``h`` ``(B, L, d)``, which is the caller's own.

        Args:
            h: changed in place.
            row: which row.
            columns: those that predict masked answer tokens, int64 ``(A,)``.
            at: the positions they predict, int64 ``(A,)``.
            acts: the edits at work in it.
        """
        for one in acts:
            i = self.number[one.edit]
            change, targets = self.edits[i].change, self.targets[i]
            if not isinstance(change, Placed) or targets is None:
                continue
            numbers = list(change.tokens[one.way])
            size = len(numbers)
            after = at >= one.start + size
            own = (at >= one.start) & ~after
            open_ = bool(own.any())
            where = torch.tensor(numbers, device=h.device)
            moved = h[row].clone() if not one.ends and open_ and size != one.length else None
            h[row, columns[own]] = targets[where[at[own] - one.start]].to(h.dtype)
            if one.ends and change.ends:
                h[row, columns[after]] = targets[-1].to(h.dtype)
            elif moved is not None:
                # Until the new answer stands there, what follows the old one is said where it follows the new one.
                source = columns[after] - (size - one.length)
                known = torch.isin(source, columns)
                h[row, columns[after][known]] = moved[source[known]]

    @cached_property
    def _applied(self) -> dict[Site, list[_Own | _Together]]:
        found: dict[Site, list[_Own | _Together]] = {}
        groups: dict[tuple[Site, Role, float, float], list[System]] = {}
        for system in self.systems:
            if system.together:
                ids = tuple(edit.id for edit in self.edits)
                found.setdefault(system.site, []).append(_Together(system, ids))
            else:
                key = (system.site, system.role, system.alpha, system.sparsity)
                groups.setdefault(key, []).append(system)
        for (site, role, alpha, sparsity), systems in groups.items():
            place = [-1] * len(self.edits)
            for s, system in enumerate(systems):
                place[int(system.owner[0])] = s
            solved = [system.solved for system in systems]
            packed = pack_edit_sets([(s.keys, s.coef, s.values, s.mean) for s in solved]).to(self.backbone.device)
            found.setdefault(site, []).append(_Own(role, alpha, sparsity, packed, place))
        return found

    def add(
        self,
        h: Tensor,
        site: Site,
        chosen: Sequence[tuple[int, ...]],
        allowed: Sequence[Allowed],
        positions: Callable[[Role], Tensor],
    ) -> Tensor:
        """Return a site's output ``(B, L, d)`` with what the rows' keyed edits add.

        Args:
            h: the output.
            site: the site.
            chosen: indices of the gated edits at work in each row.
            allowed: which edits each row may have, of those that act whatever is asked.
            positions: of a role, where gated edits act, boolean ``(B, L)``.
        """
        for applied in self._applied.get(site, ()):
            if isinstance(applied, _Together):
                h = applied(h, allowed)
            else:
                h = applied(h, chosen, positions(applied.role).to(h.device))
        return h


@dataclass(frozen=True)
class _Own:
    """Systems of single edits that share role, strength and sparsity, packed: each row is given its own.

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

    def __call__(self, h: Tensor, chosen: Sequence[tuple[int, ...]], positions: Tensor) -> Tensor:
        packed = self.packed
        for sets in _nth_of_each(chosen, self.place):
            h = ops.sparse_lowrank_residual(
                h, packed.keys, packed.coef, packed.values, mean=packed.mean, alpha=self.alpha, sparsity=self.sparsity,
                row_mask=positions, edit_set=torch.tensor(sets, device=h.device), segments=packed.segments,
            )  # fmt: skip
        return h


def _nth_of_each(chosen: Sequence[tuple[int, ...]], place: list[int]) -> Iterator[list[int]]:
    """Yield the place of each row's first edit that has one, then of its second, and so on; -1 where there is none."""
    mine = [[place[i] for i in row if place[i] >= 0] for row in chosen]
    for n in range(max(map(len, mine), default=0)):
        yield [row[n] if n < len(row) else -1 for row in mine]


@dataclass(frozen=True)
class _Together:
    """A system that edits share, at every token. A row that may not have all is answered by the values of its own.

    Attributes:
        system: the system.
        ids: of the memory's edits.
    """

    system: System
    ids: tuple[str, ...]

    def __call__(self, h: Tensor, allowed: Sequence[Allowed]) -> Tensor:
        for names in dict.fromkeys(allowed):
            if names is not None and not names:
                continue
            rows = torch.tensor([own == names for own in allowed], device=h.device)
            keys, coef, values = self._part(names)
            if not len(values):
                continue
            h = ops.sparse_lowrank_residual(
                h, keys, coef, values, mean=self.system.solved.mean, alpha=self.system.alpha,
                sparsity=self.system.sparsity,
                row_mask=None if bool(rows.all()) else rows[:, None].expand(h.shape[:2]).contiguous(),
            )  # fmt: skip
        return h

    def _part(self, names: Allowed) -> tuple[Tensor, Tensor, Tensor]:
        """The system's keys, coefficients and values, the latter of some edits only; their keys come first."""
        solved, n = self.system.solved, len(self.system.owner)
        if names is None:
            return solved.keys, solved.coef, solved.values
        own = torch.tensor([self.ids[i] in names for i in self.system.owner.tolist()], dtype=torch.bool)
        mine, other = own.nonzero().flatten(), (~own).nonzero().flatten()
        order = torch.cat([mine, other, torch.arange(n, len(solved.keys))]).to(solved.keys.device)
        mine = mine.to(order.device)
        return solved.keys[order], solved.coef[order][:, mine].contiguous(), solved.values[mine]

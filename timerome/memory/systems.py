"""The solved ridge systems of a memory, kept in step with its edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..coordinates import Role, Site
from ..functional.solve import RidgeMemory, solve
from ..ops import cholesky_append, cholesky_delete, ridge_cholesky
from .edits import Edit, Keyed, Part


@dataclass(frozen=True)
class System:
    """One solved ridge system: what is added at a place.

    Attributes:
        site: where.
        role: at which positions.
        solved: keys, coefficients and values.
        owner: index of the edit in force that each value belongs to, ``(M,)`` int64.
        alpha: strength.
        sparsity: share of each row's entries that are dropped.
        together: whether edits share it.
    """

    site: Site
    role: Role
    solved: RidgeMemory
    owner: Tensor
    alpha: float
    sparsity: float
    together: bool

    def to(self, device: torch.device) -> System:
        """The same system on another device."""
        return replace(self, solved=RidgeMemory(*(t.to(device) for t in self.solved)))


class SharedSystem:
    """One ridge system over all edits at a place, brought up to date by the rows that came and went.

    About the mean of protected keys the factor is updated: O(n²) a row, in float64, the same as a refit. Without any
    (the paper's form), μ and s̄ are those of the edits' own keys, every change moves every row, and the system is
    solved anew.
    """

    def __init__(self, part: Part, change: Keyed) -> None:
        self._mean, self._ridge = part.mean, change.ridge
        self._ids: list[str] = []  # owner of each row, protected ones first, under ""
        self._parts: dict[str, Part] = {}  # whose rows they are: a change that failed may leave its id to another edit
        self._rows = torch.empty(0, 0, dtype=torch.float64)
        self._factor = torch.empty(0, 0, dtype=torch.float64)
        self._scale = self._penalty = 0.0
        if part.mean is not None and part.protect is not None:
            mean = part.mean.double()
            centred = part.protect.double() - mean
            self._scale = float(centred.square().sum(1).mean())
            self._penalty = change.ridge * self._scale
            self._rows = change.beta**0.5 * centred if change.beta > 0 else mean.new_empty(0, len(mean))
            self._ids = [""] * len(self._rows)
            self._factor = self._factor_of(self._rows)

    def __len__(self) -> int:
        return len(self._ids)

    def solved(self, parts: Sequence[tuple[str, Part]]) -> tuple[RidgeMemory, list[str]]:
        """Return the system of these edits' parts, and the edit id of each value."""
        values = torch.cat([part.targets for _, part in parts])
        owners = [name for name, part in parts for _ in part.keys]
        if self._mean is None:
            keys = torch.cat([part.keys for _, part in parts])
            return solve(keys, values, ridge=self._ridge, mean=keys.mean(0)), owners
        self._update(parts)
        first: dict[str, int] = {}
        for i, name in enumerate(self._ids):
            first.setdefault(name, i)
        own = torch.tensor([first[name] + j for name, part in parts for j in range(len(part.keys))], dtype=torch.int64)
        guarded = torch.tensor([i for i, name in enumerate(self._ids) if not name], dtype=torch.int64)
        order = torch.cat([own, guarded])
        inverse = torch.cholesky_inverse(self._factor)
        return RidgeMemory(
            mean=self._mean,
            keys=self._rows[order].float(),
            coef=inverse[order][:, own].float().contiguous(),
            values=values.float().contiguous(),
            scale=torch.tensor(self._scale, dtype=torch.float64),
        ), owners

    def _update(self, parts: Sequence[tuple[str, Part]]) -> None:
        ids, rows, factor = list(self._ids), self._rows, self._factor
        kept = {name for name, part in parts if self._parts.get(name) is part}
        gone = [i for i, name in enumerate(ids) if name and name not in kept]
        new = [(name, self._centred(part.keys)) for name, part in parts if name not in kept]
        changes = len(gone) + sum(len(own) for _, own in new)
        if not changes:
            return
        by_row = 3 * changes < len(ids)  # a fresh factor costs about as much as n / 3 changes
        for i in reversed(gone):
            del ids[i]
            if by_row:
                factor = cholesky_delete(factor, i)
        if gone:
            keep = torch.ones(len(rows), dtype=torch.bool)
            keep[gone] = False
            rows = rows[keep]
        n, rows = len(rows), torch.cat([rows, *(own for _, own in new)])
        ids += [name for name, own in new for _ in range(len(own))]
        if by_row and len(rows) > n:
            grown = factor.new_empty(len(rows), len(rows))
            grown[:n, :n] = factor
            for i in range(n, len(rows)):
                gram = rows[: i + 1] @ rows[i]
                factor = cholesky_append(
                    grown[:i, :i], gram[:i], float(gram[i]) + self._penalty, out=grown[: i + 1, : i + 1]
                )
        # All at once, so that whatever interrupts this leaves rows and factor as they were.
        factor = factor if by_row else self._factor_of(rows)
        self._ids, self._parts, self._rows, self._factor = ids, dict(parts), rows, factor

    def _centred(self, keys: Tensor) -> Tensor:
        assert self._mean is not None
        return keys.double() - self._mean.double()

    def _factor_of(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_empty(0, 0)
        return ridge_cholesky(rows, ridge=self._penalty, relative=False).cholesky


class Systems:
    """The solved systems of a memory's edits in force; what was solved is kept while its edits stay."""

    def __init__(self) -> None:
        self._own: dict[str, tuple[Keyed, tuple[RidgeMemory, ...]]] = {}
        self._shared: dict[tuple[Site, Role], SharedSystem] = {}

    def of(self, edits: Sequence[Edit]) -> tuple[System, ...]:
        """Return the systems of these edits: one a place where they share them, else one an edit and coordinate."""
        keyed = [(i, edit.id, edit.change) for i, edit in enumerate(edits) if isinstance(edit.change, Keyed)]
        present = {name: change for _, name, change in keyed}
        self._own = {name: own for name, own in self._own.items() if present.get(name) is own[0]}
        found: list[System] = []
        together: dict[tuple[Site, Role], list[tuple[int, str, Part, Keyed]]] = {}
        for i, name, change in keyed:
            if change.together:
                for part in change.parts:
                    together.setdefault((part.coordinate.site, part.coordinate.role), []).append(
                        (i, name, part, change)
                    )
                continue
            if name not in self._own:
                self._own[name] = change, tuple(_solved(part, change) for part in change.parts)
            for part, solved in zip(change.parts, self._own[name][1], strict=True):
                owner = torch.full((len(solved.values),), i)
                found.append(_system(part, change, solved, owner))
        for place, members in together.items():
            _, _, part, change = members[0]
            shared = self._shared.setdefault(place, SharedSystem(part, change))
            solved, names = shared.solved([(name, own) for _, name, own, _ in members])
            index = {name: i for i, name, _, _ in members}
            owner = torch.tensor([index[name] for name in names], dtype=torch.int64)
            found.append(_system(part, change, solved, owner))
        return tuple(found)


def _solved(part: Part, change: Keyed) -> RidgeMemory:
    return solve(part.keys, part.targets, ridge=change.ridge, mean=part.mean, protect=part.protect, beta=change.beta)


def _system(part: Part, change: Keyed, solved: RidgeMemory, owner: Tensor) -> System:
    where, strength = part.coordinate, change.alpha / len(change.parts)
    return System(where.site, where.role, solved, owner, strength, change.sparsity, change.together)

"""The ridge systems of a memory, kept in step with its edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..functional.solve import RidgeMemory, null_space_of, solve
from ..ops import cholesky_append, cholesky_delete, ridge_cholesky
from .background import Frame
from .edit import Edit, Part
from .settings import Place, Settings


@dataclass(frozen=True)
class System:
    """One solved ridge system: what is added at a place.

    Attributes:
        place: where.
        solved: keys, coefficients and values.
        owner: index of the edit in force that each value belongs to, ``(M,)`` int64.
        alpha: strength.
        sparsity: share of each row's entries that are dropped.
    """

    place: Place
    solved: RidgeMemory
    owner: Tensor
    alpha: float
    sparsity: float

    def to(self, device: torch.device) -> System:
        """The same system on another device."""
        return replace(self, solved=RidgeMemory(*(t.to(device) for t in self.solved)))


def strength(settings: Settings) -> float:
    """The strength at each of an edit's coordinates: α shared out."""
    return settings.alpha / len(settings.coordinates)


def solve_part(part: Part, settings: Settings, frame: Frame | None) -> RidgeMemory:
    """Solve one edit's own system at one coordinate; without a frame it is not centred, for want of other facts."""
    return solve(
        part.keys,
        part.targets,
        ridge=settings.ridge,
        mean=None if frame is None else frame.mean,
        protect=None if frame is None else frame.protect,
        beta=settings.beta,
        null_space=settings.null_space,
    )


class SharedSystem:
    """One ridge system over all edits at a place, brought up to date by the rows that came and went.

    In a frame, the factor is updated: O(n²) a row, in float64, the same as a refit. Without one (the paper's form), μ
    and s̄ are those of the edits' own keys, every change moves every row, and the system is solved anew.
    """

    def __init__(self, frame: Frame | None, settings: Settings) -> None:
        self._frame, self._settings = frame, settings
        self._ids: list[str] = []  # owner of each row, protected ones first, under ""
        self._parts: dict[str, Part] = {}  # whose rows they are: a change that failed may leave its id to another edit
        self._rows = torch.empty(0, 0, dtype=torch.float64)
        self._factor = torch.empty(0, 0, dtype=torch.float64)
        self._penalty = 0.0
        self._free: Tensor | None = None  # projector onto the null space of the protected keys, where there is one
        if frame is not None:
            self._penalty = settings.ridge * frame.scale
            mean = frame.mean.double()
            self._rows = mean.new_empty(0, len(mean))
            if frame.protect is not None and settings.null_space is not None:
                held = frame.protect.double() - mean
                self._free = null_space_of(held, settings.null_space)
                self._penalty = settings.ridge * float((held @ self._free).square().sum(1).mean())
            elif frame.protect is not None and settings.beta > 0:
                self._rows = settings.beta**0.5 * (frame.protect.double() - mean)
                self._ids = [""] * len(self._rows)
            self._factor = self._factor_of(self._rows)

    def __len__(self) -> int:
        return len(self._ids)

    def solved(self, parts: Sequence[tuple[str, Part]]) -> tuple[RidgeMemory, list[str]]:
        """Return the system of these edits' parts, and the edit id of each value."""
        values = torch.cat([part.targets for _, part in parts])
        owners = [name for name, part in parts for _ in part.keys]
        if self._frame is None:
            keys = torch.cat([part.keys for _, part in parts])
            return solve(keys, values, ridge=self._settings.ridge, mean=keys.mean(0)), owners
        self._update(parts)
        first: dict[str, int] = {}
        for i, name in enumerate(self._ids):
            first.setdefault(name, i)
        own = torch.tensor([first[name] + j for name, part in parts for j in range(len(part.keys))], dtype=torch.int64)
        guarded = torch.tensor([i for i, name in enumerate(self._ids) if not name], dtype=torch.int64)
        order = torch.cat([own, guarded])
        inverse = torch.cholesky_inverse(self._factor)
        return RidgeMemory(
            mean=self._frame.mean,
            keys=self._rows[order].float(),
            coef=inverse[order][:, own].float().contiguous(),
            values=values.float().contiguous(),
            scale=torch.tensor(self._frame.scale, dtype=torch.float64),
        ), owners

    def _update(self, parts: Sequence[tuple[str, Part]]) -> None:
        assert self._frame is not None
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
        assert self._frame is not None
        rows = keys.double() - self._frame.mean.double()
        return rows if self._free is None else rows @ self._free

    def _factor_of(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_empty(0, 0)
        return ridge_cholesky(rows, ridge=self._penalty, relative=False).cholesky


class Systems:
    """The solved systems of a memory's edits in force, by need."""

    def __init__(self) -> None:
        self._own: dict[str, tuple[Edit, tuple[RidgeMemory, ...]]] = {}
        self._shared: dict[Place, SharedSystem] = {}

    def of(self, edits: Sequence[Edit], frames: dict[Place, Frame]) -> tuple[System, ...]:
        """Return the systems of these edits: one a place where they share them, else one an edit and coordinate."""
        present = {edit.id: edit for edit in edits}
        self._own = {name: own for name, own in self._own.items() if present.get(name) is own[0]}
        found: list[System] = []
        together: dict[Place, list[tuple[int, Part]]] = {}
        for i, edit in enumerate(edits):
            if edit.settings.shared:
                for part in edit.parts:
                    together.setdefault(Place.of(part.coordinate), []).append((i, part))
                continue
            if edit.settings.by_place:
                continue
            if edit.id not in self._own:
                solutions = (solve_part(p, edit.settings, frames.get(Place.of(p.coordinate))) for p in edit.parts)
                self._own[edit.id] = edit, tuple(solutions)
            for part, solved in zip(edit.parts, self._own[edit.id][1], strict=True):
                owner = torch.full((len(solved.values),), i)
                place = Place.of(part.coordinate)
                found.append(System(place, solved, owner, strength(edit.settings), edit.settings.sparsity))
        for place, members in together.items():
            settings = edits[members[0][0]].settings
            shared = self._shared.setdefault(place, SharedSystem(frames.get(place), settings))
            solved, names = shared.solved([(edits[i].id, part) for i, part in members])
            index = {edit.id: i for i, edit in enumerate(edits)}
            owner = torch.tensor([index[name] for name in names], dtype=torch.int64)
            found.append(System(place, solved, owner, strength(settings), settings.sparsity))
        return tuple(found)

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
            self._refactor()

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
        wanted = {name for name, _ in parts}
        have = set(self._ids)
        gone = [i for i, name in enumerate(self._ids) if name and name not in wanted]
        new = [(name, self._centred(part.keys)) for name, part in parts if name not in have]
        changes = len(gone) + sum(len(rows) for _, rows in new)
        by_row = 3 * changes < len(self._ids)  # a fresh factor costs about as much as n / 3 changes
        for i in reversed(gone):
            del self._ids[i]
            if by_row:
                self._factor = cholesky_delete(self._factor, i)
        if gone:
            keep = torch.ones(len(self._rows), dtype=torch.bool)
            keep[gone] = False
            self._rows = self._rows[keep]
        for name, rows in new:
            n, self._rows = len(self._rows), torch.cat([self._rows, rows])
            self._ids += [name] * len(rows)
            for i in range(n, len(self._rows)) if by_row else ():
                gram = self._rows[: i + 1] @ self._rows[i]
                self._factor = cholesky_append(self._factor, gram[:i], float(gram[i]) + self._penalty)
        if changes and not by_row:
            self._refactor()

    def _centred(self, keys: Tensor) -> Tensor:
        assert self._frame is not None
        rows = keys.double() - self._frame.mean.double()
        return rows if self._free is None else rows @ self._free

    def _refactor(self) -> None:
        if self._ids:
            self._factor = ridge_cholesky(self._rows, ridge=self._penalty, relative=False).cholesky
        else:
            self._factor = self._rows.new_empty(0, 0)


class Systems:
    """The solved systems of a memory's edits in force, by need."""

    def __init__(self) -> None:
        self._own: dict[str, tuple[RidgeMemory, ...]] = {}
        self._shared: dict[Place, SharedSystem] = {}

    def of(self, edits: Sequence[Edit], frames: dict[Place, Frame]) -> tuple[System, ...]:
        """Return the systems of these edits: one a place where they share them, else one an edit and coordinate."""
        self._own = {edit.id: self._own[edit.id] for edit in edits if edit.id in self._own}
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
                self._own[edit.id] = tuple(
                    solve_part(part, edit.settings, frames.get(Place.of(part.coordinate))) for part in edit.parts
                )
            for part, solved in zip(edit.parts, self._own[edit.id], strict=True):
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

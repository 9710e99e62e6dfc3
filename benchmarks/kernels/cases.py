"""What a benchmark consists of: cases with rivals that do the same, and the checked, timed rows they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .timing import Ceilings, Parts, Timing, peak_bytes, race, race_in_parts

OURS = "timerome"


@dataclass(frozen=True)
class Rival:
    """One way to do the work.

    Attributes:
        call: does it once and returns the result.
        torch: counts as PyTorch's, so that the best of these is what ours is compared with.
        allowed: how wrong its result may be, where more is allowed than the case does for the others.
        parts: does it part by part, and is what is timed; for all rivals of a case or for none.
    """

    call: Callable[[], Any]
    torch: bool = True
    allowed: float | None = None
    parts: Parts | None = None


@dataclass(frozen=True)
class Case:
    """One line of a benchmark.

    Attributes:
        rivals: by name; ours start with ``timerome``.
        error: how wrong a result is, 0 for perfect; called on the result of each rival before timing.
        allowed: the largest error with which a rival is timed.
        nbytes, operations: what the work needs at least, each input read once and each output written once.
        least: rounds of timing at least, whatever they take; more where a small difference matters.
    """

    rivals: dict[str, Rival]
    error: Callable[[Any], float]
    allowed: float
    nbytes: float
    operations: float
    least: int = 5


@dataclass(frozen=True)
class Setup:
    """Where a benchmark runs."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Make a new generator, one a case: its inputs are the same whatever ran before it."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def randn(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Draw normal numbers in float32."""
        return torch.randn(*shape, generator=generator, device=self.device)


@dataclass
class Benchmark:
    """A benchmark of one op.

    Attributes:
        name: of the op.
        columns: names of a case's sizes, in order.
        cases: sizes of every case, from a setup and a size of grid: ``quick``, ``normal`` or ``full``.
        make: the case of such sizes.
        axis: the column that a plot has on its x axis.
        lines: the column whose values are the lines of a plot; the others tell its panels apart.
    """

    name: str
    columns: tuple[str, ...]
    cases: Callable[[Setup, str], Iterator[tuple[Any, ...]]]
    make: Callable[..., Case]
    axis: str
    lines: str


def rows_of(sizes: dict[str, Any], case: Case, setup: Setup, ceilings: Ceilings, budget: float) -> list[dict[str, Any]]:
    """Check the rivals of a case against each other's truth, then time them: one row each.

    A rival that cannot run here, or whose result is too wrong, gets a row that says so and no time.
    """
    fit: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, rival in case.rivals.items():
        try:
            errors[name] = case.error(rival.call())
        except Exception as error:  # a rival may fail in any way: it is another's code
            if name.startswith(OURS):
                raise
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            continue
        allowed = case.allowed if rival.allowed is None else rival.allowed
        if errors[name] <= allowed:
            fit[name] = rival.call
        elif name.startswith(OURS):
            raise AssertionError(f"{name} is wrong by {errors[name]:.2g} (allowed: {allowed:.2g}) at {sizes}.")
        else:
            refused[name] = f"wrong by {errors[name]:.2g}"
    parts = {name: rival.parts for name, rival in case.rivals.items() if name in fit and rival.parts is not None}
    rounds: dict[str, Any] = {"budget": budget, "least": case.least}
    timed = race_in_parts(parts, setup.device, **rounds) if parts else race(fit, setup.device, **rounds)
    stock = [name for name in timed if case.rivals[name].torch]
    best = min(stock, key=lambda name: timed[name].median) if stock else None
    floor = ceilings.floor(case.nbytes, case.operations)
    rows = []
    for name in case.rivals:
        row: dict[str, Any] = {**sizes, "rival": name, "error": errors.get(name), "why_not": refused.get(name, "")}
        if name in timed:
            row |= _measured(timed[name], None if best is None else timed[best], floor)
            row["peak_bytes"] = peak_bytes(fit[name], setup.device)
            row["best_torch"] = best or ""
        rows.append(row)
    return rows


def _measured(timing: Timing, best: Timing | None, floor: float) -> dict[str, Any]:
    return {
        "median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "rounds": len(timing.samples),
        "of_floor": floor / timing.median, "speedup": None if best is None else best.over(timing),
    }  # fmt: skip

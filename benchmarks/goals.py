"""The goals of the kernels on a GPU, read off the benchmarks' tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def goals(out: Path, kind: str) -> list[str]:
    """Each goal with what was measured, as far as its case is in the tables."""
    found = []
    residual = _table(out / f"sparse_lowrank_residual.{kind}.csv", T="2048", d="4096", N="40", q="0.9")
    ungated = {rival: row for rival, row in residual.items() if row["gated"] == "none"}
    if ours := _fastest(ungated, "timerome"):
        if eager := _fastest(ungated, "eager"):
            found.append(_goal("edit, T 2048, N 40, times eager PyTorch", eager["median_s"] / ours["median_s"], 7.0))
        found.append(_goal("the same, in one-pass floors", 1 / ours["of_floor"], -2.5))
        if copy := ungated.get("copy of h"):
            found.append(f"the same, in copies of h: {ours['median_s'] / copy['median_s']:.2f}")
    closed = _table(out / f"sparse_lowrank_residual.{kind}.csv", T="2048", d="4096", N="40", q="0.9", gated="0.0")
    if row := closed.get("timerome"):
        found.append(_goal("no row passes the gate, in one-pass floors", 1 / row["of_floor"], -1.5))
        if copy := closed.get("copy of h"):
            found.append(f"the same, in copies of h: {row['median_s'] / copy['median_s']:.2f}")
    solvers = _table(out / f"ridge_cholesky.{kind}.csv", B="256", N="40", d="1024", ridges="1")
    if (ours := solvers.get("timerome")) and ours["speedup"]:
        found.append(_goal("256 systems of order 40, times torch.linalg", ours["speedup"], 3.0))
    for tokens in ("128", "512", "2048"):
        step = _table(out / f"step.{kind}.csv", model="LLaDA-8B", tokens=tokens, what="40")
        if (ours := step.get("timerome")) and ours["speedup"]:  # the median of ratios within rounds
            percent = 100 * (1 / ours["speedup"] - 1)
            found.append(_goal(f"memory in a step of LLaDA-8B's shapes, {tokens} tokens, percent", percent, -1.0))
    return found


def _goal(what: str, got: float, bar: float) -> str:
    """A negative bar is one from above."""
    met = got >= bar if bar > 0 else got <= -bar
    return (
        f"{what}: {got:.2f} (goal: {'at least' if bar > 0 else 'at most'} {abs(bar):g}, {'met' if met else 'MISSED'})"
    )


def _table(path: Path, **sizes: str) -> dict[str, dict[str, Any]]:
    """Rows of such sizes by rival; of several, which differ in a size not given, the first."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["median_s"] and all(row[column] == value for column, value in sizes.items()):
                    numbers = {c: float(row[c]) if row[c] else None for c in ("median_s", "speedup", "of_floor")}
                    found.setdefault(row["rival"], row | numbers)
    return found


def _fastest(rows: dict[str, dict[str, Any]], prefix: str) -> dict[str, Any] | None:
    fitting = [row for rival, row in rows.items() if rival.startswith(prefix)]
    return min(fitting, key=lambda row: row["median_s"]) if fitting else None

"""``timerome bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..progress import Progress
from .console import say, table


def bench(
    progress: Progress,
    ops: list[Literal["sparse_lowrank_residual", "sparsify_add", "ridge_cholesky", "cholesky_rows", "step"]]
    | None = None,
    out: Path = Path("timerome-bench"),
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    grid: Literal["quick", "normal", "full"] = "quick",
    budget: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the compiled operations against PyTorch's on this machine; every result is checked before it is timed.

    Args:
        progress: shows how far it is.
        ops: which benchmarks, as a list; sparse_lowrank_residual by default.
        out: folder for a CSV file, what it was measured on, and a plot, each; a stopped run goes on from there.
        device: cpu or cuda.
        dtype: of hidden states, keys and values; float32 on the CPU and bfloat16 on a GPU by default.
        grid: quick takes a minute, normal half an hour, full a day on two cores.
        budget: seconds a case.
        seed: of the inputs.
    """
    from ..bench import BENCHMARKS, run

    found: dict[str, Any] = {}
    for name in ops or ["sparse_lowrank_residual"]:
        rows = run(name, out, device=device, dtype=dtype, grid=grid, budget=budget, seed=seed, progress=progress)
        columns = BENCHMARKS[name].columns
        table(name, (*columns, "", "ms", "quartiles", "times the best of PyTorch", "of the floor", "peak MB"), [
            (*(str(row[c]) for c in columns), row["rival"], *_cells(row)) for row in rows
        ])  # fmt: skip
        found[name] = rows
    say(f"results: {out}")
    return found


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row.get("median_s") is None:
        return (row["why_not"], "", "", "", "")
    speedup = row.get("speedup")
    return (
        f"{row['median_s'] * 1e3:.3f}", f"{row['low_s'] * 1e3:.3f} to {row['high_s'] * 1e3:.3f}",
        "" if speedup is None else f"{speedup:.2f}", f"{row['of_floor']:.2f}", f"{row['peak_bytes'] / 1e6:.1f}",
    )  # fmt: skip

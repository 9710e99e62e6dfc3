"""Run benchmarks: rows into a CSV file as they come, what they were measured on beside it, and a plot."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from timerome._backend import backend_info
from timerome._files import write_text
from timerome.progress import SILENT, Progress

from .cases import Benchmark, Setup, rows_of
from .lowrank import EPILOGUE, LOWRANK
from .plot import draw
from .solvers import CHOLESKY_ROWS, RIDGE_CHOLESKY
from .step import STEP
from .timing import Ceilings

BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (LOWRANK, EPILOGUE, RIDGE_CHOLESKY, CHOLESKY_ROWS, STEP)}
MEASURED = (
    "median_s",
    "low_s",
    "high_s",
    "rounds",
    "speedup",
    "best_torch",
    "of_floor",
    "peak_bytes",
    "error",
    "why_not",
)


def run(
    name: str,
    out: Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    grid: str = "normal",
    budget: float = 1.0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Run one benchmark.

    Args:
        name: one of ``BENCHMARKS``.
        out: folder for ``NAME.DEVICE.csv``, ``.json`` (device, versions, threads, ceilings, date) and ``.png``. Rows
            that are there, measured with the same versions on the same device, are not measured again.
        device: cpu or cuda.
        dtype: of hidden states, keys and values; float32 on the CPU and bfloat16 on a GPU by default.
        grid: quick, normal or full.
        budget: seconds a case.
        seed: of the inputs.
        progress: shows how far it is.

    Returns:
        One row for each case and rival: sizes, seconds (median and quartiles), ``speedup`` over the fastest of
        PyTorch's (its seconds over these, a median over rounds), ``of_floor`` (what the device's measured copy and
        product speeds allow at best, over these seconds), bytes at the peak, error.

    Raises:
        ValueError: there is no such benchmark, device, dtype or grid.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"kernels: expected one of {', '.join(BENCHMARKS)}, got {name!r}.")
    if grid not in ("quick", "normal", "full"):
        raise ValueError(f"kernels: expected grid quick, normal or full, got {grid!r}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"kernels: {device!r} is not there; torch {torch.__version__} sees no CUDA device.")
    benchmark, where = BENCHMARKS[name], torch.device(device)
    kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if kind not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"kernels: expected dtype float32, bfloat16 or float16, got {dtype!r}.")
    setup = Setup(where, getattr(torch, kind), seed)
    about = _about(where, kind, seed)
    path = out / f"{name}.{where.type}.csv"
    done = _read(path, about)
    wanted = list(benchmark.cases(setup, grid))
    ceilings = Ceilings.measure(where, setup.dtype)
    rows: list[dict[str, Any]] = []
    with progress.task(name, total=len(wanted)) as step, torch.inference_mode():
        for values in wanted:
            key = tuple(str(v) for v in values)
            if key not in done:
                sizes = dict(zip(benchmark.columns, values, strict=True))
                done[key] = rows_of(sizes, benchmark.make(setup, *values), setup, ceilings, budget)
                _write(path, benchmark, done, about | {"ceilings": vars(ceilings), "grid": grid})
            rows += done[key]
            step(1)
    draw(path.with_suffix(".png"), benchmark, rows, about)
    return rows


def _about(device: torch.device, dtype: str, seed: int) -> dict[str, Any]:
    cuda = device.type == "cuda"
    info = backend_info()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "driver": info["cuda_driver"] if cuda else None,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seed": seed,
        "versions": info["versions"],
        "compiled": info["compiled"],
    }


def _processor() -> str:
    """The processor's name where the system tells it, what tells its generation, and its cores."""
    try:
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        told = {key.strip(): value.strip() for key, _, value in lines}
        name = f"{told['model name']} (family {told['cpu family']}, model {told['model']})"
    except (OSError, KeyError):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _read(path: Path, about: dict[str, Any]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows of an earlier run of the same kind, by case."""
    beside = path.with_suffix(".json")
    if not path.exists() or not beside.exists():
        return {}
    before = json.loads(beside.read_text())
    if any(before.get(key) != json.loads(json.dumps(value)) for key, value in about.items()):
        return {}
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        sizes = list(reader.fieldnames or ())[: -len(MEASURED) - 1]
        for row in reader:
            texts = {"best_torch", "why_not", "rival", *sizes}
            parsed = {k: v if k in texts else (float(v) if v else None) for k, v in row.items()}
            found.setdefault(tuple(row[s] for s in sizes), []).append(parsed)
    return found


def _write(
    path: Path, benchmark: Benchmark, rows: dict[tuple[str, ...], list[dict[str, Any]]], about: dict[str, Any]
) -> None:  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, [*benchmark.columns, "rival", *MEASURED], restval="", lineterminator="\n")
    writer.writeheader()
    for group in rows.values():
        for row in group:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) and k in MEASURED else v for k, v in row.items()})
    write_text(path, text.getvalue())
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    write_text(path.with_suffix(".json"), json.dumps(about | {"date": date}, indent=1) + "\n")

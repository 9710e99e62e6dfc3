"""Run one benchmark; CSV, plot and what it was measured on go to benchmarks/results."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from timerome.progress import Progress

from . import BENCHMARKS, run


def main() -> None:
    """Run it and print how our rows compare with the best of PyTorch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--grid", default="normal", choices=("quick", "normal", "full"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = run(
        args.name, args.out, device=args.device, dtype=args.dtype, grid=args.grid, budget=args.budget,
        progress=Progress(),
    )  # fmt: skip
    ours = [row for row in rows if row["rival"] == "timerome" and row.get("speedup")]
    ours.sort(key=lambda row: float(row["speedup"]))
    for row in ours if len(ours) < 6 else (*ours[:3], *ours[-3:]):
        sizes = ", ".join(f"{k} {v}" for k, v in row.items() if k in BENCHMARKS[args.name].columns)
        print(f"{row['speedup']:.2f} times the best of PyTorch ({row['best_torch']}) at {sizes}")


if __name__ == "__main__":
    main()

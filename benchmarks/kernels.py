"""The command line that the bench scripts share: :mod:`timerome.bench` with results beside the repository's others."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from timerome.bench import BENCHMARKS, run
from timerome.progress import Progress

RESULTS = Path(__file__).parent / "results"


def main(name: str) -> None:
    """Run one benchmark and print how our rows compare with the best of PyTorch."""
    parser = argparse.ArgumentParser(description=f"{name}: ours against PyTorch's.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--grid", default="normal", choices=("quick", "normal", "full"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = run(
        name, args.out, device=args.device, dtype=args.dtype, grid=args.grid, budget=args.budget, progress=Progress()
    )
    ours = [row for row in rows if row["rival"] == "timerome" and row.get("speedup")]
    ours.sort(key=lambda row: float(row["speedup"]))
    for row in ours if len(ours) < 6 else (*ours[:3], *ours[-3:]):
        sizes = ", ".join(f"{k} {v}" for k, v in row.items() if k in BENCHMARKS[name].columns)
        print(f"{row['speedup']:.2f} times the best of PyTorch ({row['best_torch']}) at {sizes}")

"""Tune every trained baseline on the validation split, then apply it to TOFU forget01 and measure it. Resumable.

    python -m benchmarks.baselines.run [--methods npo lora ...] [--out benchmarks/baselines/results/testbed.json]

Tuning: a quarter of ``validation_forget`` is forgotten, half of ``validation_retain`` says what it cost; the
configuration with the least ``remaining + lost`` (see ``Criterion``) is taken. Every method has as many configurations
and the same budget. Reported: ``forget``, its paraphrases, and held-out facts, which no method has seen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

import timerome as tr
from benchmarks.measure import Measuring, spread
from benchmarks.results import Results, about
from timerome.splits import demo_split

from .methods import GRIDS, TAUS, fit, retain_rows
from .training import Budget, Criterion

OUT = Path(__file__).parent / "results" / "testbed.json"
TUNING = Budget(steps=30, check_every=10, patience=2)
FINAL = Budget(steps=80, check_every=10, patience=2)
WATCHED = 16  # retain rows that the stopping rule looks at


def tuned(results: Results, backbone: tr.Backbone, name: str) -> dict[str, Any]:
    """Return the best configuration of a method on the validation split."""
    split = demo_split()
    forget, retain = split.validation_forget[::4], retain_rows(split)
    stopping = Criterion.of(backbone, forget, spread(split.protect, WATCHED))
    validation = Criterion.of(backbone, forget, split.validation_retain[::2], estimator="elbo_sum", samples=4)
    depends = {"budget": asdict(TUNING), "forget": forget.ids, "samples": 4}
    scores = []
    for config in GRIDS[name]:

        def measure(config: dict[str, Any] = config) -> dict[str, Any]:
            trained = fit(name, config, backbone, forget, retain, TUNING, stopping)
            return {"validation": validation(trained.backbone), **trained.to_dict()}

        found = results.row(f"tune/{name}/{_text(config)}", depends, measure)["validation"]
        scores.append(found["remaining"] + found["lost"])
    return GRIDS[name][scores.index(min(scores))]


def final(
    results: Results, measuring: Measuring, name: str, config: dict[str, Any], key: str, keep: Path | None
) -> None:  # fmt: skip
    """Apply a method to the forget set until it has converged and measure it; keep its weights in a folder, if any."""
    backbone, split = measuring.backbone, demo_split()

    def measure() -> dict[str, Any]:
        stopping = Criterion.of(backbone, split.forget, spread(split.protect, WATCHED))
        trained = fit(name, config, backbone, split.forget, retain_rows(split), FINAL, stopping)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            save_model(trained.backbone.model, str(keep / f"{key.replace('/', '.')}.safetensors"))
        return {"config": config, **trained.to_dict(), "sets": measuring(trained.backbone)}

    results.row(key, {"budget": asdict(FINAL), "config": config, "protocol": measuring.protocol()}, measure)


def _text(config: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in config.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(GRIDS), default=list(GRIDS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--sweep", action="store_true", help="also the τ sweep of masked diffusion unlearning")
    parser.add_argument("--keep", type=Path, help="folder for the trained weights")
    parser.add_argument("--tune-only", action="store_true")
    parser.add_argument("--configs", type=Path, help="results file of an earlier run whose choices are taken over")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tr.load(args.model)
    results = Results(args.out, about(backbone, seed=0))
    measuring = Measuring(backbone)
    for name in args.methods:
        if args.configs is not None:
            config = json.loads(args.configs.read_text())["rows"][f"final/{name}"]["found"]["config"]
        else:
            config = tuned(results, backbone, name)
        if args.tune_only:
            continue
        final(results, measuring, name, config, f"final/{name}", args.keep)
        if name == "masked_diffusion_unlearning" and args.sweep:
            for tau in TAUS:
                final(results, measuring, name, config | {"tau": tau}, f"sweep/{name}/tau {tau}", args.keep)


if __name__ == "__main__":
    main()

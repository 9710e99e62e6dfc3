"""Is a planted circuit found, and is nothing claimed where there is none?

    python -m benchmarks.tracing.planted [--models 100]

Each model (``tests/tracing/circuits.py``) is made, traced and judged by ``TraceResult.claim`` at 5 % and a tenth of the
total effect. Found means that the claimed coordinate is the planted one in layer, module, step and role.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest

from benchmarks.results import Results, about
from tests.tracing.circuits import Planting, traced

RESULTS = Path(__file__).parent / "results"


def judged(planting: Planting) -> dict[str, object]:
    """What the trace of one model claims."""
    trace = traced(planting)
    p_values, best = trace.p_values(least=0.1), trace.best()
    claim = trace.claim()
    return {
        "planted": None if planting.module is None else str(planting.coordinate),
        "claimed": None if claim is None else str(claim),
        "largest": str(best),
        "effect": float(trace.at(best).mean()),
        "p_corrected": float(p_values[trace.index(best)]),
        "above_random_site": int((p_values <= 0.05).sum()),
        "coordinates": int(np.isfinite(p_values).sum()),
        "facts": len(trace.facts),
        "recalled": int(trace.recalled.sum()),
    }


def exact(successes: int, n: int) -> list[float]:
    """Clopper and Pearson's 95 % interval of a share."""
    found = binomtest(successes, n).proportion_ci(method="exact")
    return [found.low, found.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100)
    models = parser.parse_args().models
    torch.set_num_threads(1)
    results = Results(RESULTS / "planted.json", about(None, seed=0))
    found: dict[str, list[dict[str, object]]] = {"planted": [], "without": []}
    for kind in found:
        for seed in range(models):
            planting = Planting.random(seed, circuit=kind == "planted")
            found[kind].append(results.row(f"{kind} {seed}", {}, lambda p=planting: judged(p)))
    hits = sum(row["claimed"] == row["planted"] for row in found["planted"])
    quiet = sum(row["claimed"] is None for row in found["without"])
    summary = {
        "planted": models, "found": hits, "found_interval": exact(hits, models),
        "without": models, "nothing_claimed": quiet, "nothing_claimed_interval": exact(quiet, models),
        "any_coordinate_called": sum(row["above_random_site"] > 0 for row in found["without"]),
    }  # fmt: skip
    results.save(summary=summary)
    print(summary)


if __name__ == "__main__":
    main()

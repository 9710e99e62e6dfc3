"""What batching, shared prefixes and pruning save against the plain loop, and whether the numbers stay the same.

    python -m benchmarks.tracing.speed [--quick]

The plain loop is one row a forward: for each draw, site, step and role a whole denoising run from step 0, restoring by
a hook; the clean run and each draw's corrupted run are made once. It does not measure the random-site control, which
the tracer does. Times are CPU seconds of one thread (the machine is shared), all of a fact's in one run one after the
other. ``pruned`` drops coordinates at an error probability of 0.05 a fact.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import timerome as tr
from benchmarks.results import Clock, Results, about
from tests.tracing import naive
from timerome.diffusion import SamplerConfig, encode
from timerome.facts import Fact, FactSet
from timerome.splits import bundled_facts
from timerome.tracing.corrupted_inputs import corrupted_inputs

RESULTS = Path(__file__).parent / "results"
DRAWS, ERROR = 10, 0.05


def plain_loop(backbone: tr.Backbone, fact: Fact, window: str, sampler: SamplerConfig, draws: int) -> np.ndarray:
    """TIE of every coordinate of one fact, ``(N, s, R)``."""
    sequence, mask_id = encode(backbone, fact), backbone.mask_id
    sites, roles = backbone.sites(), ("subject_last", "object")
    inputs = corrupted_inputs(backbone, [sequence], "noise", noise_scale=3.0, draws=draws, seed=0)[0]
    clean = naive.denoise(backbone, sequence, sequence.masked(mask_id), sampler, record=sites)
    clean_score = naive.score(*clean[:2], sequence, mask_id)
    corrupted = [naive.denoise(backbone, sequence, given.ids, sampler, given.noise) for given in inputs]
    corrupted_score = np.mean([naive.score(*run[:2], sequence, mask_id) for run in corrupted], axis=0)
    found = np.full((len(sites), len(clean_score), len(roles)), np.nan)
    for n, site in enumerate(sites):
        for step in range(len(clean_score) - 1):
            for r, role in enumerate(roles):
                restore = naive.restoring(backbone, sequence, clean, window, site, role, step)
                scores = [
                    naive.score(
                        *naive.denoise(backbone, sequence, given.ids, sampler, given.noise, site, restore)[:2],
                        sequence, mask_id,
                    )
                    for given in inputs
                ]  # fmt: skip
                later = slice(step + 1, None)
                total = (clean_score - corrupted_score)[later].mean()
                found[n, step, r] = (np.mean(scores, axis=0) - corrupted_score)[later].mean() / total
    return found


def traced(
    backbone: tr.Backbone, fact: Fact, prune: float | None = None, **options: Any
) -> tuple[tr.TraceResult, float]:
    """A fact's trace, and its CPU seconds."""
    with Clock().running() as clock:
        trace = tr.CausalTracer(backbone, prune=prune, **options).trace([fact])
    return trace, clock.cpu


def against_the_plain_loop(backbone: tr.Backbone, fact: Fact, window: str, steps: int, draws: int) -> dict[str, Any]:
    options = {"window": window, "sampler": SamplerConfig(steps=steps), "draws": draws}
    with Clock().running() as clock:
        wanted = plain_loop(backbone, fact, window, options["sampler"], draws)
    full, full_seconds = traced(backbone, fact, **options)
    pruned, pruned_seconds = traced(backbone, fact, ERROR, **options)
    return {
        "tokens": len(encode(backbone, fact).ids), "coordinates": int(np.isfinite(wanted).sum()), "draws": draws,
        "plain": clock.cpu, "batched": full_seconds, "pruned": pruned_seconds,
        "times_faster": clock.cpu / full_seconds, "times_faster_pruned": clock.cpu / pruned_seconds,
        "largest_difference": float(np.nanmax(np.abs(full.tie[0][:, : wanted.shape[1]] - wanted))),
        "same_choice": full.best("per_fact") == pruned.best("per_fact"),
    }  # fmt: skip


def in_double_precision(fact: Fact, window: str, steps: int) -> dict[str, Any]:
    backbone = tr.load("testbed")
    backbone.model.double()
    sampler = SamplerConfig(steps=steps)
    wanted = plain_loop(backbone, fact, window, sampler, 2)
    full, _ = traced(backbone, fact, window=window, sampler=sampler, draws=2)
    return {"largest_difference": float(np.nanmax(np.abs(full.tie[0][:, : wanted.shape[1]] - wanted)))}


def same_choice(backbone: tr.Backbone, fact: Fact, window: str, steps: int) -> dict[str, Any]:
    options = {"window": window, "sampler": SamplerConfig(steps=steps), "draws": DRAWS}
    full, full_seconds = traced(backbone, fact, **options)
    if not full.facts:
        return {"not_traceable": full.not_traceable[fact.id]}
    pruned, pruned_seconds = traced(backbone, fact, ERROR, **options)
    one, other = (trace.best("per_fact")[fact.id] for trace in (full, pruned))
    draws = pruned.draws()
    return {
        "full": str(one), "pruned": str(other), "same": one == other,
        "loss": float(full.at(one)[0] - full.at(other)[0]),
        "draws_made": float(np.isfinite(draws).sum() / np.isfinite(full.draws()).sum()),
        "batched": full_seconds, "pruned_seconds": pruned_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer facts")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    backbone = tr.load("testbed")
    results = Results(RESULTS / "speed.json", about(backbone, seed=0))
    # An answer of one token takes one step, and nothing comes later.
    relations = [f for f in bundled_facts("relations") if int(encode(backbone, f).canvas.sum()) > 1]
    spread = FactSet(relations[i * len(relations) // 20] for i in range(20))
    tofu = FactSet(sorted(bundled_facts("forget01"), key=lambda fact: len(fact.object))[:10])
    with torch.inference_mode():
        plain, choices = [], []
        for window in ("from", "single"):
            for fact in (*spread[: 1 if quick else 2], tofu[0]):
                plain.append(
                    results.row(
                        f"plain {window} {fact.id}", {"draws": DRAWS},
                        lambda f=fact, w=window: against_the_plain_loop(backbone, f, w, 4, DRAWS),
                    )
                )  # fmt: skip
        for window in ("from", "single"):
            results.row(f"double {window}", {}, lambda w=window: in_double_precision(spread[0], w, 4))
        for window in ("from", "single"):
            for fact in (*spread, *tofu)[: 5 if quick else 30]:
                choices.append(
                    results.row(
                        f"choice {window} {fact.id}", {"draws": DRAWS},
                        lambda f=fact, w=window: same_choice(backbone, f, w, 4),
                    )
                )  # fmt: skip
    traceable = [row for row in choices if "same" in row]
    summary = {
        "times_faster": [round(row["times_faster"], 1) for row in plain],
        "times_faster_pruned": [round(row["times_faster_pruned"], 1) for row in plain],
        "times_faster_together": sum(r["plain"] for r in plain) / sum(r["batched"] for r in plain),
        "times_faster_pruned_together": sum(r["plain"] for r in plain) / sum(r["pruned"] for r in plain),
        "largest_difference": max(row["largest_difference"] for row in plain),
        "facts_and_windows": len(traceable),
        "same_choice": sum(row["same"] for row in traceable) / len(traceable),
        "largest_loss": max(row["loss"] for row in traceable),
        "draws_made": float(np.mean([row["draws_made"] for row in traceable])),
    }
    results.save(summary=summary)
    print(summary)


if __name__ == "__main__":
    main()

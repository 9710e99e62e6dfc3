"""What batching, shared prefixes and pruning save against the plain loop, and whether the numbers stay the same.

    python -m benchmarks.tracing.speed [--quick]

The plain loop is one row a forward: for each draw, site, step and role a whole denoising run from step 0, restoring by
a hook, and the same for both controls (random sites, permuted steps), as the tracer measures them too; the clean run
and each draw's corrupted run are made once. ``times_faster_sites`` leaves the plain loop's controls out, and so counts
against the tracer what it does beside. Times are CPU seconds of one thread (the machine is shared), all of a fact's in
one run one after the other. ``pruned`` drops coordinates at an error probability of 0.05 a fact; how it does so was
settled on other facts than these. ``floor`` is what the tracer's forwards alone would take in the batch size that suits
the model best, without hooks, unembedding, scores or sampling: nothing that runs the same rows through this model as it
is can be faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import timerome as tr
from benchmarks.results import Clock, Results, about
from tests.tracing import naive
from timerome.diffusion import Encoded, SamplerConfig, encode
from timerome.facts import Fact
from timerome.functional.corruption import seeded_generator
from timerome.functional.effects import TIED
from timerome.splits import bundled_facts
from timerome.tracing.corrupted_inputs import corrupted_inputs
from timerome.tracing.forwards import logits_at
from timerome.tracing.one_fact import OneFact
from timerome.tracing.runs import FactRuns

RESULTS = Path(__file__).parent / "results"
DRAWS, ERROR = 10, 0.05
ROLES = ("subject_last", "object")


class PlainLoop:
    """One fact's trace, one run after the other."""

    def __init__(self, backbone: tr.Backbone, fact: Fact, window: str, sampler: SamplerConfig, draws: int) -> None:
        self.backbone, self.window, self.sampler = backbone, window, sampler
        self.sequence = encode(backbone, fact)
        self.inputs = corrupted_inputs(backbone, [self.sequence], "noise", noise_scale=3.0, draws=draws, seed=0)[0]
        masked = self.sequence.masked(backbone.mask_id)
        self.clean = naive.denoise(backbone, self.sequence, masked, sampler, record=backbone.sites())
        self.clean_score = self.score(self.clean)
        self.corrupted_score = np.mean([self.score(self.run(draw)) for draw in range(draws)], axis=0)

    def run(self, draw: int, site: tr.Site | None = None, restore: Callable[..., Any] | None = None) -> Any:
        given = self.inputs[draw]
        return naive.denoise(self.backbone, self.sequence, given.ids, self.sampler, given.noise, site, restore)

    def score(self, run: Any) -> Any:
        return naive.score(*run[:2], self.sequence, self.backbone.mask_id)

    def effect(self, step: int, restored: Callable[[int], tuple[tr.Site, Callable[..., Any]]]) -> float:
        """TIE of what each draw restores: a site, and what there."""
        mean = np.mean([self.score(self.run(draw, *restored(draw))) for draw in range(len(self.inputs))], axis=0)
        later = slice(step + 1, None)
        total = (self.clean_score - self.corrupted_score)[later].mean()
        return float((mean - self.corrupted_score)[later].mean() / total)

    def coordinate(self, site: tr.Site, role: str, step: int) -> float:
        restore = naive.restoring(self.backbone, self.sequence, self.clean, self.window, site, role, step)
        return self.effect(step, lambda draw: (site, restore))

    def coordinates(self) -> np.ndarray:
        """TIE of every coordinate, ``(N, s, R)``."""
        steps = range(len(self.clean_score) - 1)
        return np.array(
            [[[self.coordinate(n, r, s) for r in ROLES] for s in steps] for n in self.backbone.sites()]
        )  # fmt: skip

    def random_sites(self, drawn: Callable[[int, int, str], tuple[tr.Site, torch.Tensor]]) -> np.ndarray:
        """TIE of the random-site control, ``(s, R)``; ``drawn`` gives the site and positions of (draw, step, role)."""

        def restored(draw: int, step: int, role: str) -> tuple[tr.Site, Callable[..., Any]]:
            site, positions = drawn(draw, step, role)
            active = naive.RESTORES[self.window]
            return site, lambda now, ids: (positions, self.clean[2][now][site]) if active(now, step) else None

        steps = range(len(self.clean_score) - 1)
        return np.array([[self.effect(s, lambda d, s=s, r=r: restored(d, s, r)) for r in ROLES] for s in steps])

    def permuted_steps(self, best: tr.Coordinate) -> float:
        """TIE of a coordinate with the activations of other steps."""
        steps = len(self.clean_score)

        def restored(draw: int) -> tuple[tr.Site, Callable[..., Any]]:
            generator = seeded_generator(0, "permuted steps", self.sequence.fact_id, draw)
            shift = int(torch.randint(1, steps, (1,), generator=generator))
            outputs = [self.clean[2][(step + shift) % steps] for step in range(steps)]
            shifted = (self.clean[0], self.clean[1], outputs)
            restore = naive.restoring(
                self.backbone, self.sequence, shifted, self.window, best.site, best.role, best.step
            )
            return best.site, restore

        return self.effect(best.step, restored)


def traced(
    backbone: tr.Backbone, fact: Fact, prune: float | None = None, **options: Any
) -> tuple[tr.TraceResult, float, float]:
    """A fact's trace, its CPU seconds, and how many forwards of one row its runs cost."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.jsonl"
        with Clock().running() as clock:
            trace = tr.CausalTracer(backbone, tr.TraceConfig(prune=prune, **options)).trace([fact], checkpoint=kept)
        return trace, clock.cpu, json.loads(kept.read_text().splitlines()[-1]).get("forward_rows", 0.0)


def row_floor(backbone: tr.Backbone, sequence: Encoded) -> float:
    """CPU seconds of a row's forward, unhooked and without the unembedding, in the batch size that suits it best."""
    ids, nowhere, best = sequence.masked(backbone.mask_id), torch.zeros(1, dtype=torch.bool), np.inf
    for size in (4, 8, 16, 32, 64, 128):
        batch = ids.expand(size, -1).contiguous()
        for _ in range(3):
            with Clock().running() as clock:
                logits_at(backbone, batch, sequence.canvas, nowhere.expand_as(batch))
            best = min(best, clock.cpu / size)
    return float(best)


def against_the_plain_loop(backbone: tr.Backbone, fact: Fact, window: str, steps: int, draws: int) -> dict[str, Any]:
    options: dict[str, Any] = {"window": window, "sampler": SamplerConfig(steps=steps), "draws": draws}
    full, full_seconds, rows = traced(backbone, fact, **options)
    pruned, pruned_seconds, rows_pruned = traced(backbone, fact, ERROR, **options)
    sequence = encode(backbone, fact)
    runs = FactRuns(backbone, sequence, int(sequence.canvas.sum()), tr.TraceConfig(**options))
    clean = runs.clean()
    one = OneFact(runs, backbone.sites(), [], full.steps)

    def drawn(draw: int, step: int, role: str) -> tuple[tr.Site, torch.Tensor]:
        control = one.random_site(runs, clean, draw, step, role)
        return control.sites[0], control.positions

    with Clock().running() as sites:
        loop = PlainLoop(backbone, fact, window, options["sampler"], draws)
        wanted = loop.coordinates()
    with Clock().running() as controls:
        random, permuted = loop.random_sites(drawn), loop.permuted_steps(full.best())
    last = wanted.shape[1]
    differences = [full.tie[0][:, :last] - wanted, full.control()[0][:last] - random, full.permuted[0, 1] - permuted]
    both, floor = sites.cpu + controls.cpu, row_floor(backbone, sequence)
    return {
        "tokens": len(sequence.ids), "answer": int(sequence.canvas.sum()),
        "coordinates": int(np.isfinite(wanted).sum()), "draws": draws,
        "plain": both, "plain_sites": sites.cpu, "batched": full_seconds, "pruned": pruned_seconds,
        "times_faster": both / full_seconds, "times_faster_pruned": both / pruned_seconds,
        "times_faster_sites": sites.cpu / full_seconds, "times_faster_sites_pruned": sites.cpu / pruned_seconds,
        "rows": rows, "rows_pruned": rows_pruned, "floor": rows * floor, "floor_pruned": rows_pruned * floor,
        "largest_difference": float(max(np.nanmax(np.abs(d)) for d in differences)),
        "same_choice": full.best("per_fact") == pruned.best("per_fact"),
    }  # fmt: skip


def in_double_precision(fact: Fact, window: str, steps: int) -> dict[str, Any]:
    backbone = tr.load("testbed")
    backbone.model.double()
    sampler = SamplerConfig(steps=steps)
    wanted = PlainLoop(backbone, fact, window, sampler, 2).coordinates()
    full, _, _ = traced(backbone, fact, window=window, sampler=sampler, draws=2)
    return {"largest_difference": float(np.nanmax(np.abs(full.tie[0][:, : wanted.shape[1]] - wanted)))}


def same_choice(backbone: tr.Backbone, fact: Fact, window: str, steps: int) -> dict[str, Any]:
    options = {"window": window, "sampler": SamplerConfig(steps=steps), "draws": DRAWS}
    full, full_seconds, _ = traced(backbone, fact, **options)
    if not full.facts:
        return {"not_traceable": full.not_traceable[fact.id]}
    pruned, pruned_seconds, _ = traced(backbone, fact, ERROR, **options)
    one, other = (trace.best("per_fact")[fact.id] for trace in (full, pruned))
    draws = pruned.draws()
    return {
        "full": str(one), "pruned": str(other), "same": one == other,
        "loss": float(full.at(one)[0] - full.at(other)[0]),
        "draws_made": float(np.isfinite(draws).sum() / np.isfinite(full.draws()).sum()),
        "batched": full_seconds, "pruned_seconds": pruned_seconds,
    }  # fmt: skip


def summarised(plain: list[dict[str, Any]], choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of facts of one kind in a few numbers: how many times less CPU, and how often pruning chose the same."""
    traceable = [row for row in choices if "same" in row]
    times = {
        name: {
            "least": round(min(row[name] for row in plain), 1),
            "most": round(max(row[name] for row in plain), 1),
            "together": round(
                sum(row["plain_sites" if "sites" in name else "plain"] for row in plain)
                / sum(row["pruned" if "pruned" in name else "batched"] for row in plain), 1,
            ),
        }
        for name in ("times_faster", "times_faster_pruned", "times_faster_sites", "times_faster_sites_pruned")
    }  # fmt: skip
    return {
        **times,
        "by_answer": [
            {
                "answer": row["answer"], "tokens": row["tokens"], "unpruned": round(row["times_faster"], 1),
                "unpruned_at_the_floor": round(row["plain"] / row["floor"], 1),
                "pruned": round(row["times_faster_pruned"], 1),
                "pruned_at_the_floor": round(row["plain"] / row["floor_pruned"], 1),
            }
            for row in sorted(plain, key=lambda row: row["tokens"])
        ],
        "compared": len(plain),
        "largest_difference": max(row["largest_difference"] for row in plain),
        "facts_and_windows": len(traceable),
        "same_choice": float(np.mean([row["same"] for row in traceable])),
        "same_or_tied": float(np.mean([row["loss"] <= TIED for row in traceable])),
        "largest_loss": max(row["loss"] for row in traceable),
        "draws_made": float(np.mean([row["draws_made"] for row in traceable])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer facts")
    parser.add_argument(
        "--only", default="", help="measure rows whose name has this in it; the others as they are kept"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tr.load("testbed")
    results = Results(RESULTS / "speed.json", about(backbone, seed=0))
    # An answer of one token takes one step, and nothing comes later.
    relations = [f for f in bundled_facts("relations") if int(encode(backbone, f).canvas.sum()) > 1]
    spread = [relations[i * len(relations) // 20] for i in range(20)]
    tofu = sorted(bundled_facts("forget01"), key=lambda fact: (int(encode(backbone, fact).canvas.sum()), fact.id))
    # Facts of one to four steps; TOFU's shortest answer, one of two dozen tokens, and a long one.
    compared = {
        "relations": [(fact, window) for fact in spread[:20:7] for window in ("from", "single")],
        "tofu": [(tofu[0], "from"), (tofu[0], "single"), (tofu[10], "from"), (tofu[30], "from")],
    }
    chosen = {
        "relations": [(fact, window) for window in ("from", "single") for fact in spread],
        "tofu": [(fact, window) for window in ("from", "single") for fact in tofu[::2]],
    }
    if args.quick:
        compared, chosen = ({kind: rows[:1] for kind, rows in sets.items()} for sets in (compared, chosen))

    def rows(
        name: str, facts: list[tuple[Fact, str]], measure: Callable[[Fact, str], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        found = []
        for fact, window in facts:
            key = f"{name} {window} {fact.id}"
            if args.only in key or key in results.rows:
                found.append(results.row(key, {"draws": DRAWS}, lambda f=fact, w=window: measure(f, w)))  # type: ignore[misc]
        return found

    summary: dict[str, Any] = {}
    with torch.inference_mode():
        traced(backbone, spread[0], ERROR, draws=DRAWS)  # what is loaded and set up once
        for kind in compared:
            plain = rows("plain", compared[kind], lambda f, w: against_the_plain_loop(backbone, f, w, 4, DRAWS))
            choices = rows("choice", chosen[kind], lambda f, w: same_choice(backbone, f, w, 4))
            if plain and choices:
                summary[kind] = summarised(plain, choices)
        if args.only in "double":
            for window in ("from", "single"):
                results.row(f"double {window}", {}, lambda w=window: in_double_precision(spread[0], w, 4))
    results.save(summary=summary)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()

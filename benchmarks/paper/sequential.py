"""Retain against the number of sequential edits, 1 to 50: ours, paper mode, and gradient ascent one fact at a time.

    python -m benchmarks.paper.sequential

Held out: a fixed sample of TOFU and relation facts. Earlier edits are measured again at every count: what was
forgotten first must still be forgotten last.
"""

from __future__ import annotations

import statistics as stats
from dataclasses import asdict
from typing import Any

import timerome as tr
from benchmarks.baselines.training import Budget, Criterion, train
from benchmarks.measure import Measuring, retain_delta, spread
from timerome.facts import FactSet
from timerome.splits import demo_split, scaling_split

from .common import Form, Run, depends, grown, markdown, start
from .scaling import FORMS

COUNTS = (1, 5, 10, 20, 35, 50)
ASCENT = {"lr": 3e-4}
A_FACT = Budget(steps=20, forget_rows=4, check_every=5, patience=1)


def measured(run: Run, facts: FactSet, count: int, backbone: tr.Backbone, memory: Any = None) -> dict[str, Any]:
    """Retain after ``count`` edits, and what is left of the first edits."""
    split = scaling_split(50)
    measuring = Measuring(
        run.backbone, forget=facts[: min(count, 10)], decoded=0, paraphrases=False,
        held_out={"held_out": spread(split.held_out, 24), "held_out_relations": spread(split.held_out_relations, 24)},
    )  # fmt: skip
    sets = measuring(backbone, memory)
    return {"retain": retain_delta(sets), "worst": sets["held_out"]["lowest"], "first": sets["forget"]["delta"]}


def ascent(run: Run, facts: FactSet, counts: tuple[int, ...]) -> dict[str, Any]:
    """Gradient ascent, a fact at a time, each from where the last one ended."""
    model, found, seconds = run.backbone, {}, 0.0
    kept = spread(demo_split().protect, 8)
    for i, fact in enumerate(facts, 1):
        alone = FactSet([fact])
        trained = train(model, "gradient_ascent", ASCENT, alone, kept, A_FACT, Criterion.of(model, alone, kept))
        model, seconds = trained.backbone, seconds + trained.clock.cpu
        if i in counts:
            found[str(i)] = measured(run, facts, i, model) | {"cpu_seconds": seconds}
    return found


def main() -> None:
    run, args = start("sequential", __doc__)
    counts = (1, 3) if args.quick else COUNTS
    facts = scaling_split(max(counts)).forget
    found: dict[str, dict[str, Any]] = {}
    for name, form in FORMS.items():

        def measure(form: Form = form) -> dict[str, Any]:
            rows, of = {}, grown(run.backbone, form)
            for count in counts:
                memory, clock = of(facts[:count])
                rows[str(count)] = measured(run, facts, count, run.backbone, memory) | clock.to_dict()
            return rows

        found[name] = run.row(name, {**depends(form), "counts": counts}, measure)
    found["gradient ascent, a fact at a time"] = run.row(
        "gradient ascent", {"config": ASCENT, "budget": asdict(A_FACT), "counts": counts},
        lambda: ascent(run, facts, counts),
    )  # fmt: skip
    table = [
        [name, n, f"{r['retain']:+.2f}", f"{r['worst']:+.1f}", f"{r['first']:+.1f}", f"{r['cpu_seconds']:.1f}"]
        for name, rows in found.items() for n, r in rows.items()
    ]  # fmt: skip
    columns = ["method", "edits", "retain Δ, nats", "worst held-out", "first ten edits Δ", "CPU s"]
    slopes = {
        name: stats.linear_regression([int(n) for n in rows], [r["retain"] for r in rows.values()]).slope
        for name, rows in found.items()
    }
    run.results.save(table={"columns": columns, "rows": table}, retain_nats_an_edit=slopes)
    run.plot(
        "sequential edits", "retain, change of log-probability, nats",
        {name: [(int(n), r["retain"]) for n, r in rows.items()] for name, rows in found.items()},
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

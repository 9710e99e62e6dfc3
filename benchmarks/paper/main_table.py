"""The main table: every method on forget01, and which of the trained ones ours dominates.

    python -m benchmarks.baselines.run --sweep      # first: the trained rows
    python -m benchmarks.paper.main_table

A method dominates another on the pair (forget, held-out retain) if it forgets at least as much and loses no more of
what is held out, and is better in one of them. Forgetting counts down to what the model says unasked: to push an
answer further below what was never known is no gain. Losses below a thousandth of a nat are none.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from benchmarks.baselines.run import OUT
from benchmarks.baselines.training import Criterion
from benchmarks.measure import Measuring, retain_delta, spread
from timerome.coordinates import Coordinate
from timerome.evaluation import NO_EDIT, Condition
from timerome.evaluation.baselines import training_free
from timerome.splits import demo_split

from .common import OURS, Form, Run, depends, edited, markdown, start


def remaining(found: dict[str, Any], before: list[float], unasked: list[float]) -> float:
    """Mean of what the forgotten facts still hold above the model that is not asked, nats."""
    gaps = [max(0.0, b + d - u) for b, d, u in zip(before, found["forget"]["deltas"], unasked, strict=True)]
    return sum(gaps) / len(gaps)


def dominates(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether ``a`` is at least as good as ``b`` in both numbers and better in one."""
    pairs = [(round(a[k], 3), round(b[k], 3)) for k in ("remaining", "lost")]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def measure_ours(run: Run, measuring: Measuring) -> dict[str, dict[str, Any]]:
    """Our memories and the baselines without training."""
    split, backbone = demo_split(), run.backbone
    found: dict[str, dict[str, Any]] = {}
    for name, form in OURS.items():

        def measure(form: Form = form) -> dict[str, Any]:
            memory, clock = edited(backbone, form, measuring.forget)
            sets = measuring(backbone, memory)
            return {**clock.to_dict(), "steps": 0, "backward_passes": 0, "bytes": memory.nbytes, "sets": sets}

        found[name] = run.row(name, {**depends(form), "protocol": measuring.protocol()}, measure)
    coordinate = Coordinate(3)

    @cache
    def free() -> dict[str, Condition]:
        made = training_free(backbone, measuring.forget, coordinate, spare=split.protect)
        return {condition.name: condition for condition in [NO_EDIT, *made]}

    for name in ("no edit", "random site", "prompt memory", "logit bias", "activation steering"):

        def free_row(name: str = name) -> dict[str, Any]:
            return {"steps": 0, "backward_passes": 0, "sets": measuring(backbone, free()[name])}

        found[name] = run.row(name, {"coordinate": str(coordinate), "protocol": measuring.protocol()}, free_row)
    return found


def main() -> None:
    run, args = start("main_table", __doc__)
    split = demo_split()
    measuring = Measuring(run.backbone, forget=spread(split.forget, 4) if args.quick else split.forget)
    rows = measure_ours(run, measuring)
    trained = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    same = {k: v for k, v in trained.items() if v["about"]["testbed"] == run.results.about["testbed"]}
    if missing := len(trained) - len(same):
        print(f"{missing} trained rows are of another testbed and are left out; run benchmarks.baselines.run again.")
    for key, row in same.items():
        kind, *name = key.split("/")
        if kind in ("final", "sweep") and not args.quick:
            rows[" ".join(name).replace("_", " ")] = row["found"]
    criterion = Criterion.of(
        run.backbone, measuring.forget, measuring.forget, estimator="elbo_sum", samples=measuring.samples
    )
    unasked, before = criterion.unasked.tolist(), criterion.before.tolist()
    points = {
        name: {"remaining": remaining(row["sets"], before, unasked), "lost": max(0.0, -retain_delta(row["sets"]))}
        for name, row in rows.items()
    }
    ours = list(OURS)[:2]
    table = []
    for name, row in rows.items():
        sets, verdict = row["sets"], []
        for mine in ours:
            if name not in ours:
                won, beaten = dominates(points[mine], points[name]), dominates(points[name], points[mine])
                verdict.append("dominated" if won else "dominates ours" if beaten else "incomparable")
        table.append([
            name, f"{sets['forget']['delta']:+.1f}", f"{sets['forget']['highest']:+.1f}",
            f"{sets['paraphrase']['delta']:+.1f}" if "paraphrase" in sets else None,
            f"{points[name]['remaining']:.1f}", f"{retain_delta(sets):+.3f}", f"{sets['held_out']['lowest']:+.1f}",
            f"{sets['held_out']['text_unchanged']:.0%}", f"{sets['forget']['rouge_recall']:.2f}",
            f"{sets['forget']['distinct2']:.2f}", None if "cpu_seconds" not in row else f"{row['cpu_seconds']:.1f}",
            row["backward_passes"], " / ".join(verdict),
        ])  # fmt: skip
    columns = [
        "method", "forget Δ, nats", "least forgotten", "unseen wordings Δ", "remaining above unasked",
        "held-out Δ", "held-out, worst", "held-out text same", "forget ROUGE-L", "distinct-2", "CPU s", "backward",
        "against ours: refusal / null",
    ]  # fmt: skip
    text = markdown(columns, table)
    run.results.save(table={"columns": columns, "rows": table}, points=points)
    run.plot(
        "lost on held-out facts, nats", "remaining above unasked, nats",
        {name: [(p["lost"], p["remaining"])] for name, p in points.items()},
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()

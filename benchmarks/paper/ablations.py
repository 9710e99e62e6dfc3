"""What each part of the method does: ridge, sparsity, gate, protection, coordinate, rank, estimator.

    python -m benchmarks.paper.ablations

On half of forget01, with a third of the negatives and four states a fact, so that the whole table takes a few minutes;
compare rows with each other, not with the main table.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from benchmarks.baselines.methods import REFUSAL
from benchmarks.measure import Measuring, retain_delta, spread
from timerome.coordinates import Coordinate
from timerome.demo import Setting
from timerome.evaluation.baselines import random_coordinate
from timerome.memory import BankConfig
from timerome.splits import demo_split

from .common import OURS, edited, markdown, start

BANK = BankConfig(canvases=(None,))
NULL = replace(OURS["timerome, null (forgetting)"], bank=BANK)
PAPER = replace(OURS["paper mode"], bank=BANK)
REFUSE = replace(OURS["timerome, shipped (refusal)"], bank=BANK)
TINY_RIDGE = 1e-9  # ridge = 0 is refused: the system would be singular


def variants(elsewhere: Any, layers: int) -> dict[str, Setting]:
    """Settings by name; each changes one thing of the first of its family."""
    return {
        "null": NULL,
        "null, no ridge": replace(NULL, ridge=TINY_RIDGE),
        "null, no sparsity": replace(NULL, sparsity=0.0),
        "null, sparsity 0.9": replace(NULL, sparsity=0.9),
        "null, protection": replace(NULL, protect=True),
        "null, rank 4": replace(NULL, rank=4),
        "null, rank 16": replace(NULL, rank=16),
        "null, estimator corrupt": replace(NULL, estimator="corrupt"),
        f"null, random site {elsewhere.site}": replace(NULL, layer=elsewhere.layer, module=elsewhere.module),
        **{f"null, static block {i}": replace(NULL, layer=i) for i in range(layers) if i != NULL.layer},
        "no gate (paper mode)": PAPER,
        "no gate, no ridge": replace(PAPER, ridge=TINY_RIDGE),
        "no gate, no sparsity": replace(PAPER, sparsity=0.0),
        "no gate, protection": replace(PAPER, protect=True),
        "refusal, lens": REFUSE,
        "refusal, no ridge": replace(REFUSE, ridge=TINY_RIDGE),
        "refusal, no sparsity": replace(REFUSE, sparsity=0.0),
        "refusal, donor at block 3": replace(REFUSE, estimator="donor", layer=3),
        "refusal, block before the last": replace(REFUSE, layer=-2),
    }


def main() -> None:
    run, args = start("ablations", __doc__)
    split = demo_split()
    forget = spread(split.forget, 4 if args.quick else 20)
    demo = replace(split, calibrate=spread(split.calibrate, 120), protect=spread(split.protect, 40))
    held_out = {"held_out": spread(split.held_out, 30), "held_out_relations": spread(split.held_out_relations, 20)}
    measuring = Measuring(run.backbone, forget=forget, held_out=held_out, decoded=0)
    rows = {}
    elsewhere = random_coordinate(run.backbone, [Coordinate(i) for i in range(run.backbone.n_layers)])
    for name, setting in variants(elsewhere, run.backbone.n_layers).items():

        def measure(setting: Setting = setting) -> dict[str, Any]:
            memory, clock = edited(run.backbone, setting, forget, demo)
            sets = measuring(run.backbone, memory.attached(run.backbone))
            return {**clock.to_dict(), "bytes": memory.nbytes, "sets": sets}

        depends = {"setting": asdict(setting), "protocol": measuring.protocol(), "refusal": REFUSAL}
        rows[name] = run.row(name, depends, measure)
    table = [
        [
            name, f"{r['sets']['forget']['delta']:+.1f}", f"{r['sets']['forget']['highest']:+.1f}",
            f"{r['sets']['paraphrase']['delta']:+.1f}", f"{retain_delta(r['sets']):+.2f}",
            f"{r['sets']['held_out']['lowest']:+.1f}", f"{r['bytes'] / 2**20:.1f}",
        ]
        for name, r in rows.items()
    ]  # fmt: skip
    columns = [
        "variant", "forget Δ, nats", "least forgotten", "unseen wordings Δ", "held-out Δ", "held-out, worst",
        "memory, MB",
    ]  # fmt: skip
    run.results.save(table={"columns": columns, "rows": table})
    run.plot(
        "held-out Δ, nats", "forget Δ, nats",
        {name: [(retain_delta(r["sets"]), r["sets"]["forget"]["delta"])] for name, r in rows.items()},
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

"""Selectivity among neighbours: RWKU's limit of the published method.

    python -m benchmarks.paper.neighbours [--data DATA_DIR]

RWKU asks about people that the testbed was not taught, so its own score cannot be taken here. Measured instead:

- *same author*: five facts of each forget01 author are forgotten, the fifteen others must stay. They are the nearest
  neighbours there are, about the very same subject;
- *RWKU neighbours* (with ``--data``, a folder with ``rwku/neighbor_level2.json``): questions on neighbours of RWKU's
  targets, asked with forget01's memories attached. The model does not know the answers, but what is decoded must stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timerome as tr
from benchmarks.measure import Measuring, spread
from timerome.facts import FactSet
from timerome.splits import AUTHOR, demo_split

from .common import OURS, Form, depends, edited, markdown, start

PROMPTS = 24


def decode(backbone: tr.Backbone, prompts: list[str]) -> list[str]:
    return tr.generate(backbone, prompts, canvas=32, config=tr.SamplerConfig(steps=8))


def main() -> None:
    run, args = start("neighbours", __doc__, lambda parser: parser.add_argument("--data", type=Path))
    backbone, split = run.backbone, demo_split()
    first = FactSet(fact for i, fact in enumerate(split.forget) if i % AUTHOR < 5)
    rest = FactSet(fact for i, fact in enumerate(split.forget) if i % AUTHOR >= 5)
    rest = spread(rest, 4) if args.quick else rest
    measuring = Measuring(backbone, forget=first, held_out={"held_out": rest}, decoded=0, paraphrases=False)
    prompts, before = [], []
    if args.data is not None:
        records = json.loads((args.data / "rwku" / "neighbor_level2.json").read_text())
        n = 4 if args.quick else PROMPTS
        prompts = [records[i * len(records) // n]["query"] for i in range(n)]
        before = decode(backbone, prompts)
    rows = {}
    for name, form in OURS.items():

        def measure(form: Form = form) -> dict[str, Any]:
            memory, _ = edited(backbone, form, first)
            found: dict[str, Any] = {"sets": measuring(backbone, memory)}
            if prompts:
                with memory.attached():
                    after = decode(backbone, prompts)
                found["rwku_text_unchanged"] = sum(a == b for a, b in zip(after, before, strict=True)) / len(prompts)
            return found

        on = {**depends(form), "protocol": measuring.protocol(), "rwku": len(prompts)}
        rows[name] = run.row(name, on, measure)
    table = []
    for name, row in rows.items():
        stay = row["sets"]["held_out"]
        touched = sum(d < -0.1 for d in stay["deltas"]) / len(stay["deltas"])
        table.append([
            name, f"{row['sets']['forget']['delta']:+.1f}", f"{stay['delta']:+.1f}", f"{stay['lowest']:+.1f}",
            f"{touched:.0%}", f"{row['rwku_text_unchanged']:.0%}" if "rwku_text_unchanged" in row else None,
        ])  # fmt: skip
    columns = [
        "memory", "forgotten Δ, nats", "same author, others Δ", "worst", "others that lost over 0.1 nats",
        "RWKU neighbours: text unchanged",
    ]  # fmt: skip
    run.results.save(table={"columns": columns, "rows": table})
    run.plot(
        "same author, other facts Δ, nats", "forgotten Δ, nats",
        {n: [(r["sets"]["held_out"]["delta"], r["sets"]["forget"]["delta"])] for n, r in rows.items()},
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

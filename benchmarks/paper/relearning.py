"""In-context relearning: does a forgotten fact come back when its context tells of it?

    python -m benchmarks.paper.relearning

Before the question stands nothing; one or two other forgotten facts of the same author; or the fact itself, question
and answer. Reported is the answer's log-probability without and with each memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timerome as tr
from benchmarks.measure import spread
from timerome.diffusion import Encoded, encode, log_likelihood
from timerome.facts import Fact, FactSet
from timerome.splits import demo_split

from .common import OURS, Form, depends, edited, markdown, start

CONTEXTS = ("nothing", "one other fact", "two other facts", "the fact itself")


def with_context(backbone: tr.Backbone, fact: Fact, forget: Sequence[Fact], kind: str) -> Encoded:
    """Encode a fact after a context of a kind."""
    others = sorted((f for f in forget if f.group == fact.group and f.id != fact.id), key=lambda f: len(f.object))
    told = {
        "nothing": [], "one other fact": others[:1], "two other facts": others[:2], "the fact itself": [fact],
    }[kind]  # fmt: skip
    return encode(backbone, fact, context=" ".join(f"{f.prompt} {f.object}" for f in told))


def main() -> None:
    run, args = start("relearning", __doc__)
    backbone, split = run.backbone, demo_split()
    asked = spread(split.forget, 4 if args.quick else 16)
    others = FactSet(asked if args.quick else split.forget)
    sequences = {kind: [with_context(backbone, fact, others, kind) for fact in asked] for kind in CONTEXTS}

    def scores() -> dict[str, list[float]]:
        return {kind: log_likelihood(backbone, found, samples=4).log_prob.tolist() for kind, found in sequences.items()}

    how = {"facts": asked.ids, "estimator": "elbo_sum, K = 4, seed 0"}
    rows: dict[str, dict[str, Any]] = {"no edit": run.row("no edit", how, lambda: {"scores": scores()})}
    for name, form in OURS.items():

        def measure(form: Form = form) -> dict[str, Any]:
            memory, _ = edited(backbone, form, others)
            with memory.attached(backbone) as attachment:
                found = scores()
            return {"scores": found, "rows_edited": dict(attachment.hits)}

        rows[name] = run.row(name, how | depends(form), measure)
    means = {name: [sum(row["scores"][kind]) / len(asked) for kind in CONTEXTS] for name, row in rows.items()}
    table = [[name, *(f"{x:.1f}" for x in values)] for name, values in means.items()]
    columns = ["memory", *(f"{kind}: log-prob, nats" for kind in CONTEXTS)]
    run.results.save(table={"columns": columns, "rows": table})
    run.plot(
        "context (see the table's columns)", "log-probability of the forgotten answer, nats",
        {name: list(enumerate(values)) for name, values in means.items()},
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

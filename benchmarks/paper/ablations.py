"""What each part of the method does: ridge, sparsity, gate, protection, place, rank, targets.

    python -m benchmarks.paper.ablations

On half of forget01, with four states a fact, so that the whole table takes a few minutes; compare rows with each other,
not with the main table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timerome as tr
from benchmarks.measure import Measuring, retain_delta, spread
from timerome.memory import ByPlace, Ridge
from timerome.splits import demo_split

from .common import ONE_CANVAS, Form, depends, edited, markdown, start

TINY_RIDGE = 1e-9  # ridge = 0 is refused: the system would be singular
ELSEWHERE = tr.Site(3, "attn")  # drawn once


def variants(protect: tr.FactSet, layers: int) -> dict[str, Form]:
    """Forms by name; each changes one thing of the first of its family."""
    own = Ridge("null", states=ONE_CANVAS)
    paper = replace(own, rank=16)
    lens = Ridge("lens", sparsity=0.0, states=ONE_CANVAS)
    null, free = Form(own, at=3, says=None), Form(paper, at=3, says=None, gated=False)
    said = Form(lens)

    def changed(form: Form, **more: Any) -> Form:
        return replace(form, method=replace(form.method, **more))

    return {
        "null": null,
        "null, no ridge": changed(null, ridge=TINY_RIDGE),
        "null, no sparsity": changed(null, sparsity=0.0),
        "null, sparsity 0.9": changed(null, sparsity=0.9),
        "null, protection": changed(null, protect=protect),
        "null, rank 4": changed(null, rank=4),
        "null, rank 16": changed(null, rank=16),
        "null, targets corrupt": changed(null, targets="corrupt"),
        f"null, random site {ELSEWHERE}": replace(null, at=ELSEWHERE),
        **{f"null, static block {i}": replace(null, at=i) for i in range(layers) if i != null.at},
        "no gate (paper mode)": free,
        "no gate, no ridge": changed(free, ridge=TINY_RIDGE),
        "no gate, no sparsity": changed(free, sparsity=0.0),
        "no gate, protection": changed(free, protect=protect),
        "refusal, by place": Form(),
        "refusal, by place, margin 6": Form(ByPlace(6.0)),
        "refusal, lens": said,
        "refusal, lens, no ridge": changed(said, ridge=TINY_RIDGE),
        "refusal, lens, sparsity 0.5": changed(said, sparsity=0.5),
        "refusal, lens, block before the last": replace(said, at=layers - 2),
        "refusal, donor at block 3": replace(said, method=replace(lens, targets="donor"), at=3),
    }


def main() -> None:
    run, args = start("ablations", __doc__)
    split = demo_split()
    forget = spread(split.forget, 4 if args.quick else 20)
    held_out = {"held_out": spread(split.held_out, 30), "held_out_relations": spread(split.held_out_relations, 20)}
    measuring = Measuring(run.backbone, forget=forget, held_out=held_out, decoded=0)
    rows = {}
    for name, form in variants(spread(split.protect, 40), run.backbone.n_layers).items():

        def measure(form: Form = form) -> dict[str, Any]:
            memory, clock = edited(run.backbone, form, forget)
            sets = measuring(run.backbone, memory)
            return {**clock.to_dict(), "bytes": memory.nbytes, "sets": sets}

        rows[name] = run.row(name, {**depends(form), "protocol": measuring.protocol()}, measure)
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

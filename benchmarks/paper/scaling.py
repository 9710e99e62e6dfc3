"""Forgetting 10 to 400 facts: TOFU's forget01, 05 and 10 sizes among them. Seconds, memory, what goes and what stays.

    python -m benchmarks.paper.scaling

Where keys are read, states are on the answer's own canvas only, four a fact. Held out are two TOFU authors and relation
facts. Reported forget facts are those that no hyperparameter was ever chosen on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import Measuring, spread
from benchmarks.results import Clock
from timerome.diffusion import encode
from timerome.memory import Ridge
from timerome.splits import demo_split, scaling_split

from .common import NULL, ONE_CANVAS, PAPER, Form, Run, depends, grown, markdown, start

FORMS = {
    "timerome (refusal)": Form(),
    "timerome, null": replace(NULL, method=Ridge("null", states=ONE_CANVAS)),
    "paper mode": replace(PAPER, method=Ridge("null", rank=4, states=ONE_CANVAS)),
}
SIZES = (10, 40, 100, 200, 400)
REPORTED = 40


def forward_seconds(run: Run, attached: Any) -> float:
    """CPU seconds of one forward over 8 sequences of one length with something attached, after a first one."""
    clock = Clock()
    ids = torch.stack(
        [encode(run.backbone, f, canvas=64).masked(run.backbone.mask_id)[-72:] for f in demo_split().forget[:8]]
    )
    with torch.inference_mode(), attached:
        run.backbone.logits(ids)
        with clock.running():
            for _ in range(5):
                run.backbone.logits(ids)
    return clock.cpu / 5


def main() -> None:
    from contextlib import nullcontext

    run, args = start("scaling", __doc__)
    rows = {}
    makers = {name: grown(run.backbone, form) for name, form in FORMS.items()}
    for size in (4, 8) if args.quick else SIZES:
        split = scaling_split(size)
        held_out = {"held_out": split.held_out, "held_out_relations": spread(split.held_out_relations, 40)}
        measuring = Measuring(
            run.backbone, forget=spread(split.reported, REPORTED), held_out=held_out, decoded=0, paraphrases=False
        )
        for name, form in FORMS.items():

            def measure(
                name: str = name, split: Any = split, measuring: Any = measuring, size: int = size
            ) -> dict[str, Any]:
                memory, clock = makers[name](split.forget)
                plain = forward_seconds(run, nullcontext())
                return {
                    **clock.to_dict(), "bytes": memory.nbytes, "n": size, "step_seconds_plain": plain,
                    "step_seconds": forward_seconds(run, memory.attached(run.backbone)),
                    "sets": measuring(run.backbone, memory),
                }  # fmt: skip

            on = {**depends(form), "protocol": measuring.protocol()}
            rows[name, size] = run.row(f"{name}, {size} facts", on, measure)
    table = [
        [
            name, size, f"{r['cpu_seconds']:.1f}", f"{r['cpu_seconds'] / size:.3f}", f"{r['bytes'] / 2**20:.1f}",
            f"{r['sets']['forget']['delta']:+.1f}", f"{r['sets']['forget']['highest']:+.1f}",
            f"{r['sets']['held_out']['delta']:+.2f}", f"{r['sets']['held_out']['lowest']:+.1f}",
            f"{r['sets']['held_out_relations']['delta']:+.2f}", f"{r['step_seconds'] / r['step_seconds_plain']:.2f}",
        ]
        for (name, size), r in sorted(rows.items())
    ]  # fmt: skip
    columns = [
        "method", "facts", "CPU s", "CPU s a fact", "memory, MB", "forget Δ, nats", "least forgotten", "held-out Δ",
        "held-out, worst", "relations Δ", "step time, times plain",
    ]  # fmt: skip
    run.results.save(table={"columns": columns, "rows": table})
    run.plot(
        "facts", "CPU seconds a fact",
        {name: [(s, r["cpu_seconds"] / s) for (n, s), r in sorted(rows.items()) if n == name] for name in FORMS},
        log_x=True,
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

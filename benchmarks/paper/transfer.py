"""One configuration over backbones: the same alpha, lambda, q and relative depth on each, nothing tuned again.

    python -m benchmarks.paper.transfer --models testbed FOLDER [--device cuda] [--trust-remote-code]

Facts are country, capital and other relation facts. A model is asked only what it knows (it decodes the answer), so
that models of any training can be compared; where it knows fewer than ``--least`` it is left out, with the number. A
third of what it knows is forgotten, a third is held out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import timerome as tr
from benchmarks.measure import Measuring
from benchmarks.results import Results, about
from timerome.facts import FactSet
from timerome.memory import Ridge
from timerome.splits import bundled_facts

from .common import FOLDER, NULL, PAPER, TWO_STATES, Form, depends, edited, markdown

CANVAS, STEPS = 8, 8
BLOCKS = 6  # of the testbed, which the forms are of
LEAN = {
    "timerome, lean (null)": replace(NULL, method=Ridge("null", states=TWO_STATES)),
    "timerome (refusal)": Form(),
    "paper mode": PAPER,
}


def known(backbone: tr.Backbone, facts: FactSet) -> FactSet:
    """The facts that a model answers rightly, in order."""
    texts = tr.generate(backbone, [fact.prompt for fact in facts], canvas=CANVAS, config=tr.SamplerConfig(steps=STEPS))
    return FactSet(
        fact for fact, text in zip(facts, texts, strict=True) if text.strip().lower().startswith(fact.object.lower())
    )


def at_depth(block: int, backbone: tr.Backbone) -> int:
    """The block of a backbone as far up as one of the testbed's; the last is the last."""
    return backbone.n_layers - 1 if block == BLOCKS - 1 else block * backbone.n_layers // BLOCKS


def measure(backbone: tr.Backbone, name: str, facts: FactSet) -> dict[str, Any]:
    """Forget a third of the facts with one configuration; see what happens to the rest."""
    form = LEAN[name]
    if form.at is not None:
        form = replace(form, at=at_depth(int(form.at), backbone))
    forget, held = facts[::3], facts[2::3]
    memory, clock = edited(backbone, form, forget)
    measuring = Measuring(backbone, forget=forget, held_out={"held_out": held}, decoded=0, paraphrases=False)
    layer = backbone.n_layers - 1 if form.at is None else form.at
    return {
        **clock.to_dict(), "layer": layer, "n": len(forget), "sets": measuring(backbone, memory),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["testbed"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--least", type=int, default=30)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for source in args.models:
        backbone = tr.load(source, device=args.device, trust_remote_code=args.trust_remote_code)
        results = Results(args.out / "transfer.json", about(backbone, seed=0))
        facts = known(backbone, bundled_facts("relations"))
        label = source if source == "testbed" else Path(source).name
        if len(facts) < args.least:
            print(f"{label}: knows {len(facts)} of these facts, fewer than {args.least}; left out.")
            continue
        for name in LEAN:
            on = {**depends(LEAN[name]), "facts": facts.ids}
            row = results.row(
                f"{label}, {name}", on, lambda name=name, b=backbone, facts=facts: measure(b, name, facts)
            )
            forget, held = row["sets"]["forget"], row["sets"]["held_out"]
            table.append([
                label, name, row["layer"], row["n"], f"{forget['delta']:+.1f}", f"{forget['highest']:+.1f}",
                f"{held['delta']:+.2f}", f"{held['lowest']:+.1f}",
            ])  # fmt: skip
    columns = [
        "backbone", "configuration", "block", "facts", "forget Δ, nats", "least forgotten", "held-out Δ",
        "held-out, worst",
    ]  # fmt: skip
    if table:
        results.save(table={"columns": columns, "rows": table})
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

"""Replaced answers: decoded exactly, under the shown wording and unseen ones, and what else changed; writes JSON.

python -m benchmarks.editing.replace [--facts N] [--validation 1]
"""

from __future__ import annotations

import json
from typing import Any

import timerome as tr
from timerome.evaluation import WeightsWatch
from timerome.memory.address import wordings
from timerome.splits import editing_split

from .common import LONG, SETTINGS, SHORT, build, decode, exact, gate_rules, owners, rate, start, unchanged


def measure(backbone: tr.Backbone, facts: tr.FactSet, canvas: int, steps: int) -> dict[str, Any]:
    """Edit some facts; what is decoded for them, and for facts held out."""
    split = editing_split()
    held = {
        "tofu": split.held_out, "relations": split.held_out_relations, "unknown": split.held_out_unknown,
    }  # fmt: skip
    with WeightsWatch(backbone) as watch:
        memory, seconds = build(backbone, facts, split, canvas)
        shown = [fact.prompt for fact in facts]
        unseen = [(i, prompt) for i, fact in enumerate(facts) for prompt in fact.paraphrases]
        texts = decode(backbone, shown, canvas, steps, memory)
        others = decode(backbone, [prompt for _, prompt in unseen], canvas, steps, memory)
    given = owners(backbone, memory, [prompt for _, prompt in unseen], canvas)
    right = [exact(text, fact.new_object or "") for text, fact in zip(texts, facts, strict=True)]
    right_unseen = [exact(text, facts[i].new_object or "") for text, (i, _) in zip(others, unseen, strict=True)]
    book = memory.book
    assert book is not None
    found: dict[str, Any] = {
        "base_exact": rate(
            sum(exact(t, f.object) for t, f in zip(decode(backbone, shown, canvas, steps), facts, strict=True)),
            len(facts),
        ),
        "shown": rate(sum(right), len(right), "exact"),
        "unseen": rate(sum(right_unseen), len(right_unseen), "exact"),
        "unseen_addressed": rate(sum(g == i for g, (i, _) in zip(given, unseen, strict=True)), len(unseen)),
        "misses": [
            {"prompt": p, "wanted": f.new_object, "decoded": t}
            for ok, p, f, t in [
                *zip(right, shown, facts, texts, strict=True),
                *((r, p, facts[i], t) for r, (i, p), t in zip(right_unseen, unseen, others, strict=True)),
            ]
            if not ok
        ][:20],
        "backward_passes": watch.backward_passes,
        "weights_unchanged": watch.weights_unchanged,
        "cpu_seconds_build": seconds,
        "bytes_a_fact": memory.nbytes / len(facts),
        "threshold": book.threshold,
        "floor": book.floor,
        "held_out": {},
    }
    for other, negatives in held.items():
        prompts = [prompt for fact in negatives for prompt in wordings(fact)]
        found["held_out"][other] = unchanged(backbone, memory, prompts, canvas, steps)
    return found


def main() -> None:
    backbone, results, arguments = start("replace", facts=0, validation=0, steps=32, only="")
    split = editing_split()
    sets = {"relations": (split.relations, SHORT, SHORT), "tofu": (split.tofu, LONG, arguments.steps)}
    if arguments.validation:
        sets = {
            "validation relations": (split.validation_relations, SHORT, SHORT),
            "validation tofu": (split.validation_tofu, LONG, arguments.steps),
        }
    for name, (facts, canvas, steps) in sets.items():
        if arguments.only not in name:
            continue
        facts = facts[: arguments.facts] if arguments.facts else facts
        depends = {
            "settings": SETTINGS,
            "gate": gate_rules(backbone),
            "n": len(facts),
            "canvas": canvas,
            "steps": steps,
        }

        def measured(facts: tr.FactSet = facts, canvas: int = canvas, steps: int = steps) -> dict[str, Any]:
            return measure(backbone, facts, canvas, steps)

        found = results.row(name, depends, measured)
        print(name, json.dumps({k: v for k, v in found.items() if k != "misses"}), flush=True)


if __name__ == "__main__":
    main()

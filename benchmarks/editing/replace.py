"""Replaced answers: decoded exactly, under the shown wording and unseen ones, and what else changed; writes JSON.

python -m benchmarks.editing.replace [--facts N] [--validation 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timerome as tr
from timerome.evaluation import WeightsWatch
from timerome.memory.address import wordings
from timerome.splits import editing_split

from .common import LONG, SETTINGS, SHORT, build, decode, exact, owners, rate, run, unchanged


def measure(arguments: argparse.Namespace, report: Callable[[dict[str, Any]], None]) -> None:
    """Edit relation facts, then TOFU answers."""
    backbone, split = tr.load(arguments.model), editing_split()
    sets = {"relations": (split.relations, SHORT, SHORT), "tofu": (split.tofu, LONG, arguments.steps)}
    if arguments.validation:
        sets = {
            "relations": (split.validation_relations, SHORT, SHORT),
            "tofu": (split.validation_tofu, LONG, arguments.steps),
        }
    held = {
        "tofu": split.held_out, "relations": split.held_out_relations, "unknown": split.held_out_unknown,
    }  # fmt: skip
    report({"settings": SETTINGS})
    for name, (facts, canvas, steps) in sets.items():
        if arguments.only and name != arguments.only:
            continue
        facts = facts[: arguments.facts] if arguments.facts else facts
        with WeightsWatch(backbone) as watch:
            memory, seconds = build(backbone, facts, split, canvas)
            shown = [fact.prompt for fact in facts]
            unseen = [(i, prompt) for i, fact in enumerate(facts) for prompt in fact.paraphrases]
            texts = decode(backbone, shown, canvas, steps, memory)
            others = decode(backbone, [prompt for _, prompt in unseen], canvas, steps, memory)
        given = owners(backbone, memory, [prompt for _, prompt in unseen], canvas)
        right = [exact(text, fact.new_object or "") for text, fact in zip(texts, facts, strict=True)]
        right_unseen = [exact(text, facts[i].new_object or "") for text, (i, _) in zip(others, unseen, strict=True)]
        found: dict[str, Any] = {
            "n": len(facts),
            "canvas": canvas,
            "steps": steps,
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
            "seconds_build": seconds,
            "bytes_a_fact": memory.nbytes / len(facts),
            "threshold": memory.book.threshold if memory.book else None,
            "held_out": {},
        }
        for other, negatives in held.items():
            prompts = [prompt for fact in negatives for prompt in wordings(fact)]
            found["held_out"][other] = unchanged(backbone, memory, prompts, canvas, steps)
        report({name: found})


if __name__ == "__main__":
    run("replace", measure, facts=0, validation=0, steps=32, only="")

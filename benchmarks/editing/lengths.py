"""Replaced answers by the length of the new one: 1, 2, 4, 8, and 16 or more tokens; writes JSON and CSV.

    python -m benchmarks.editing.lengths

The facts are those of ``replace``, each with a new answer of the length: an object of the relation facts or else the
beginning of a false TOFU answer, cut between words; of 16 or more tokens a whole false answer that the canvas holds.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from typing import Any

import timerome as tr
from timerome.evaluation import WeightsWatch
from timerome.memory.address import wordings
from timerome.splits import bundled_facts, editing_split, false_answers

from .common import LONG, build, decode, exact, gate_rules, owners, rate, renewed, start, unchanged

LENGTHS = (1, 2, 4, 8, 16)  # the last one and more
MIDDLE = 32  # canvas of relation facts, whose new answers are longer here than in ``replace``


def targets(backbone: tr.Backbone, length: int, canvas: int) -> list[str]:
    """Return distinct answers of ``length`` tokens; for the largest of them, whole sentences of at least as many."""

    def tokens(text: str) -> int:
        return len(backbone.encode(" " + text))

    sentences = [str(fact.new_object) for fact in false_answers("retain")]
    if length == LENGTHS[-1]:
        return sorted({s for s in sentences if length <= tokens(s) < canvas})
    objects = [fact.object for fact in bundled_facts("relations")]
    if found := sorted({text for text in objects if tokens(text) == length}):
        if len(found) >= 10:
            return found
    words = [sentence.split() for sentence in sentences]
    cuts = {" ".join(w[:n]).rstrip(",.;:") for w in words for n in range(1, len(w))}
    return sorted(cut for cut in cuts if tokens(cut) == length)


def with_targets(facts: Sequence[tr.Fact], pool: list[str]) -> tr.FactSet:
    """Give each fact an answer of the pool, drawn by its id, that it does not have yet."""
    return tr.FactSet(
        fact.with_new_object(random.Random(fact.id).choice([text for text in pool if text != fact.object]))
        for fact in facts
    )


def main() -> None:
    backbone, results, arguments = start("lengths", tofu=20, relations=69)
    split = editing_split()
    held = [p for fact in split.held_out + split.held_out_relations + split.held_out_unknown for p in wordings(fact)]
    sets = {
        "relations": (split.relations[: arguments.relations], MIDDLE, 16),
        "tofu": (split.tofu[:: -(-len(split.tofu) // arguments.tofu)], LONG, 32),
    }
    table = []
    for name, (facts, canvas, steps) in sets.items():
        base: tr.EditMemory | None = None
        for length in LENGTHS:

            def measure(
                facts: tr.FactSet = facts, canvas: int = canvas, steps: int = steps, length: int = length
            ) -> dict[str, Any]:
                nonlocal base
                edited = with_targets(facts, targets(backbone, length, canvas))
                with WeightsWatch(backbone) as watch:
                    if base is None:
                        base = memory = build(backbone, edited, split, canvas)[0]
                    else:
                        memory = renewed(backbone, base, edited)
                    shown = [(i, fact.prompt) for i, fact in enumerate(edited)]
                    unseen = [(i, prompt) for i, fact in enumerate(edited) for prompt in fact.paraphrases]
                    texts = decode(backbone, [p for _, p in shown + unseen], canvas, steps, memory)
                given = owners(backbone, memory, [p for _, p in unseen], canvas)
                right = [exact(t, edited[i].new_object or "") for t, (i, _) in zip(texts, shown + unseen, strict=True)]
                misses = [
                    {"prompt": p, "wanted": edited[i].new_object, "decoded": t}
                    for ok, t, (i, p) in zip(right, texts, shown + unseen, strict=True) if not ok
                ]  # fmt: skip
                addressed = sum(owner == i for owner, (i, _) in zip(given, unseen, strict=True))
                return {
                    "shown": rate(sum(right[: len(shown)]), len(shown), "exact"),
                    "unseen": rate(sum(right[len(shown) :]), len(unseen), "exact"),
                    "unseen_addressed": rate(addressed, len(unseen)),
                    "held_out": unchanged(backbone, memory, held, canvas, steps),
                    "tokens": sum(len(backbone.encode(f" {f.new_object}")) for f in edited) / len(edited),
                    "misses": misses[:8],
                    "backward_passes": watch.backward_passes,
                    "weights_unchanged": watch.weights_unchanged,
                }

            depends = {
                "facts": len(facts), "canvas": canvas, "steps": steps, "length": length, "gate": gate_rules(backbone),
            }  # fmt: skip
            found = results.row(f"{name}, {length}", depends, measure)
            table.append([
                name, f"{length}+" if length == LENGTHS[-1] else length, round(found["tokens"], 1),
                found["shown"]["exact"], found["shown"]["n"], round(found["shown"]["share"], 3),
                found["unseen"]["exact"], found["unseen"]["n"], round(found["unseen"]["share"], 3),
                found["unseen_addressed"]["count"], round(found["held_out"]["agreement"], 4),
            ])  # fmt: skip
            print(table[-1], flush=True)
    with results.path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([
            "facts", "length", "mean_tokens", "shown_exact", "shown_n", "shown_share", "unseen_exact", "unseen_n",
            "unseen_share", "unseen_addressed", "held_out_agreement",
        ])  # fmt: skip
        writer.writerows(table)


if __name__ == "__main__":
    main()

"""The gate's ``layer`` and ``same_subject``, chosen on validation facts only; writes JSON.

    python -m benchmarks.editing.choose

A stricter floor keeps edits from other questions about their subject, and misses more of their own. Measured at two
blocks and for several rates: four validation authors, one question in four edited, in four turns, and all asked;
validation relation facts, all edited, their unseen wordings asked. Chosen is what has the fewest false triggers and
leaves at least ``FOUND`` of the unseen wordings found. No fact that a number is reported on has a part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import timerome as tr
from timerome.memory import REFUSAL
from timerome.memory.address import AddressBook, Reading, floor_of, related_cosines
from timerome.splits import demo_split, editing_split

from .common import LONG, SHORT, STATES, bank, rate, readings, renewed, start

LAYERS = (4, 5)  # two thirds of the depth, and the last
RATES = (0.01, 0.005, 0.003, 0.002, 0.0015, 0.001, 0.0007, 0.0005)
FOUND = 0.85  # 0.8 is wanted on the facts reported on, which are other ones


class Asked:
    """Memories of some facts and what is asked of each: which edit is right, -1 for none."""

    def __init__(
        self, backbone: tr.Backbone, sets: list[tuple[tr.FactSet, list[tuple[int, str]]]], canvas: int, layer: int
    ) -> None:
        split = editing_split()
        gate, states = tr.Gate(split.calibrate, related=split.related, layer=layer), bank(canvas, **STATES)
        self.found: list[tuple[AddressBook, list[int], list[Reading]]] = []
        base: tr.EditMemory | None = None
        for edited, asked in sets:
            if base is None:
                base = memory = tr.EditMemory.build(backbone, edited, estimator="lens", gate=gate, bank=states)
            else:
                memory = renewed(backbone, base, edited)
            seen = list(readings(backbone, memory, [prompt for _, prompt in asked], canvas))
            assert memory.book is not None
            self.found.append((memory.book, [right for right, _ in asked], seen))
        assert base is not None
        known = base.background
        assert known.gate is not None and known.centre is not None
        self.related = related_cosines(backbone, known.gate, known.centre, known.bank)

    def counts(self, floor: float) -> Iterator[tuple[int, int]]:
        """Which edit is right for each question, -1 for none, and which is given."""
        for book, rights, seen in self.found:
            given = [i for reading in seen for i in replace(book, floor=floor).lookup(reading).tolist()]
            yield from zip(rights, given, strict=True)


def turns(facts: tr.FactSet, wanted: Any) -> list[tuple[tr.FactSet, list[tuple[int, str]]]]:
    """One fact in four edited, in four turns; asked is every wording of all facts."""
    found = []
    for turn in range(4):
        edited = tr.FactSet(list(facts)[turn::4]).with_new_object(wanted)
        own = {fact.id: i for i, fact in enumerate(edited)}
        found.append((edited, [(own.get(f.id, -1), p) for f in facts for p in (f.prompt, *f.paraphrases)]))
    return found


def main() -> None:
    backbone, results, _ = start("choose")
    split, demo = editing_split(), demo_split()
    facts = split.validation_relations
    unseen = [(i, prompt) for i, fact in enumerate(facts) for prompt in fact.paraphrases]

    @cache
    def asked(layer: int) -> tuple[Asked, Asked]:
        authors = turns(demo.validation_forget + demo.validation_retain, REFUSAL)
        return Asked(backbone, authors, LONG, layer), Asked(backbone, [(facts, unseen)], SHORT, layer)

    def measure(layer: int, same_subject: float) -> dict[str, Any]:
        authors, relations = asked(layer)
        floors = [floor_of(one.related, same_subject) for one in (authors, relations)]
        pairs = list(authors.counts(floors[0]))
        others, own = [g for r, g in pairs if r < 0], [g == r for r, g in pairs if r >= 0]
        reached = [g == r for r, g in relations.counts(floors[1])]
        return {
            "authors": {"floor": floors[0], "false": rate(sum(g >= 0 for g in others), len(others)),
                        "own": rate(sum(own), len(own))},
            "relations": {"floor": floors[1], "unseen": rate(sum(reached), len(reached))},
        }  # fmt: skip

    found = {}
    for layer, same_subject in product(LAYERS, RATES):
        name = f"layer {layer}, same_subject {same_subject:g}"
        row = found[name] = results.row(
            name, {"authors": 4}, lambda layer=layer, same_subject=same_subject: measure(layer, same_subject)
        )
        shares = [row["authors"]["false"], row["authors"]["own"], row["relations"]["unseen"]]
        floors = [row[one]["floor"] for one in ("authors", "relations")]
        print(name, *(round(f, 3) for f in floors), *(round(one["share"], 4) for one in shares), flush=True)
    enough = [name for name, row in found.items() if row["relations"]["unseen"]["share"] >= FOUND]
    best = min(enough, key=lambda name: found[name]["authors"]["false"]["share"])
    results.save(chosen=best)
    print("chosen:", best)


if __name__ == "__main__":
    main()

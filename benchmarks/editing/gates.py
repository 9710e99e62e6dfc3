"""False triggers of the row gate: on fresh prompts, and on other questions about edited subjects; writes JSON.

    python -m benchmarks.editing.gates --data DATA_DIR

Memory: 40 forgotten TOFU records and 69 replaced relation facts. The threshold is set, at each promised rate, on half
of the prompts of ParaRel, LRE, CounterFact, zsRE and RWKU (DATA_DIR, see the data's own README), none of which an edit
is of, together with the usual negatives; the rate is taken on the other half. Whether the model knows them does not
matter.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import timerome as tr
from timerome.memory import REFUSAL
from timerome.memory.address import threshold_of
from timerome.splits import bundled_facts, demo_split, editing_split

from .common import LONG, SHORT, STATES, bank, gate_rules, owners, rate, start

RATES = (0.01, 0.001)


def prompts_of(data: Path) -> list[str]:
    """Distinct short prompts of the benchmarks, in an order drawn once."""
    found: list[str] = []
    for file in sorted((data / "pararel" / "trex_lms_vocab").glob("*.jsonl")):
        pattern = json.loads((data / "pararel" / "graphs_json" / file.name).read_text().splitlines()[0])["pattern"]
        stem = pattern.split("[Y]")[0]
        if "[X]" in stem:
            found += [stem.replace("[X]", json.loads(r)["sub_label"]).strip() for r in file.read_text().splitlines()]
    for file in sorted((data / "lre").glob("*/*.json")):
        relation = json.loads(file.read_text())
        template = relation["prompt_templates"][0]
        found += [template.format(sample["subject"]) for sample in relation["samples"]]
    found += [r["prompt"] for r in json.loads((data / "counterfact" / "counterfact-flat.first1000.json").read_text())]
    found += [r["src"] for r in json.loads(next((data / "zsre").glob("*.json")).read_text())]
    found += [r["query"] for r in json.loads((data / "rwku" / "forget_level2.json").read_text())]
    known = {p for fact in bundled_facts("relations") for p in (fact.prompt, *fact.paraphrases)}
    distinct = sorted(set(found) - known)
    random.Random(0).shuffle(distinct)
    return distinct


def fresh_negatives(backbone: tr.Backbone, asked: list[str]) -> dict[str, Any]:
    """Thresholds from every other prompt; false triggers on the others, and unseen wordings found."""
    split, demo = editing_split(), demo_split()
    first, second = asked[::2], asked[1::2]
    facts = demo.forget.with_new_object(REFUSAL) + split.relations
    negatives = split.calibrate + tr.FactSet(
        tr.Fact(id=f"fresh-{i}", prompt=p, subject=p.split()[0], object="x") for i, p in enumerate(first)
    )
    gate = tr.Gate(negatives, related=split.related)
    states = bank(SHORT, canvases=(None, 32), **STATES)
    memory = tr.EditMemory.build(backbone, facts, estimator="lens", gate=gate, bank=states)
    book = memory.book
    assert book is not None
    paraphrases = [(i, p) for i, fact in enumerate(facts) for p in fact.paraphrases]
    found: dict[str, Any] = {"calibrated_on": len(book.calibration), "fresh": len(second), "floor": book.floor}
    for epsilon in RATES:
        book.threshold = threshold_of(book.calibration, epsilon)
        fired = sum(owner >= 0 for owner in owners(backbone, memory, second, 32))
        given = owners(backbone, memory, [p for _, p in paraphrases], 32)
        right = sum(owner == i for owner, (i, _) in zip(given, paraphrases, strict=True))
        found[f"epsilon {epsilon:g}"] = {
            "threshold": book.threshold, "fired": rate(fired, len(second)), "power": rate(right, len(paraphrases)),
        }  # fmt: skip
    return found


def same_subject(backbone: tr.Backbone) -> dict[str, Any]:
    """One fact in four of each held-out author is forgotten; the author's other questions, both wordings, are asked."""
    split = editing_split()
    edited = tr.FactSet(list(split.held_out)[::4]).with_new_object(REFUSAL)
    gate = tr.Gate(split.calibrate, related=split.related)
    memory = tr.EditMemory.build(backbone, edited, estimator="lens", gate=gate, bank=bank(LONG, **STATES))
    assert memory.book is not None
    others = [fact for fact in split.held_out if fact.id not in set(edited.ids)]
    asked = [p for fact in others for p in (fact.prompt, *fact.paraphrases)]
    fired = sum(owner >= 0 for owner in owners(backbone, memory, asked, LONG))
    own = [(i, p) for i, fact in enumerate(edited) for p in (fact.prompt, *fact.paraphrases)]
    given = owners(backbone, memory, [p for _, p in own], LONG)
    right = sum(owner == i for owner, (i, _) in zip(given, own, strict=True))
    return {
        "floor": memory.book.floor, "false": rate(fired, len(asked)), "power": rate(right, len(own)),
        "edited": len(edited),
    }  # fmt: skip


def main() -> None:
    backbone, results, arguments = start("gates", data="data", prompts=6000)
    asked = prompts_of(Path(arguments.data))[: arguments.prompts]
    depends = {"gate": gate_rules(backbone)}
    for name, prompts, measure in (
        ("fresh negatives", len(asked), lambda: fresh_negatives(backbone, asked)),
        ("same subject", 0, lambda: same_subject(backbone)),
    ):
        print(name, json.dumps(results.row(name, {**depends, "prompts": prompts}, measure)), flush=True)


if __name__ == "__main__":
    main()

"""The row gate on facts that none of its rules was made or set with; writes JSON.

    python -m benchmarks.editing.untouched --data DATA_DIR

``gates`` was looked at before two of the gate's rules were made. Here, with those rules as they are:

- same subject: the four authors that only ever were protected facts, a quarter of their questions edited in turns, all
  their other questions asked, both wordings; and the two authors of forget01 likewise;
- the same where the model knows nothing of the subject: authors it was never asked about, answers inserted;
- fresh negatives: TOFU's real authors and world facts, unknown authors, KnowEdit and MQuAKE (DATA_DIR), with the edits
  of ``gates``. Thresholds from the usual negatives, and at stated rates from those of other benchmarks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import timerome as tr
from timerome.memory import REFUSAL
from timerome.memory.address import threshold_of
from timerome.splits import bundled_facts, demo_split, editing_split

from .choose import turns
from .common import LONG, STATES, bank, gate_rules, owners, rate, readings, renewed, start
from .gates import RATES, prompts_of


def same_subject(backbone: tr.Backbone, facts: tr.FactSet, wanted: Any) -> dict[str, Any]:
    """One fact in four edited, in four turns; who answers the others' questions, and their own."""
    split = editing_split()
    base = None
    counts = {"false": [0, 0], "own, shown": [0, 0], "own, unseen": [0, 0]}
    examples: list[list[str]] = []
    for edited, asked in turns(facts, wanted):
        if base is None:
            gate = tr.Gate(split.calibrate, related=split.related)
            states = bank(LONG, **STATES)
            base = memory = tr.EditMemory.build(backbone, edited, estimator="lens", gate=gate, bank=states)
        else:
            memory = renewed(backbone, base, edited)
        given = owners(backbone, memory, [p for _, p in asked], LONG)
        for got, (right, prompt) in zip(given, asked, strict=True):
            kind = "false" if right < 0 else "own, shown" if prompt == edited[right].prompt else "own, unseen"
            counts[kind][0] += got >= 0 if right < 0 else got == right
            counts[kind][1] += 1
            if right < 0 <= got:
                examples.append([prompt, edited[got].prompt])
    return {
        **{kind: rate(*pair) for kind, pair in counts.items()}, "facts": len(facts), "examples": examples[:12],
    }  # fmt: skip


def fresh_prompts(data: Path) -> dict[str, list[str]]:
    """Up to 200 prompts by source, none of which is a negative, an edited question, or a prompt of ``gates``."""
    knowedit = [p for file in sorted((data / "knowedit").glob("*/*.json")) for p in _strings(file, "prompt")]
    mquake = [q for file in sorted((data / "mquake").glob("*.json")) for q in _questions(file)]
    found = {
        "real authors": [fact.prompt for fact in bundled_facts("real_authors")],
        "world facts": [fact.prompt for fact in bundled_facts("world_facts")],
        "unknown authors": [fact.prompt for fact in bundled_facts("unknown")[300:]],
        "KnowEdit": knowedit,
        "MQuAKE": mquake,
    }
    split, demo = editing_split(), demo_split()
    known = split.calibrate + split.relations + demo.forget
    used = set(prompts_of(data)) | {p for fact in known for p in (fact.prompt, *fact.paraphrases)}
    used |= {p for fact in bundled_facts("relations") for p in (fact.prompt, *fact.paraphrases)}
    fresh = {name: sorted(set(prompts) - used) for name, prompts in found.items()}
    return {name: random.Random(name).sample(prompts, min(200, len(prompts))) for name, prompts in fresh.items()}


def _strings(file: Path, name: str) -> list[str]:
    return [record[name] for record in json.loads(file.read_text()) if isinstance(record.get(name), str)]


def _questions(file: Path) -> list[str]:
    records = json.loads(file.read_text())
    single = [hop["question"] for record in records for hop in record.get("single_hops", ())]
    return [question for record in records for question in record["questions"]] + single


def alone(backbone: tr.Backbone, memory: tr.EditMemory, prompts: Sequence[str], canvas: int) -> dict[str, Any]:
    """False triggers of each edit if it were a memory's only one, its threshold set by its own scores."""
    book = memory.book
    assert book is not None
    thresholds = [threshold_of(e.address_scores, None) for e in memory.edits if e.address_scores is not None]
    found: dict[str, Any] = {}
    seen = list(readings(backbone, memory, prompts, canvas))
    for name, floor in (("with the same-subject floor", book.floor), ("without", -2.0)):
        scores = torch.cat([replace(book, floor=floor).scores(reading) for reading in seen])
        fired = (scores > torch.tensor(thresholds)).sum(0)
        found[name] = {
            "mean_share": float(fired.double().mean()) / len(prompts), "most": int(fired.max()),
            "edits_that_fire": int((fired > 0).sum()), "edits": len(fired), "prompts": len(prompts),
        }  # fmt: skip
    return found


def main() -> None:
    backbone, results, arguments = start("untouched", data="data", calibrate=2400)
    retain, unknown = bundled_facts("retain"), bundled_facts("unknown")
    gate = gate_rules(backbone)
    results.row("same subject", {"facts": 80, "gate": gate}, lambda: same_subject(backbone, retain[:80], REFUSAL))
    results.row(
        "same subject, forget01", {"facts": 40, "gate": gate},
        lambda: same_subject(backbone, bundled_facts("forget01"), REFUSAL),
    )  # fmt: skip
    results.row(
        "same subject, unknown to the model", {"facts": 100, "gate": gate},
        lambda: same_subject(backbone, unknown[300:], lambda fact: fact.object),
    )  # fmt: skip

    data = Path(arguments.data)
    facts = demo_split().forget.with_new_object(REFUSAL) + editing_split().relations
    paraphrases = [(i, p) for i, fact in enumerate(facts) for p in fact.paraphrases]

    @cache
    def fresh() -> dict[str, list[str]]:
        return fresh_prompts(data)

    def triggers(negatives: tr.FactSet, rates: Sequence[float | None], canvas: int) -> dict[str, Any]:
        states = tr.BankConfig(canvases=(None, canvas), **STATES)
        memory = tr.EditMemory.build(
            backbone, facts, estimator="lens", gate=tr.Gate(negatives, related=editing_split().related), bank=states
        )
        book = memory.book
        assert book is not None
        found: dict[str, Any] = {"calibrated_on": len(book.calibration), "floor": book.floor}
        for epsilon in rates:
            book.threshold = threshold_of(book.calibration, epsilon)
            given = owners(backbone, memory, [p for _, p in paraphrases], canvas)
            right = sum(owner == i for owner, (i, _) in zip(given, paraphrases, strict=True))
            row: dict[str, Any] = {"threshold": book.threshold, "power": rate(right, len(paraphrases))}
            total = 0
            for name, prompts in fresh().items():
                answered = owners(backbone, memory, prompts, canvas)
                fired = [[p, facts[i].prompt] for p, i in zip(prompts, answered, strict=True) if i >= 0]
                row[name] = rate(len(fired), len(prompts), "fired") | {"examples": fired[:5]}
                total += len(fired)
            row["all"] = rate(total, sum(map(len, fresh().values())), "fired")
            if epsilon is None:
                row["one edit alone"] = alone(backbone, memory, [p for ps in fresh().values() for p in ps], canvas)
            found["largest score" if epsilon is None else f"epsilon {epsilon:g}"] = row
        return found

    usual = editing_split().calibrate
    results.row(
        "fresh negatives, usual gate", {"facts": len(facts), "gate": gate}, lambda: triggers(usual, (None,), 32)
    )

    def at_rates() -> dict[str, Any]:
        others = prompts_of(data)[: arguments.calibrate : 2]
        more = tr.FactSet(
            tr.Fact(id=f"other-{i}", prompt=p, subject=p.split()[0], object="x") for i, p in enumerate(others)
        )
        return triggers(usual + more, RATES, 32)

    results.row("fresh negatives, stated rates", {"calibrate": arguments.calibrate, "gate": gate}, at_rates)
    for name, row in results.rows.items():
        print(name, json.dumps(row["found"], ensure_ascii=False)[:2000], flush=True)


if __name__ == "__main__":
    main()

"""Which states of a fact an edit needs: banks from one state a fact to the wide one, on validation facts only.

    python -m benchmarks.paper.bank

What is forgotten and decoded here are the validation authors, and locality is that of the other validation authors and
of questions on unknown ones: the demo's bank is chosen by this table, and no reported number is in it. All banks share
one gate, calibrated once. Besides likelihoods (``elbo_sum``: random parts of the true answer are shown): text decoded
on canvases of several lengths, in blocks and at random, under the shown wording and unseen ones; and how often another
question is taken for a forgotten one, on each of these canvases. Then the same for replaced answers: one of a TOFU
record's false answers, another object of a relation.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import timerome as tr
from benchmarks.editing.common import decode, exact, owners
from benchmarks.measure import spread
from benchmarks.results import Clock
from timerome.demo import CANVAS, DEMO, Gates, Setting, build
from timerome.diffusion import SamplerConfig
from timerome.evaluation import evaluate
from timerome.facts import FactSet
from timerome.memory import BankConfig, Calibration, EditMemory, Gate
from timerome.memory.address import wordings
from timerome.splits import bundled_facts, demo_split, editing_split

from .common import TWO_STATES, WIDE, markdown, start

BANKS: dict[str, BankConfig] = {
    "1: masked": BankConfig((None,), (0.0,)),
    "2: masked, half shown": TWO_STATES,
    "8: four shares, two canvases": BankConfig((None, CANVAS), (0.0, 0.3, 0.6, 0.9)),
    "42: wide": WIDE.bank,
}
DECODED: dict[str, tuple[int, SamplerConfig]] = {
    "24": (24, SamplerConfig(steps=8)),
    "64": (64, SamplerConfig(steps=8)),
    "128": (128, SamplerConfig(steps=8)),
    "96 in blocks": (96, SamplerConfig(steps=12, block_length=32)),
    "64 at random": (64, SamplerConfig(steps=8, remasking="random", temperature=0.7)),
}


def forgetting(
    backbone: tr.Backbone, setting: Setting, calibration: Calibration | None, facts: FactSet
) -> dict[str, Any]:
    """Forget validation facts with a setting, and measure what is left of them and of everything else."""
    split, clock = demo_split(), Clock()
    with clock.running():
        memory, _ = build(backbone, replace(split, forget=facts), setting, calibration=calibration)
    found: dict[str, Any] = {**clock.to_dict(), "bytes": memory.nbytes}
    asked = [p for f in split.validation_retain for p in wordings(f)]
    asked += [p for f in bundled_facts("unknown")[100:200] for p in wordings(f)]
    for wording in ("prompt", "paraphrase"):
        before = evaluate(backbone, facts, wording=wording, samples=4, decode=False)
        with memory.attached(backbone):
            after = evaluate(backbone, facts, wording=wording, samples=4, decode=False)
        found[f"{wording}/delta"] = after.mean("log_prob") - before.mean("log_prob")
        for name, (canvas, sampler) in DECODED.items():
            with memory.attached(backbone):
                texts = evaluate(backbone, memory.facts, wording=wording, samples=1, canvas=canvas, sampler=sampler)
            found[f"{wording}/{name}"] = {
                "exact_new": None if setting.new_object is None else texts.mean("exact_new"),
                **{metric: texts.mean(metric) for metric in ("rouge_recall", "distinct2", "repetition")},
            }
    for canvas in sorted({canvas for canvas, _ in DECODED.values()}):
        found[f"false/{canvas}"] = sum(o >= 0 for o in owners(backbone, memory, asked, canvas))
    found["asked"] = len(asked)
    return found


def replacing(backbone: tr.Backbone, bank: BankConfig, sets: dict[str, tuple[FactSet, int, int]]) -> dict[str, Any]:
    """Replace answers of validation facts, and decode them."""
    split, found = editing_split(), {}
    gate = Gate(split.calibrate, related=split.related)
    for name, (facts, canvas, steps) in sets.items():
        own = replace(bank, canvases=tuple(canvas if c == CANVAS else c for c in bank.canvases))
        memory = EditMemory.build(
            backbone, facts, gate=gate, estimator="lens", alpha=1.5, sparsity=0.0, margin=12.0, bank=own
        )
        shown = decode(backbone, [f.prompt for f in facts], canvas, steps, memory)
        unseen = [(f, p) for f in facts for p in f.paraphrases]
        others = decode(backbone, [p for _, p in unseen], canvas, steps, memory)
        found[name] = {
            "shown": sum(exact(t, f.new_object or "") for t, f in zip(shown, facts, strict=True)) / len(facts),
            "unseen": sum(exact(t, f.new_object or "") for t, (f, _) in zip(others, unseen, strict=True)) / len(unseen),
            "n": [len(facts), len(unseen)],
        }
    return found


def main() -> None:
    kinds = ("refusal", "null", "replace")
    run, args = start("bank", __doc__, lambda p: p.add_argument("--only", choices=kinds))
    backbone, split = run.backbone, demo_split()
    facts = spread(split.validation_forget, 4 if args.quick else 12)
    gates = Gates(backbone, split, DEMO)
    editing = editing_split()
    sets = {
        "tofu": (spread(editing.validation_tofu, 2 if args.quick else 12), CANVAS, 32),
        "relations": (spread(editing.validation_relations, 2 if args.quick else 24), 8, 8),
    }
    rows: dict[str, dict[str, Any]] = {}
    replaced: dict[str, dict[str, Any]] = {}
    for kind in kinds if args.only is None else (args.only,):
        for name, bank in BANKS.items():
            if kind == "replace":
                on = {"bank": asdict(bank), "facts": {k: v[0].ids for k, v in sets.items()}}
                run.row(f"{kind}, {name}", on, lambda bank=bank: replacing(backbone, bank, sets))
            elif kind == "refusal" or bank.prompt_dropout == (0.0,):
                setting = replace(DEMO.shipped if kind == "refusal" else DEMO.null, bank=bank)

                def measure(setting: Setting = setting) -> dict[str, Any]:
                    return forgetting(backbone, setting, gates(setting), facts)

                run.row(f"{kind}, {name}", {"setting": asdict(setting), "facts": facts.ids}, measure)
    for key, row in run.results.rows.items():
        kind, name = key.split(", ", 1)
        (replaced if kind == "replace" else rows)[name if kind == "replace" else key] = row["found"]
    table = []
    for name, row in rows.items():
        exacts = [v["exact_new"] for k, v in row.items() if isinstance(v, dict) and "exact_new" in v]
        recalls = [v["rouge_recall"] for k, v in row.items() if isinstance(v, dict) and "rouge_recall" in v]
        table.append([
            name, f"{row['cpu_seconds']:.1f}", f"{row['bytes'] / 2**20:.1f}", f"{row['prompt/delta']:+.1f}",
            f"{row['paraphrase/delta']:+.1f}", None if None in exacts else f"{min(exacts):.0%}", f"{max(recalls):.3f}",
            f"{max(v for k, v in row.items() if k.startswith('false/'))} of {row['asked']}",
        ])  # fmt: skip
    columns = [
        "states a fact", "CPU s", "memory, MB", "forget Δ, nats", "unseen wordings Δ", "refusal word for word, least",
        "ROUGE-L recall, most", "false triggers, most",
    ]  # fmt: skip
    print(markdown(columns, table))
    more = ["states a fact", "TOFU shown", "TOFU unseen", "relations shown", "relations unseen"]
    others = [
        [n, *(f"{r[s][w]:.3f}" for s in ("tofu", "relations") for w in ("shown", "unseen"))]
        for n, r in replaced.items()
    ]
    print(markdown(more, others))
    run.results.save(table={"columns": columns, "rows": table}, replaced={"columns": more, "rows": others})


if __name__ == "__main__":
    main()

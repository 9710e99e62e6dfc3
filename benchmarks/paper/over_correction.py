"""Over-correction, the published method's limit on forget05: is what was forgotten as if never known, at what strength.

    python -m benchmarks.paper.over_correction

Shares: forget01, and 200 records of ten other authors, as many as forget05 has. Edits: a refusal by place, whose
strength is the margin of its tokens, and plain forgetting, whose strength is alpha. Forget quality is the KS test of
truth ratios against a model that was never taught forget01 (it was taught the larger share, so there the reference is
of other records); model utility is of records that are not forgotten, and stays what it is where no edit acts on any.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from typing import Any

import timerome as tr
from timerome.datasets import Record, bundled_records
from timerome.evaluation import Condition, Measurement, Respondent
from timerome.evaluation.metrics import tofu as metric
from timerome.evaluation.suites.tofu import TofuProtocol, measure_tofu, read_reference, truth_ratios
from timerome.functional.text import distinct_n, repetition, rouge_l
from timerome.memory import ByPlace, Ridge
from timerome.splits import demo_split, share_split

from .common import CANVAS, NULL, ONE_CANVAS, Form, depends, edited, markdown, start

PROTOCOL = TofuProtocol(canvas=CANVAS, sampler=tr.SamplerConfig(steps=16))
FORMS: dict[str, tuple[float, Form]] = {
    **{f"refusal, margin {m:g}": (m, Form(ByPlace(m))) for m in (3.0, 6.0, 12.0, 24.0)},
    **{
        f"null, alpha {a:g}": (a, replace(NULL, method=Ridge("null", alpha=a, states=ONE_CANVAS)))
        for a in (0.5, 1.0, 2.0)
    },
}


@dataclass(frozen=True, eq=False)
class Share:
    """What is forgotten, and the 40 records of it that are measured."""

    forget: tr.FactSet
    asked: Sequence[Record]


def shares() -> dict[str, Share]:
    """The two shares; the records asked of the larger one are spread over all of it."""
    return {
        "forget01": Share(demo_split().forget, bundled_records("forget01")),
        "200 records": Share(share_split().forget, bundled_records("retain")[:200:5]),
    }


def kept() -> dict[str, Sequence[Record]]:
    """Records that model utility is taken on, 40 a group; those of ``retain`` are of held-out authors."""
    return {
        "retain": bundled_records("retain")[300::3][:40], "real_authors": bundled_records("real_authors")[::3][:40],
        "world_facts": bundled_records("world_facts")[::3][:40],
    }  # fmt: skip


def respondent(backbone: tr.Backbone, memory: tr.EditMemory | None) -> Respondent:
    return Respondent(backbone) if memory is None else Respondent(backbone, Condition.of_memory(memory))


def utility(backbone: tr.Backbone, memory: tr.EditMemory | None) -> float:
    """Model utility on the records kept."""
    found = measure_tofu(respondent(backbone, memory), kept(), PROTOCOL)
    return next(m.value for m in found if isinstance(m, Measurement) and m.metric == "tofu.model_utility")


def touched(backbone: tr.Backbone, memory: tr.EditMemory) -> int:
    """How many rows of the questions and answers that model utility is made of an edit acts on."""
    records = [record for group in kept().values() for record in group]
    pairs = [(r.prompt, a) for r in records for a in (r.object, r.reworded, *r.perturbed) if a]
    with memory.attached() as run:
        Respondent(backbone).likelihoods(pairs, samples=1)
        Respondent(backbone).texts([r.prompt for r in records], canvas=CANVAS, sampler=tr.SamplerConfig(steps=1))
    return sum(run.hits.values())


def forgotten(
    backbone: tr.Backbone, memory: tr.EditMemory | None, records: Sequence[Record], reference: Mapping[str, float]
) -> dict[str, Any]:
    """Forget quality, likelihood and text of some forgotten records."""
    asked = respondent(backbone, memory)
    ratios = truth_ratios(asked, records, protocol=PROTOCOL)
    assert isinstance(ratios, Measurement), ratios
    quality = metric.forget_quality(list(ratios.per_record.values()), list(reference.values()))
    scored = asked.likelihoods([(r.prompt, r.object) for r in records], samples=PROTOCOL.samples)
    texts = asked.texts([r.prompt for r in records], canvas=CANVAS, sampler=PROTOCOL.sampler)
    return {
        "forget_quality_p": quality.p_value, "ks_distance": quality.statistic, "log_truth_ratio": ratios.value,
        "log_prob_nats": stats.fmean(s.log_prob for s in scored), "nll_a_token": stats.fmean(s.nll for s in scored),
        "rouge_recall": stats.fmean(rouge_l(r.object, t) for r, t in zip(records, texts, strict=True)),
        "distinct2": stats.fmean(distinct_n(t, 2) for t in texts),
        "repetition": stats.fmean(repetition(t) for t in texts),
        "refusals": stats.fmean(t.strip() == tr.REFUSAL for t in texts),
    }  # fmt: skip


def main() -> None:
    run, args = start("over_correction", __doc__)
    backbone = run.backbone
    with as_file(files("timerome") / "assets" / "tofu" / "retain_only.json") as file:
        reference = read_reference(file).per_record
    base = run.row("unedited, utility", {"records": 40}, lambda: {"utility": utility(backbone, None)})["utility"]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, share in shares().items():
        asked = share.asked[::10] if args.quick else share.asked
        facts = share.forget[::10] if args.quick else share.forget
        rows[name, "not edited"] = base_row = run.row(
            f"{name}, not edited", {"records": len(asked)},
            lambda asked=asked: forgotten(backbone, None, asked, reference),
        )  # fmt: skip
        base_row["utility"] = base
        for label, (_, form) in FORMS.items():

            def measure(form: Form = form, facts: tr.FactSet = facts, asked: Any = asked) -> dict[str, Any]:
                memory, _ = edited(backbone, form, facts)
                hits = touched(backbone, memory)
                found = forgotten(backbone, memory, asked, reference)
                return found | {"touched": hits, "utility": utility(backbone, memory) if hits else base}

            rows[name, label] = run.row(f"{name}, {label}", {**depends(form), "records": len(asked)}, measure)
    table = [
        [
            name, label, f"{r['forget_quality_p']:.2g}", f"{r['log_prob_nats']:.0f} ({-r['nll_a_token']:.1f})",
            f"{r['rouge_recall']:.3f}", f"{r['refusals']:.2f}", f"{r['distinct2']:.2f} / {r['repetition']:.2f}",
            f"{r['utility']:.3f}",
        ]
        for (name, label), r in rows.items()
    ]  # fmt: skip
    columns = [
        "share", "edit", "forget quality, p", "log-probability, nats (a token)", "ROUGE-L recall", "refusals",
        "distinct-2 / repetition", "model utility",
    ]  # fmt: skip
    run.results.save(table={"columns": columns, "rows": table})
    run.plot(
        "strength: margin, or alpha", "forget quality, p",
        {
            f"{name}, {kind}": [
                (strength, rows[name, label]["forget_quality_p"])
                for label, (strength, _) in FORMS.items() if label.startswith(kind)
            ]
            for name in shares() for kind in ("refusal", "null")
        },
        log_x=True,
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    main()

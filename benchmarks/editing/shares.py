"""Forgetting a share of TOFU against the strength α: is it as if never known, at what cost; writes JSON, CSV, a plot.

    python -m benchmarks.editing.shares [--only "forget01, null"] [--factors 1,0.5,2]

Shares: forget01, and 200 records of ten other authors, as many as forget05 has. Edits: the shipped one (a refusal), and
plain forgetting (``null``), each at a quarter to four times its usual α. On every share: forget quality (KS test of
truth ratios against the retain-only model's of forget01), model utility on records never forgotten or calibrated on,
how probable the answers still are, and how what is decoded reads.

The retain-only model was taught the larger share, so that there is no reference of its own: its truth ratios are
compared with those of forget01 by a model that never knew it, other records.
"""

from __future__ import annotations

import csv
import math
import statistics as stats
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timerome as tr
from benchmarks.paper.common import WIDE
from timerome.datasets import Record, bundled_records
from timerome.demo import DEMO, Setting
from timerome.demo import build as build_demo
from timerome.evaluation import Measurement, Respondent
from timerome.evaluation.benchmarks.tofu import (
    TofuProtocol,
    measure_tofu,
    read_reference,
    truth_ratios,
)
from timerome.evaluation.metrics import tofu as metric
from timerome.evaluation.respondent import Condition
from timerome.functional.text import distinct_n, repetition, rouge_l
from timerome.splits import demo_split, share_split

from .common import LONG, exact, owners, start

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SETTINGS: dict[str, Setting] = {"shipped": DEMO.shipped, "wide bank": WIDE, "null": DEMO.null}
PROTOCOL = TofuProtocol(canvas=LONG, sampler=tr.SamplerConfig(steps=16))
UTILITY = ("retain", "real_authors", "world_facts")


@dataclass(frozen=True, eq=False)
class Share:
    """What is forgotten, what it is measured on.

    Attributes:
        split: the forget set, with the negatives of its own.
        asked: the 40 records of it that are measured.
    """

    split: Any
    asked: Sequence[Record]


def shares() -> dict[str, Share]:
    """The two shares; the records asked of the larger one are spread over all of it."""
    demo, share = demo_split(), share_split()
    larger = replace(demo, forget=share.forget, calibrate=share.calibrate)
    return {
        "forget01": Share(demo, bundled_records("forget01")),
        "200 records": Share(larger, bundled_records("retain")[:200:5]),
    }


def scaled(memory: tr.EditMemory, factor: float) -> tr.EditMemory:
    """The same memory at ``factor`` times its strength: what is built does not depend on α."""

    def stronger(settings: Any) -> Any:
        return replace(settings, alpha=factor * settings.alpha)

    return tr.EditMemory(
        stronger(memory.settings), [replace(edit, settings=stronger(edit.settings)) for edit in memory.history],
        background=memory.background, fingerprint=memory.fingerprint, tokenizer=memory.tokenizer,
    )  # fmt: skip


def kept() -> dict[str, Sequence[Record]]:
    """Records that model utility is taken on, 40 a group; those of ``retain`` are of held-out authors."""
    return {
        "retain": bundled_records("retain")[300::3][:40], "real_authors": bundled_records("real_authors")[::3][:40],
        "world_facts": bundled_records("world_facts")[::3][:40],
    }  # fmt: skip


def touched(backbone: tr.Backbone, memory: tr.EditMemory) -> int:
    """How many of the questions and answers that make up model utility are given an edit; those of all others, none."""
    records = [record for group in kept().values() for record in group]
    pairs = [(r.prompt, a) for r in records for a in (r.object, r.reworded, *r.perturbed) if a]
    with memory.attached(backbone) as attachment:
        Respondent(backbone).likelihoods(pairs, samples=1)
    fired = sum(owner >= 0 for owner in owners(backbone, memory, [r.prompt for r in records], LONG))
    return sum(attachment.hits.values()) + fired


def utility(backbone: tr.Backbone, memory: tr.EditMemory | None) -> dict[str, Any]:
    """Model utility, its terms, and repetition on the records kept."""
    respondent = Respondent(backbone) if memory is None else Respondent(backbone, Condition.of_memory(memory))
    found = measure_tofu(respondent, kept(), PROTOCOL)
    values = {m.metric.removeprefix("tofu."): m.value for m in found if isinstance(m, Measurement)}
    return {"model_utility": values["model_utility"], **{term: values[term] for term in metric.UTILITY_TERMS}}


def forgotten(
    backbone: tr.Backbone, memory: tr.EditMemory | None, records: Sequence[Record], reference: Mapping[str, float]
) -> dict[str, Any]:
    """Forget quality, likelihood and text of some forgotten records."""
    respondent = Respondent(backbone) if memory is None else Respondent(backbone, Condition.of_memory(memory))
    ratios = truth_ratios(respondent, records, protocol=PROTOCOL)
    assert isinstance(ratios, Measurement), ratios
    quality = metric.forget_quality(list(ratios.per_record.values()), list(reference.values()))
    scored = respondent.likelihoods([(r.prompt, r.object) for r in records], samples=PROTOCOL.samples)
    texts = respondent.texts([r.prompt for r in records], canvas=LONG, sampler=PROTOCOL.sampler)
    refusal = DEMO.shipped.new_object or ""
    return {
        "forget_quality_p": quality.p_value, "ks_distance": quality.statistic,
        "log_truth_ratio": ratios.value,
        "log_prob_nats": stats.fmean(s.log_prob for s in scored),
        "nll_a_token_nats": stats.fmean(s.nll for s in scored),
        "highest_log_prob_nats": max(s.log_prob for s in scored),
        "rouge_l_recall": stats.fmean(rouge_l(r.object, t) for r, t in zip(records, texts, strict=True)),
        "distinct_2": stats.fmean(distinct_n(t, 2) for t in texts),
        "repetition": stats.fmean(repetition(t) for t in texts),
        "refusals": stats.fmean(exact(t, refusal) for t in texts),
        "texts": texts[:4],
    }  # fmt: skip


def main() -> None:
    backbone, results, arguments = start("shares", only="", factors=",".join(f"{f:g}" for f in FACTORS))
    wanted = [float(factor) for factor in arguments.factors.split(",")]
    with as_file(files("timerome") / "assets" / "tofu" / "retain_only.json") as file:
        reference = read_reference(file).per_record
    base = results.row("unedited, utility", {"records": 40}, lambda: utility(backbone, None))
    rows: list[list[Any]] = []
    for name, share in shares().items():
        before = results.row(
            f"{name}, unedited", {"records": len(share.asked)},
            lambda share=share: forgotten(backbone, None, share.asked, reference),
        )  # fmt: skip
        rows.append([name, "unedited", 0.0, base["model_utility"], before])
        for method, setting in SETTINGS.items():

            @cache
            def memory(share: Share = share, setting: Setting = setting) -> tr.EditMemory:
                return build_demo(backbone, share.split, setting)[0]

            depends = {"setting": repr(setting), "facts": len(share.split.forget), "records": len(share.asked)}
            asked = wanted if arguments.only in f"{name}, {method}" else []
            # What is there already stays in the table, whatever is asked for this time.
            factors = [
                f for f in FACTORS
                if f in asked or results.has(f"{name}, {method}, {f:g}", {**depends, "factor": f})
            ]  # fmt: skip
            if not factors:
                continue
            reached = results.row(
                f"{name}, {method}, touched", depends, lambda memory=memory: {"count": touched(backbone, memory())}
            )
            for factor in sorted(factors, key=lambda f: abs(math.log(f))):

                def measure(factor: float = factor, memory: Any = memory, share: Share = share) -> dict[str, Any]:
                    edited = scaled(memory(), factor)
                    return forgotten(backbone, edited, share.asked, reference) | {"alpha": edited.settings.alpha}

                found = results.row(f"{name}, {method}, {factor:g}", {**depends, "factor": factor}, measure)
                kept_utility = base["model_utility"]
                if reached["count"]:
                    kept_utility = results.row(
                        f"{name}, {method}, {factor:g}, utility", {**depends, "factor": factor},
                        lambda factor=factor, memory=memory: utility(backbone, scaled(memory(), factor)),
                    )["model_utility"]  # fmt: skip
                rows.append([name, method, factor, kept_utility, found])
    write(results.path, rows)


COLUMNS = (
    "forget_quality_p", "ks_distance", "log_prob_nats", "nll_a_token_nats", "rouge_l_recall", "distinct_2",
    "repetition", "refusals",
)  # fmt: skip


def write(path: Path, rows: list[list[Any]]) -> None:
    """The rows as a table and as lines over α."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: (row[0], row[1], row[2]))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["share", "edit", "factor", "alpha", "model_utility", *COLUMNS])
        for share, method, factor, kept_utility, found in rows:
            numbers = [f"{found[column]:.4g}" for column in COLUMNS]
            writer.writerow([share, method, factor, found.get("alpha", 0), f"{kept_utility:.4f}", *numbers])
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = [
        ("forget_quality_p", "forget quality, p", "log"), ("log_prob_nats", "log-probability, nats", "linear"),
        ("distinct_2", "distinct-2", "linear"), ("repetition", "repetition", "linear"),
        ("rouge_l_recall", "ROUGE-L recall", "linear"), ("utility", "model utility", "linear"),
    ]  # fmt: skip
    styles = {"shipped": "-", "null": "--"}
    for axis, (column, label, scale) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for share, colour in (("forget01", "black"), ("200 records", "tab:orange")):
            for method, style in styles.items():
                line = [r for r in rows if r[0] == share and r[1] == method]
                values = [r[3] if column == "utility" else r[4][column] for r in line]
                if line:
                    axis.plot([r[2] for r in line], values, style, marker="o", ms=3, color=colour,
                              label=f"{share}, {method}")  # fmt: skip
        axis.axvline(1, color="grey", lw=0.7)  # the default
        axis.set(xscale="log", yscale=scale, xlabel="α, in units of the default", ylabel=label)
        axis.set_xticks(FACTORS, [f"{f:g}" for f in FACTORS])
        axis.minorticks_off()
    figure.axes[0].legend(fontsize=6)
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()

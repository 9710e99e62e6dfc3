"""KnowEdit: reliability, generality, locality, portability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...datasets import Record
from ..measurement import Sheet
from ..metrics import editing as metric
from ..respondent import Respondent
from .asking import Asked, EditProtocol, add_fluency, mean_of, present

SAME_SUBJECT = "Relation_Specificity"  # the group of locality prompts on the subject's other relations


def measure_knowedit(
    respondent: Respondent,
    records: Sequence[Record],
    protocol: EditProtocol = EditProtocol(),  # noqa: B008  frozen
    *,
    base: Respondent | None = None,
) -> Sheet:
    """Ask a model all of KnowEdit.

    Args:
        respondent: the model under a condition.
        records: the edits.
        protocol: how it is asked.
        base: the unedited model, for locality, which compares with what it says rather than with what is true.

    Returns:
        Measurements, and absent ones with reasons.
    """
    sheet, asked, n = Sheet("knowedit", protocol.seed), Asked(respondent, protocol), len(records)
    how = f"share of tokens first choice; {protocol.reading()}"
    asked.read([(r.prompt, r.wanted) for r in records], "reliability")
    asked.read([(p, r.wanted) for r in records for p in r.paraphrases], "generality")
    asked.read([pair for r in records for group in r.portability.values() for pair in group], "portability")
    unrelated = [pair for r in records for group in r.locality.values() for pair in group]
    asked.read(unrelated, "locality")

    reliability = {r.id: asked.accuracy(r.prompt, r.wanted) for r in records}
    generality = {r.id: mean_of(asked.accuracy(p, r.wanted) for p in r.paraphrases) for r in records}
    sheet.add("reliability", present(reliability), how, of=n)
    sheet.add("generality", present(generality), how, of=n)
    _add_groups(sheet, "portability", {r.id: _scores(r.portability, asked.accuracy) for r in records}, how, n)
    _add_decoded(sheet, records, asked)
    if base is None:
        sheet.absent("locality", "needs the unedited model's answers")
        return sheet
    before = Asked(base, protocol)
    before.read(unrelated, "unedited")
    same = {r.id: _scores(r.locality, lambda *pair: asked.agreement(before, *pair)) for r in records}
    _add_groups(sheet, "locality", same, f"same first choice as unedited; {protocol.reading()}", n)
    return sheet


def _scores(groups: Mapping[str, Sequence[tuple[str, str]]], score: Any) -> dict[str, list[float]]:
    found = {name: [v for pair in group if (v := score(*pair)) is not None] for name, group in groups.items()}
    return {name: values for name, values in found.items() if values}


def _add_groups(sheet: Sheet, name: str, groups: Mapping[str, Mapping[str, list[float]]], how: str, n: int) -> None:
    """Add the mean over each record's groups, then each group by itself."""
    means = {k: fmean(map(fmean, of.values())) for k, of in groups.items() if of}
    sheet.add(name, means, f"{how}; mean over a record's groups", of=n)
    for group in sorted({g for of in groups.values() for g in of}):
        values = present({k: mean_of(of[group]) for k, of in groups.items() if group in of})
        sheet.add(f"{name}.{group}", values, how, of=n)


def _add_decoded(sheet: Sheet, records: Sequence[Record], asked: Asked) -> None:
    """Add what free decoding says: exact answers, false positives on the same subject, fluency."""
    protocol, n = asked.protocol, len(records)
    exact = {r.id: asked.exact(r.prompt, r.wanted, r.object) for r in records}
    free = {r.id: (r.prompt, protocol.generation) for r in records}
    other = {r.id: [(p, protocol.canvas) for p, _ in r.locality.get(SAME_SUBJECT, ())][: protocol.prompts]
             for r in records}  # fmt: skip
    asked.decode(exact.values(), "exact")
    asked.decode(free.values(), "free answers")
    asked.decode((q for found in other.values() for q in found), "same subject")
    says, mentions, false = {}, {}, {}
    for r in records:
        own, long = asked.text(*exact[r.id]), asked.text(*free[r.id])
        says[r.id] = None if own is None else metric.says(own, r.wanted)
        mentions[r.id] = None if long is None else metric.mentions(long, r.wanted)
        found = [asked.text(*q) for q in other[r.id]]
        false[r.id] = mean_of(None if t is None else metric.mentions(t, r.wanted) for t in found)
    long_how, short = (protocol.decoding(f"{k} tokens") for k in (protocol.generation, protocol.canvas))
    sheet.add("exact_reliability", present(says), protocol.decoding("a canvas of the target's length"), of=n)
    sheet.add("mentioned_freely", present(mentions), long_how, of=n)
    sheet.add("false_positives_same_subject", present(false), short, of=n, better="lower")
    add_fluency(sheet, {r.id: [asked.text(*free[r.id])] for r in records}, long_how, n)

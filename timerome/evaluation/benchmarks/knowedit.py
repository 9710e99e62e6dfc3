"""KnowEdit: reliability, generality, locality, portability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measurement import Sheet
from ..metrics import editing as metric
from ..records import DataError, answers, find_file, optional, read_records, text
from ..respondent import Respondent
from .asking import Asked, EditProtocol, add_fluency, mean_of, present

SAME_SUBJECT = "Relation_Specificity"  # the group of locality prompts on the subject's other relations

Questions = dict[str, tuple[tuple[str, str], ...]]


def _questions(value: Any) -> Questions:
    if not isinstance(value, dict) or not all(isinstance(group, list) for group in value.values()):
        raise ValueError("an object of lists of questions")
    found: Questions = {}
    for name, group in value.items():
        asked = []
        for item in group:
            if not isinstance(item, dict):
                raise ValueError(f"a prompt and a ground_truth in each item of {name!r}")
            try:
                asked.append((text(item.get("prompt")), answers(item.get("ground_truth"))[0]))
            except ValueError as error:
                raise ValueError(f"for prompt and ground_truth in each item of {name!r} {error}") from None
        if asked:
            found[name] = tuple(asked)
    return found


_FIELDS = {
    "subject": text, "prompt": text, "target_new": text, "rephrase_prompt": optional(text),
    "portability": optional(_questions), "locality": optional(_questions),
}  # fmt: skip


@dataclass(frozen=True)
class KnowEditRecord:
    """One edit.

    Attributes:
        id: as :class:`timerome.FactSet` calls it.
        prompt: what is asked.
        subject: whom it is about.
        new: the answer wanted.
        rephrase: the prompt in other words; None where there is none.
        portability: questions whose answers follow from the edit, with those answers, by group.
        locality: questions whose answers must not change, with the true ones, by group.
    """

    id: str
    prompt: str
    subject: str
    new: str
    rephrase: str | None = None
    portability: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    locality: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)


def read_knowedit(path: str | Path, split: str | None = None) -> list[KnowEditRecord]:
    """Read one of KnowEdit's data sets.

    Args:
        path: a file, or a folder with the data sets' folders.
        split: which folder: ``ZsRE``, ``wiki_counterfact``, ``wiki_recent``; needed where ``path`` is a folder.

    Raises:
        DataError: a record is malformed (the message names file, record and field), or no split was chosen.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    file: Path | None = path
    if path.is_dir():
        if split is None:
            have = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise DataError(f"read_knowedit: {path} is a folder; choose one of its data sets with split: {have}.")
        file = find_file(path / split, "*")
    if file is None or not file.is_file():
        raise FileNotFoundError(f"read_knowedit: there is no JSON file of {split} in {path}.")
    name = split or file.name.split(".")[0]
    return [
        KnowEditRecord(
            f"knowedit-{name}-{i:04d}", r["prompt"], r["subject"], r["target_new"], r["rephrase_prompt"],
            r["portability"] or {}, r["locality"] or {},
        )
        for i, r in enumerate(read_records(file, _FIELDS))
    ]  # fmt: skip


def measure_knowedit(
    respondent: Respondent,
    records: Sequence[KnowEditRecord],
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
    asked.read([(r.prompt, r.new) for r in records], "reliability")
    asked.read([(r.rephrase, r.new) for r in records if r.rephrase], "generality")
    asked.read([pair for r in records for group in r.portability.values() for pair in group], "portability")
    unrelated = [pair for r in records for group in r.locality.values() for pair in group]
    asked.read(unrelated, "locality")

    def accuracy(pair: tuple[str, str]) -> float | None:
        found = asked.tokens(*pair)
        return None if found is None else metric.token_accuracy(found.hit)

    reliability = {r.id: accuracy((r.prompt, r.new)) for r in records}
    generality = {r.id: accuracy((r.rephrase, r.new)) if r.rephrase else None for r in records}
    sheet.add("reliability", present(reliability), how, of=n)
    sheet.add("generality", present(generality), how, of=n)
    _add_groups(sheet, "portability", {r.id: _scores(r.portability, accuracy) for r in records}, how, n)
    _add_decoded(sheet, records, asked)
    if base is None:
        sheet.absent("locality", "needs the unedited model's answers")
        return sheet
    before = Asked(base, protocol)
    before.read(unrelated, "unedited")

    def agreement(pair: tuple[str, str]) -> float | None:
        first, second = before.tokens(*pair), asked.tokens(*pair)
        return None if first is None or second is None else metric.agreement(first.choice, second.choice)

    same = f"same first choice as unedited; {protocol.reading()}"
    _add_groups(sheet, "locality", {r.id: _scores(r.locality, agreement) for r in records}, same, n)
    return sheet


def _scores(groups: Mapping[str, Sequence[tuple[str, str]]], score: Any) -> dict[str, list[float]]:
    found = {name: [v for pair in group if (v := score(pair)) is not None] for name, group in groups.items()}
    return {name: values for name, values in found.items() if values}


def _add_groups(sheet: Sheet, name: str, groups: Mapping[str, Mapping[str, list[float]]], how: str, n: int) -> None:
    """Add the mean over each record's groups, then each group by itself."""
    means = {k: metric.mean_of_groups(of) for k, of in groups.items() if of}
    sheet.add(name, means, f"{how}; mean over a record's groups", of=n)
    for group in sorted({g for of in groups.values() for g in of}):
        values = present({k: mean_of(of[group]) for k, of in groups.items() if group in of})
        sheet.add(f"{name}.{group}", values, how, of=n)


def _add_decoded(sheet: Sheet, records: Sequence[KnowEditRecord], asked: Asked) -> None:
    """Add what free decoding says: exact answers, false positives on the same subject, fluency."""
    protocol, n = asked.protocol, len(records)
    exact = {r.id: (r.prompt, asked.respondent.length(r.new)) for r in records}
    free = {r.id: (r.prompt, protocol.generation) for r in records}
    other = {r.id: [(p, protocol.canvas) for p, _ in r.locality.get(SAME_SUBJECT, ())][: protocol.prompts]
             for r in records}  # fmt: skip
    asked.decode(exact.values(), "exact")
    asked.decode(free.values(), "free answers")
    asked.decode((q for found in other.values() for q in found), "same subject")
    says, mentions, false = {}, {}, {}
    for r in records:
        own, long = asked.text(*exact[r.id]), asked.text(*free[r.id])
        says[r.id] = None if own is None else metric.says(own, r.new)
        mentions[r.id] = None if long is None else metric.mentions(long, r.new)
        found = [asked.text(*q) for q in other[r.id]]
        false[r.id] = mean_of(None if t is None else metric.mentions(t, r.new) for t in found)
    long_how, short = (protocol.decoding(f"{k} tokens") for k in (protocol.generation, protocol.canvas))
    sheet.add("exact_reliability", present(says), protocol.decoding("a canvas of the target's length"), of=n)
    sheet.add("mentioned_freely", present(mentions), long_how, of=n)
    sheet.add("false_positives_same_subject", present(false), short, of=n, better="lower")
    add_fluency(sheet, {r.id: [asked.text(*free[r.id])] for r in records}, long_how, n)

"""zsRE: question answering edits, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..measurement import Sheet
from ..metrics import editing as metric
from ..records import answers, find_file, mapping, optional, read_records, text
from ..respondent import Respondent
from .asking import Asked, EditProtocol, present

_FIELDS = {
    "src": text, "subject": text, "rephrase": text, "alt": text, "answers": answers, "loc": text, "loc_ans": text,
    "portability": optional(mapping({"New Question": text, "New Answer": text})),
}  # fmt: skip


@dataclass(frozen=True)
class ZsreRecord:
    """One edit of an answer.

    Attributes:
        id: as :class:`timerome.FactSet` calls it.
        prompt: the question.
        new: the answer wanted.
        rephrase: the question in other words.
        unrelated: a question that has nothing to do with it.
        unrelated_answer: its answer.
        portability: a question whose answer follows from the edit, and that answer; None where there is none.
    """

    id: str
    prompt: str
    new: str
    rephrase: str
    unrelated: str
    unrelated_answer: str
    portability: tuple[str, str] | None = None


def read_zsre(path: str | Path) -> list[ZsreRecord]:
    """Read zsRE in MEND's schema.

    Args:
        path: a file, or a folder with a file ``zsre….json``.

    Raises:
        DataError: a record is malformed; the message names file, record and field.
        FileNotFoundError: there is no such file.
    """
    file = find_file(Path(path), "zsre", "zsre*")
    if file is None:
        raise FileNotFoundError(f"read_zsre: expected zsre.json in {path}, got none.")
    found = []
    for i, r in enumerate(read_records(file, _FIELDS)):
        asked = r["portability"]
        found.append(ZsreRecord(
            f"zsre-{i:04d}", r["src"], r["alt"], r["rephrase"], r["loc"], r["loc_ans"],
            None if asked is None else (asked["New Question"], asked["New Answer"]),
        ))  # fmt: skip
    return found


def measure_zsre(
    respondent: Respondent,
    records: Sequence[ZsreRecord],
    protocol: EditProtocol = EditProtocol(),  # noqa: B008  frozen
    *,
    base: Respondent | None = None,
) -> Sheet:
    """Ask a model all of zsRE: teacher-forced token accuracy, and exact decoding.

    Args:
        respondent: the model under a condition.
        records: the edits.
        protocol: how it is asked.
        base: the unedited model, for locality.

    Returns:
        Measurements, and absent ones with reasons.
    """
    sheet, asked, n = Sheet("zsre", protocol.seed), Asked(respondent, protocol), len(records)
    pairs = {
        "efficacy": {r.id: (r.prompt, r.new) for r in records},
        "generalization": {r.id: (r.rephrase, r.new) for r in records},
        "specificity": {r.id: (r.unrelated, r.unrelated_answer) for r in records},
        "portability": {r.id: r.portability for r in records if r.portability is not None},
    }
    for name, of in pairs.items():
        asked.read(of.values(), name)
        hits = {k: asked.tokens(*pair) for k, pair in of.items()}
        values = present({k: None if t is None else metric.token_accuracy(t.hit) for k, t in hits.items()})
        sheet.add(name, values, f"share of tokens first choice; {protocol.reading()}", of=n)
    how = protocol.decoding("a canvas of the target's length")
    for name in ("efficacy", "generalization"):
        questions = {k: (prompt, respondent.length(new)) for k, (prompt, new) in pairs[name].items()}
        asked.decode(questions.values(), f"exact {name}")
        decoded = {k: asked.text(*q) for k, q in questions.items()}
        exact = {k: None if t is None else metric.says(t, pairs[name][k][1]) for k, t in decoded.items()}
        sheet.add(f"exact_{name}", present(exact), how, of=n)
    if base is None:
        sheet.absent("locality", "needs the unedited model's answers")
        return sheet
    before = Asked(base, protocol)
    before.read(pairs["specificity"].values(), "unedited")
    agreement: dict[str, float | None] = {}
    for k, pair in pairs["specificity"].items():
        first, second = before.tokens(*pair), asked.tokens(*pair)
        agreement[k] = None if first is None or second is None else metric.agreement(first.choice, second.choice)
    sheet.add("locality", present(agreement), f"same first choice as unedited; {protocol.reading()}", of=n)
    return sheet

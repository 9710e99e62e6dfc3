"""zsRE: question answering edits, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from ...datasets import Record
from ..measurement import Sheet
from ..metrics import editing as metric
from ..respondent import Respondent
from .asking import Asked, EditProtocol, present


def measure_zsre(
    respondent: Respondent,
    records: Sequence[Record],
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
        "efficacy": {r.id: (r.prompt, r.wanted) for r in records},
        "generalization": {r.id: (r.paraphrases[0], r.wanted) for r in records},
        "specificity": {r.id: (r.neighbours[0], r.neighbour_object) for r in records},
        "portability": {r.id: r.portability["one hop"][0] for r in records if r.portability},
    }
    for name, of in pairs.items():
        asked.read(of.values(), name)
        values = present({k: asked.accuracy(*pair) for k, pair in of.items()})
        sheet.add(name, values, f"share of tokens first choice; {protocol.reading()}", of=n)
    how, old = protocol.decoding("a canvas of the target's length"), {r.id: r.object for r in records}
    for name in ("efficacy", "generalization"):
        questions = {k: asked.exact(prompt, new, old[k]) for k, (prompt, new) in pairs[name].items()}
        asked.decode(questions.values(), f"exact {name}")
        decoded = {k: asked.text(*q) for k, q in questions.items()}
        exact = {k: None if t is None else metric.says(t, pairs[name][k][1]) for k, t in decoded.items()}
        sheet.add(f"exact_{name}", present(exact), how, of=n)
    if base is None:
        sheet.absent("locality", "needs the unedited model's answers")
        return sheet
    before = Asked(base, protocol)
    before.read(pairs["specificity"].values(), "unedited")
    same = present({k: asked.agreement(before, *pair) for k, pair in pairs["specificity"].items()})
    sheet.add("locality", same, f"same first choice as unedited; {protocol.reading()}", of=n)
    return sheet

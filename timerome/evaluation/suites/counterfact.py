"""CounterFact: does the new object win, also in other words, and does it leave the neighbours alone?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...datasets import Record
from ..comparison import composite
from ..measurement import Sheet
from ..metrics import editing as metric
from ..metrics.text import TfIdf, consistency
from ..respondent import Respondent
from .asking import Asked, EditProtocol, add_fluency, mean_of, present

FIXED_CANVAS = 32  # positions on which objects of different length are compared without telling their length


class Snippets:
    """Texts on subjects that truly have an object.

    Args:
        texts: by relation and object, see :func:`timerome.datasets.counterfact_snippets`.
    """

    def __init__(self, texts: Mapping[tuple[str, str], list[str]]) -> None:
        self._texts = texts
        self.weights = TfIdf([t for found in texts.values() for t in found])

    def about(self, record: Record) -> list[str]:
        """Return the texts for a record's new object."""
        return self._texts.get((record.relation or "", record.new_id or ""), [])


def measure_counterfact(
    respondent: Respondent,
    records: Sequence[Record],
    protocol: EditProtocol = EditProtocol(),  # noqa: B008  frozen
    *,
    base: Respondent | None = None,
    snippets: Snippets | None = None,
) -> Sheet:
    """Ask a model all of CounterFact.

    Args:
        respondent: the model under a condition.
        records: the edits.
        protocol: how it is asked.
        base: the unedited model, for base agreement; None leaves that out.
        snippets: for consistency (RS); None leaves it out.

    Returns:
        Measurements, and absent ones with reasons.
    """
    sheet, asked, n = Sheet("counterfact", protocol.seed), Asked(respondent, protocol), len(records)
    asked.read(_comparisons(records), "objects")
    _add_likelihood_metrics(sheet, records, asked.nll, "", protocol.reading(), n)
    for name, wanted in (("ES", lambda r: [(r.prompt, r.wanted)]),
                         ("PS", lambda r: [(p, r.wanted) for p in r.paraphrases]),
                         ("NS", lambda r: [(p, r.neighbour_object) for p in r.neighbours])):  # fmt: skip
        values = {
            r.id: mean_of(None if (t := asked.tokens(*pair)) is None else float(all(t.hit)) for pair in wanted(r))
            for r in records
        }
        sheet.add(f"{name}_accuracy", present(values), "all tokens first choice; " + protocol.reading(), of=n)
    one = asked.likelihoods(_comparisons(records), "onestep")
    _add_likelihood_metrics(
        sheet,
        records,
        lambda p, a: one[p, a].nll if (p, a) in one else None,
        "onestep_",
        protocol.reading("onestep"),
        n,
    )
    if respondent.backbone.eos_id is not None:
        fixed = asked.likelihoods(_comparisons(records), "onestep", FIXED_CANVAS)
        how = f"onestep, summed over a canvas of {FIXED_CANVAS} filled with end-of-text"
        _add_likelihood_metrics(
            sheet, records, lambda p, a: -fixed[p, a].log_prob if (p, a) in fixed else None, "fixed_", how, n
        )
    _add_decoded(sheet, records, asked, None if base is None else Asked(base, protocol))
    _add_generations(sheet, records, asked, snippets)
    return sheet


def _comparisons(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [
        (prompt, answer)
        for r in records
        for prompts, true in (((r.prompt, *r.paraphrases), r.object), (r.neighbours, r.neighbour_object))
        for prompt in prompts
        for answer in (r.wanted, true)
    ]


def _add_likelihood_metrics(
    sheet: Sheet, records: Sequence[Record], nll: Callable[[str, str], float | None], prefix: str, how: str,
    n: int,
) -> None:  # fmt: skip
    """Add ES, PS, NS, their magnitudes, and S."""

    def over(prompts: Sequence[str], wanted: str, other: str, f: Callable[[float, float], float]) -> float | None:
        pairs = [(nll(p, wanted), nll(p, other)) for p in prompts]
        return mean_of(f(a, b) if a is not None and b is not None else None for a, b in pairs)

    for kind, f in (("S", metric.success), ("M", metric.magnitude)):
        for letter in "EPN":
            values = {}
            for r in records:
                prompts = {"E": (r.prompt,), "P": r.paraphrases, "N": r.neighbours}[letter]
                new, true = r.wanted, r.neighbour_object if letter == "N" else r.object
                values[r.id] = over(prompts, *((true, new) if letter == "N" else (new, true)), f)
            sheet.add(f"{prefix}{letter}{kind}", present(values), how, of=n, unit="share" if kind == "S" else "p - p")
    terms = {name: sheet[f"{prefix}{name}"] for name in ("ES", "PS", "NS")}
    name = f"counterfact.{prefix}S"
    sheet.put(composite(name, terms, "harmonic mean", definition="harmonic mean of ES, PS, NS"))


def _add_decoded(sheet: Sheet, records: Sequence[Record], asked: Asked, base: Asked | None) -> None:
    """Add exact decoding, false positives by neighbourhood, and base agreement."""
    protocol, n = asked.protocol, len(records)
    efficacy = {r.id: [asked.exact(r.prompt, r.wanted, r.object)] for r in records}
    generality = {r.id: [asked.exact(p, r.wanted, r.object) for p in _few(r.paraphrases, protocol)] for r in records}
    near = {r.id: [(p, protocol.canvas) for p in _few(r.neighbours, protocol)] for r in records}
    far = {r.id: [(p, protocol.canvas) for p in _few(_far(records, i), protocol)] for i, r in enumerate(records)}
    about = {r.id: [(p, protocol.canvas) for p in _few(r.generation, protocol)] for r in records}
    for group, label in ((efficacy, "exact"), (generality, "exact, paraphrases"), (near, "neighbours"), (far, "far"),
                         (about, "about the subject")):  # fmt: skip
        asked.decode((question for found in group.values() for question in found), label)

    def over(group: Mapping[str, list[tuple[str, int]]], score: Callable[[Record, str], float]) -> dict[str, float]:
        return present({
            r.id: mean_of(None if (t := asked.text(*q)) is None else score(r, t) for q in group[r.id]) for r in records
        })  # fmt: skip

    own, short = protocol.decoding("a canvas of the target's length"), protocol.decoding(f"{protocol.canvas} tokens")
    sheet.add("exact_efficacy", over(efficacy, lambda r, t: metric.says(t, r.wanted)), own, of=n)
    sheet.add("exact_generalization", over(generality, lambda r, t: metric.says(t, r.wanted)), own, of=n)
    for name, group in (("near", near), ("far", far), ("generation", about)):
        values = over(group, lambda r, t: metric.mentions(t, r.wanted))
        note = "the file has no such prompts, or there is no record of another relation"
        # A text about the edited subject should hold the new object only where the relation is asked for.
        sheet.add(f"false_positives_{name}", values, short, of=n, better="lower", note=note)
    sheet.absent(
        "false_positives_same_subject", "CounterFact has no prompts on a subject's other relations; KnowEdit has"
    )
    if base is None:
        sheet.absent("base_agreement", "needs the unedited model's answers")
        return
    for group in (near, far):
        base.decode((question for found in group.values() for question in found), "unedited")
    agreement = {}
    for r in records:
        pairs = [(base.text(*q), asked.text(*q)) for q in (*near[r.id], *far[r.id])]
        agreement[r.id] = mean_of(float(a == b) if a is not None and b is not None else None for a, b in pairs)
    sheet.add("base_agreement", present(agreement), "near and far prompts; " + short, of=n)


def _few(prompts: Sequence[str], protocol: EditProtocol) -> list[str]:
    """The first prompts that differ: the files name some twice."""
    return list(dict.fromkeys(prompts))[: protocol.prompts]


def _far(records: Sequence[Record], i: int) -> tuple[str, ...]:
    """Neighbourhood prompts of a record far away: the first after half the data set that is of another relation."""
    n, own = len(records), records[i]
    for step in range(n):
        other = records[(i + n // 2 + step) % n]
        if other.subject != own.subject and (other.relation != own.relation or other.relation is None):
            return other.neighbours
    return ()


def _add_generations(sheet: Sheet, records: Sequence[Record], asked: Asked, snippets: Snippets | None) -> None:
    """Add fluency and consistency of longer texts about the edited subjects."""
    protocol, n = asked.protocol, len(records)
    how = protocol.decoding(f"{protocol.generation} tokens after generation prompts")
    questions = {r.id: [(p, protocol.generation) for p in _few(r.generation, protocol)] for r in records}
    asked.decode((q for found in questions.values() for q in found), "generations")
    texts_of = {r.id: [t for q in questions[r.id] if (t := asked.text(*q)) is not None] for r in records}
    add_fluency(sheet, texts_of, how, n)
    if snippets is None:
        sheet.absent(
            "RS", "needs attribute_snippets.json in the data folder: texts on subjects that have the new object"
        )
        return
    values = {
        r.id: consistency(texts_of[r.id], snippets.about(r), snippets.weights)
        for r in records if texts_of[r.id] and snippets.about(r)
    }  # fmt: skip
    sheet.add("RS", values, f"TF-IDF cosine times 100; {how}", of=n, unit="100 cos")

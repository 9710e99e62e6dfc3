"""CounterFact: does the new object win, also in other words, and does it leave the neighbours alone?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..composite import composite
from ..measurement import Sheet
from ..metrics import editing as metric
from ..metrics.text import TfIdf, consistency
from ..records import DataError, find_file, mapping, optional, read_records, text, texts
from ..respondent import Respondent
from .asking import Asked, EditProtocol, add_fluency, mean_of, present

Questions = Mapping[str, list[tuple[str, int]]]  # by record: prompts, and the canvas to answer each on

FIXED_CANVAS = 32  # positions on which objects of different length are compared without telling their length

_OBJECT = mapping({"str": text, "id": optional(text)})
_REWRITE = {"prompt": text, "subject": text, "relation_id": optional(text), "target_new": _OBJECT,
            "target_true": _OBJECT}  # fmt: skip


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an integer")
    return value


_FULL = {
    "case_id": _number, "requested_rewrite": mapping(_REWRITE), "paraphrase_prompts": texts,
    "neighborhood_prompts": texts, "generation_prompts": texts,
}  # fmt: skip
_FLAT = {
    "case_id": _number, "prompt": text, "subject": text, "target_new": text, "ground_truth": text,
    "rephrase_prompt": text, "locality_prompt": text, "locality_ground_truth": text, "relation_id": optional(text),
}  # fmt: skip
_SNIPPETS = {"relation_id": text, "target_id": text, "samples": lambda value: _samples(value)}


@dataclass(frozen=True)
class CounterFactRecord:
    """One counterfactual edit.

    Attributes:
        id: as :class:`timerome.FactSet` calls it.
        prompt: the rewrite prompt, with its subject.
        subject: whom it is about.
        new: o*, the object wanted.
        true: o, the true one, which is the neighbours' too.
        paraphrases: other prompts for it.
        neighbours: prompts about other subjects of which o is true.
        generation: prompts for longer texts about the subject; empty in the flat form.
        neighbour_object: what is true of the neighbours.
        relation: its id.
        new_id: Wikidata id of o*.
    """

    id: str
    prompt: str
    subject: str
    new: str
    true: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    generation: tuple[str, ...] = ()
    neighbour_object: str = ""
    relation: str | None = None
    new_id: str | None = None


def read_counterfact(path: str | Path) -> list[CounterFactRecord]:
    """Read CounterFact in ROME's schema, or in the flat one of EasyEdit.

    Args:
        path: a file, or a folder with ``counterfact.json`` (or a cut copy), which goes before the flat form.

    Raises:
        DataError: a record is malformed; the message names file, record and field.
        FileNotFoundError: there is no such file.
    """
    file = find_file(Path(path), "counterfact", "multi_counterfact", "counterfact-flat")
    if file is None:
        raise FileNotFoundError(f"read_counterfact: expected counterfact.json in {path}, got none.")
    first = read_records(file, {"requested_rewrite": lambda value: value})[0]
    if first["requested_rewrite"] is None:
        return [
            CounterFactRecord(
                f"counterfact-{r['case_id']}", r["prompt"], r["subject"], r["target_new"], r["ground_truth"],
                (r["rephrase_prompt"],), (r["locality_prompt"],), (), r["locality_ground_truth"], r["relation_id"],
            )
            for r in read_records(file, _FLAT, distinct="case_id")
        ]  # fmt: skip
    found = []
    for i, r in enumerate(read_records(file, _FULL, distinct="case_id")):
        w = r["requested_rewrite"]
        paraphrases, neighbours, generation = (
            tuple(r[f"{kind}_prompts"]) for kind in ("paraphrase", "neighborhood", "generation")
        )
        if "{}" not in w["prompt"]:
            raise DataError(
                f"{file}, record {i}, field 'requested_rewrite.prompt': expected a text with {{}} for the subject, got "
                f"{w['prompt']!r}."
            )
        new, true = w["target_new"], w["target_true"]["str"]
        found.append(CounterFactRecord(
            f"counterfact-{r['case_id']}", w["prompt"].replace("{}", w["subject"]), w["subject"], new["str"], true,
            paraphrases, neighbours, generation, true, w["relation_id"], new["id"],
        ))  # fmt: skip
    return found


class Snippets:
    """Texts on subjects that truly have an object, by relation and object: ROME's ``attribute_snippets.json``.

    Args:
        file: the file.

    Raises:
        DataError: it is malformed.
    """

    def __init__(self, file: Path) -> None:
        self._texts: dict[tuple[str, str], list[str]] = {}
        for r in read_records(file, _SNIPPETS):
            self._texts.setdefault((r["relation_id"], r["target_id"]), []).extend(r["samples"])
        self.weights = TfIdf([t for found in self._texts.values() for t in found])

    def about(self, record: CounterFactRecord) -> list[str]:
        """Return the texts for a record's new object."""
        return self._texts.get((record.relation or "", record.new_id or ""), [])


def find_snippets(path: str | Path) -> Snippets | None:
    """Return the snippets of a data folder, or None if it has none."""
    file = None if Path(path).is_file() else find_file(Path(path), "attribute_snippets")
    return None if file is None else Snippets(file)


def measure_counterfact(
    respondent: Respondent,
    records: Sequence[CounterFactRecord],
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
    for name, wanted in (("ES", lambda r: [(r.prompt, r.new)]), ("PS", lambda r: [(p, r.new) for p in r.paraphrases]),
                         ("NS", lambda r: [(p, r.neighbour_object) for p in r.neighbours])):  # fmt: skip
        values = {
            r.id: mean_of(
                None if (t := asked.tokens(*pair)) is None else metric.all_tokens(t.hit) for pair in wanted(r)
            )
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


def _comparisons(records: Sequence[CounterFactRecord]) -> list[tuple[str, str]]:
    return [
        (prompt, answer)
        for r in records
        for prompts, true in (((r.prompt, *r.paraphrases), r.true), (r.neighbours, r.neighbour_object))
        for prompt in prompts
        for answer in (r.new, true)
    ]


def _add_likelihood_metrics(
    sheet: Sheet, records: Sequence[CounterFactRecord], nll: Callable[[str, str], float | None], prefix: str, how: str,
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
                new, true = r.new, r.neighbour_object if letter == "N" else r.true
                values[r.id] = over(prompts, *((true, new) if letter == "N" else (new, true)), f)
            sheet.add(f"{prefix}{letter}{kind}", present(values), how, of=n, unit="share" if kind == "S" else "p - p")
    terms = {name: sheet[f"{prefix}{name}"] for name in ("ES", "PS", "NS")}
    name = f"counterfact.{prefix}S"
    sheet.put(composite(name, terms, "harmonic mean", definition="harmonic mean of ES, PS, NS"))


def _add_decoded(sheet: Sheet, records: Sequence[CounterFactRecord], asked: Asked, base: Asked | None) -> None:
    """Add exact decoding, false positives by neighbourhood, and base agreement."""
    protocol, n = asked.protocol, len(records)
    length = asked.respondent.length
    efficacy = {r.id: [(r.prompt, length(r.new))] for r in records}
    generality = {r.id: [(p, length(r.new)) for p in _few(r.paraphrases, protocol)] for r in records}
    near = {r.id: [(p, protocol.canvas) for p in _few(r.neighbours, protocol)] for r in records}
    far = {r.id: [(p, protocol.canvas) for p in _few(_far(records, i), protocol)] for i, r in enumerate(records)}
    about = {r.id: [(p, protocol.canvas) for p in _few(r.generation, protocol)] for r in records}
    for group, label in ((efficacy, "exact"), (generality, "exact, paraphrases"), (near, "neighbours"), (far, "far"),
                         (about, "about the subject")):  # fmt: skip
        asked.decode((question for found in group.values() for question in found), label)

    def over(
        group: Mapping[str, list[tuple[str, int]]], score: Callable[[CounterFactRecord, str], float]
    ) -> dict[str, float]:
        return present({
            r.id: mean_of(None if (t := asked.text(*q)) is None else score(r, t) for q in group[r.id]) for r in records
        })  # fmt: skip

    own, short = protocol.decoding("a canvas of the target's length"), protocol.decoding(f"{protocol.canvas} tokens")
    sheet.add("exact_efficacy", over(efficacy, lambda r, t: metric.says(t, r.new)), own, of=n)
    sheet.add("exact_generalization", over(generality, lambda r, t: metric.says(t, r.new)), own, of=n)
    for name, group in (("near", near), ("far", far), ("generation", about)):
        values = over(group, lambda r, t: metric.mentions(t, r.new))
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
        agreement[r.id] = mean_of(metric.same_text(a, b) if a is not None and b is not None else None for a, b in pairs)
    sheet.add("base_agreement", present(agreement), "near and far prompts; " + short, of=n)


def _few(prompts: Sequence[str], protocol: EditProtocol) -> list[str]:
    """The first prompts that differ: the files name some twice."""
    return list(dict.fromkeys(prompts))[: protocol.prompts]


def _far(records: Sequence[CounterFactRecord], i: int) -> tuple[str, ...]:
    """Neighbourhood prompts of a record far away: the first after half the data set that is of another relation."""
    n, own = len(records), records[i]
    for step in range(n):
        other = records[(i + n // 2 + step) % n]
        if other.subject != own.subject and (other.relation != own.relation or other.relation is None):
            return other.neighbours
    return ()


def _add_generations(
    sheet: Sheet, records: Sequence[CounterFactRecord], asked: Asked, snippets: Snippets | None
) -> None:
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


def _samples(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(s, dict) for s in value):
        raise ValueError("a list of objects with the field text")
    return [text(s.get("text")) for s in value]

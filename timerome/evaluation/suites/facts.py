"""Facts of one's own: what a model says about them, without and with an edit; likelihoods, decoded text, differences.

Every number is averaged over a fact's wordings first, then over facts. Log-probabilities are sums over answer tokens,
in nats, on a canvas of exactly the answer's length; text is decoded on a canvas of fixed length, so that the model is
not told how long the answer is.
"""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ...backbones import Backbone
from ...diffusion import Estimator, SamplerConfig
from ...facts import Fact, FactError
from ...functional.bootstrap import bootstrap_ci
from ...functional.text import distinct_n, has_rouge_words, repetition, rouge_l
from ...progress import Progress
from ..measurement import Better, Result, Sheet
from ..metrics.editing import mentions, says
from ..report import Report
from ..respondent import EDITED, NO_EDIT, Condition, Respondent
from .asking import changed

if TYPE_CHECKING:
    from ...memory import EditMemory

Wording = Literal["prompt", "paraphrase"]


@dataclass(frozen=True)
class Protocol:
    """How facts are asked; two evaluations can be compared only if theirs agree.

    Attributes:
        wording: ``"prompt"`` asks each fact as it stands, ``"paraphrase"`` in each of its other wordings.
        estimator: of the log-likelihood.
        samples: mask draws an answer; 1 for deterministic estimators.
        seed: of the draws and the sampler; the same seed gives common random numbers.
        canvas: positions that text is decoded on; 0 decodes none.
        sampler: how it is decoded; greedy low-confidence unmasking in 16 steps by default.

    Raises:
        ValueError: an unknown wording.
    """

    wording: Wording = "prompt"
    estimator: Estimator = "elbo_sum"
    samples: int = 16
    seed: int = 0
    canvas: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.wording not in get_args(Wording):
            raise ValueError(f"evaluate: expected wording in {get_args(Wording)}, got {self.wording!r}.")
        if self.estimator not in ("elbo_sum", "recon_mean"):
            object.__setattr__(self, "samples", 1)

    @property
    def likelihood(self) -> str:
        """Name of the likelihood, for tables."""
        drawn = f", K = {self.samples}, seed {self.seed}" if self.estimator in ("elbo_sum", "recon_mean") else ""
        return f"{self.estimator}{drawn}, canvas of the answer's length"

    @property
    def decoding(self) -> str:
        """Name of the decoding, for tables."""
        if not self.canvas:
            return "no text decoded"
        s = self.sampler
        heat = "greedy" if s.temperature == 0 else f"temperature {s.temperature}, seed {s.seed}"
        return f"{s.describe()}, canvas of {self.canvas} tokens, {heat}"


@dataclass(frozen=True)
class Score:
    """One wording of one fact.

    Attributes:
        fact_id: which fact.
        prompt: the wording asked.
        object: the answer scored, which is the old one where the fact is edited.
        log_prob: of the answer, summed over its tokens, nats.
        standard_error: of ``log_prob`` over mask draws, nats.
        tokens: answer tokens.
        edit: id of the memory's edit of this fact; None where it has none.
        text: what was decoded; None if nothing was. The fields below are None with it.
        rouge_recall: ROUGE-L recall of ``text`` against ``object``, with stemming, 0 to 1; None where ``object`` has no
            word that ROUGE compares.
        rouge_f1: ROUGE-L F1.
        exact: 1 where ``text`` is ``object`` (white space, letter case and a final full stop aside), else 0.
        exact_new: 1 where ``text`` is what the memory's edit says, or else the fact's new object; None where there is
            neither.
        says_old: 1 where ``object`` stands anywhere in ``text``, as whole words.
        distinct1: share of distinct words among the words of ``text``.
        distinct2: share of distinct word pairs.
        repetition: share of the words of ``text`` that only repeat what stands right before; higher is more stutter.
    """

    fact_id: str
    prompt: str
    object: str
    log_prob: float
    standard_error: float
    tokens: int
    edit: str | None = None
    text: str | None = None
    rouge_recall: float | None = None
    rouge_f1: float | None = None
    exact: float | None = None
    exact_new: float | None = None
    says_old: float | None = None
    distinct1: float | None = None
    distinct2: float | None = None
    repetition: float | None = None


# Which direction is wanted: nobody knows of a fact whether it is to go or to stay.
MEASURES: dict[str, Better] = {
    "log_prob": "neither", "rouge_recall": "neither", "rouge_f1": "neither", "exact": "neither", "exact_new": "higher",
    "says_old": "neither", "distinct1": "higher", "distinct2": "higher", "repetition": "lower",
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Scores of some facts under one protocol.

    Attributes:
        protocol: how it was done.
        backbone: name of the model.
        memory: what was attached, as text; None for the model alone.
        scores: one a wording, facts in order.
        hits: rows of all forwards that were edited, by edit id; edits that never acted are not there.
    """

    protocol: Protocol
    backbone: str
    memory: str | None
    scores: tuple[Score, ...]
    hits: Mapping[str, int] = field(default_factory=dict)

    @property
    def edited_rows(self) -> int:
        """Rows of all forwards that were edited; 0 means the memory never acted."""
        return sum(self.hits.values())

    @property
    def edits(self) -> dict[str, bool]:
        """The edits of the facts asked, and whether each of them acted."""
        return {s.edit: s.edit in self.hits or "*" in self.hits for s in self.scores if s.edit is not None}

    def per_fact(self, measure: str) -> dict[str, float]:
        """Return a measure by fact id, averaged over the fact's wordings; facts without it are left out.

        Raises:
            ValueError: there is no such measure.
        """
        if measure not in MEASURES:
            raise ValueError(f"Evaluation.per_fact: expected one of {tuple(MEASURES)}, got {measure!r}.")
        return _per_fact([(s.fact_id, getattr(s, measure)) for s in self.scores])

    def mean(self, measure: str) -> float:
        """Return the mean of a measure over facts; nan where no fact has it."""
        values = self.per_fact(measure).values()
        return stats.fmean(values) if values else math.nan

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return, for each measure that was taken: mean, its 95 % bootstrap interval, lowest, highest, number.

        The interval's ends are None for a single fact.
        """
        found = {measure: list(self.per_fact(measure).values()) for measure in MEASURES}
        return {measure: _summary(values) for measure, values in found.items() if values}

    def results(self) -> list[Result]:
        """Return the same as measurements, for :class:`timerome.evaluation.Report` and paired comparison."""
        sheet, how = Sheet("facts", self.protocol.seed), self.protocol
        for name, better in MEASURES.items():
            about, unit = (how.likelihood, "nats") if name == "log_prob" else (how.decoding, "share")
            note = "no text was decoded, or it has no new answer"
            asked = f"asked by {how.wording}; {about}"
            sheet.add(name, self.per_fact(name), asked, better=better, unit=unit, note=note)
        return list(sheet)

    def only(self, fact_ids: Iterable[str], *, text: bool = True) -> Evaluation:
        """Return the part about some facts; with ``text=False``, only its likelihoods."""
        wanted = set(fact_ids)
        scores = [s for s in self.scores if s.fact_id in wanted]
        if text:
            return replace(self, scores=tuple(scores))
        bare = (Score(s.fact_id, s.prompt, s.object, s.log_prob, s.standard_error, s.tokens, s.edit) for s in scores)
        return replace(self, scores=tuple(bare), protocol=replace(self.protocol, canvas=0))

    def texts(self) -> list[str | None]:
        """Return the decoded texts, one a wording."""
        return [s.text for s in self.scores]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "protocol": asdict(self.protocol),
            "likelihood": self.protocol.likelihood,
            "decoding": self.protocol.decoding,
            "backbone": self.backbone,
            "memory": self.memory,
            "edited_rows": self.edited_rows,
            "hits": dict(self.hits),
            "n": len({s.fact_id for s in self.scores}),
            "summary": self.summary(),
            "scores": [asdict(s) for s in self.scores],
        }


@dataclass(frozen=True)
class Comparison:
    """Paired differences of two evaluations of the same facts: after minus before.

    Attributes:
        before: the evaluation without the edit.
        after: the one with it.
    """

    before: Evaluation
    after: Evaluation

    @property
    def deltas(self) -> dict[str, float]:
        """Change of the answer's log-probability by fact, nats; a fact's wordings are averaged."""
        pairs = zip(self.before.scores, self.after.scores, strict=True)
        return _per_fact([(b.fact_id, a.log_prob - b.log_prob) for b, a in pairs])

    @property
    def mean(self) -> float:
        """Mean change over facts, nats."""
        return stats.fmean(self.deltas.values())

    @property
    def lowest(self) -> float:
        """Change of the fact that lost most, nats: the worst one among facts that should stay."""
        return min(self.deltas.values())

    @property
    def highest(self) -> float:
        """Change of the fact that lost least, nats: the worst one among facts that should go."""
        return max(self.deltas.values())

    @property
    def unchanged(self) -> float | None:
        """Share of wordings whose decoded text is the same to the letter; None if no text was decoded."""
        return _same(self.before.texts(), self.after.texts())

    @property
    def locality(self) -> float | None:
        """The same over the facts that no edit is about; None if there are none, or no text was decoded."""
        pairs = zip(self.before.scores, self.after.scores, strict=True)
        kept = [(b.text, a.text) for b, a in pairs if a.edit is None]
        return _same([b for b, _ in kept], [a for _, a in kept])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        acted = self.after.edits
        return {
            "likelihood": self.before.protocol.likelihood,
            "decoding": self.before.protocol.decoding,
            "n": len(self.deltas),
            "delta_logprob_nats": _summary(list(self.deltas.values())),
            "text_unchanged": self.unchanged,
            "locality": self.locality,
            "edits": {"asked": len(acted), "silent": [name for name, did in acted.items() if not did]},
            "deltas": self.deltas,
            "before": self.before.summary(),
            "after": self.after.summary(),
        }

    def report(self, title: str = "Facts, without and with an edit") -> Report:
        """Return the report, with paired comparison of every measure, that can be written to a folder."""
        how = {"model": self.after.backbone, "memory": self.after.memory, "protocol": asdict(self.after.protocol)}
        found = {NO_EDIT.name: self.before.results(), EDITED: self.after.results()}
        return Report(title, {**how, "edits that acted": [k for k, did in self.after.edits.items() if did]}, found)


def evaluate(
    backbone: Backbone,
    facts: Sequence[Fact],
    *,
    memory: EditMemory | Condition | None = None,
    protocol: Protocol = Protocol(),  # noqa: B008  frozen
    decode: bool = True,
    progress: Progress | None = None,
    label: str = "evaluate",
    **changes: Any,
) -> Evaluation:
    """Measure what a model says about facts: log-probability of ``fact.object``, and decoded text against it.

    Args:
        backbone: the model, with whatever is attached to it.
        facts: the facts.
        memory: attached for the duration, or another condition to ask under; None measures the model as it is. What a
            memory's edits say is the new answer that is looked for.
        protocol: how facts are asked.
        decode: False takes likelihoods only.
        progress: shows how far it is.
        label: what the progress display calls it.
        changes: fields of the protocol that differ from it, as ``samples=4``; None changes nothing. A seed goes for the
            sampler, too, where none is given.

    Returns:
        The scores, one a wording.

    Raises:
        FactError: there is no fact, or no wording of the kind asked for.
        ValueError: a setting is out of range.
        MemoryMismatchError: the memory was built on another model.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation import evaluate
        >>> backbone = tr.load("testbed")
        >>> facts = tr.datasets.bundled("relations")[:2]
        >>> memory = tr.EditMemory(backbone)
        >>> edit = memory.replace(facts[0], "Lagos")
        >>> found = evaluate(backbone, facts, memory=memory, samples=2, canvas=16)
        >>> found.per_fact("exact_new"), found.edits == {edit.id: True}
        ({'country_capital_city-0': 1.0}, True)
    """
    how = changed(protocol, **changes)
    if changes.get("sampler") is None:
        how = replace(how, sampler=replace(how.sampler, seed=how.seed))
    how = how if decode else replace(how, canvas=0)
    if len(facts) == 0:
        raise FactError("evaluate: expected at least one fact, got none.")
    asked = [
        (i, f, p) for i, f in enumerate(facts) for p in ((f.prompt,) if how.wording == "prompt" else f.paraphrases)
    ]
    if not asked:
        raise FactError("evaluate: none of the facts has paraphrases; give them some, or use wording='prompt'.")
    condition = Condition(label) if memory is None else memory
    edits = {}
    if not isinstance(condition, Condition):
        edits = {(edit.fact.id, edit.fact.prompt): edit for edit in condition.edits}
        condition = Condition.of_memory(condition)
    respondent = Respondent(backbone, replace(condition, name=label), progress=progress)
    rows = [i for i, _, _ in asked]
    scored = respondent.likelihoods(
        [(p, f.object) for _, f, p in asked], estimator=how.estimator, samples=how.samples, seed=how.seed, rows=rows
    )
    texts: list[str | None] = [None] * len(asked)
    if how.canvas:
        texts[:] = respondent.texts([p for _, _, p in asked], canvas=how.canvas, sampler=how.sampler, rows=rows)
    scores = []
    for (_, fact, prompt), own, text in zip(asked, scored, texts, strict=True):
        edit = edits.get((fact.id, fact.prompt))
        new = fact.new_object if edit is None else edit.says
        scores.append(Score(
            fact.id, prompt, fact.object, own.log_prob, own.standard_error, own.tokens,
            None if edit is None else edit.id, **({} if text is None else _text_scores(fact.object, new, text)),
        ))  # fmt: skip
    return Evaluation(how, backbone.name, condition.about, tuple(scores), dict(respondent.hits))


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Pair two evaluations of the same facts under the same protocol.

    Raises:
        ValueError: protocols, facts or wordings differ, so that a difference would mean nothing.
    """
    if before.protocol != after.protocol:
        raise ValueError(
            f"compare: the evaluations follow different protocols, {before.protocol} and {after.protocol}; "
            "repeat one of them."
        )
    pairs = [[(s.fact_id, s.prompt, s.object) for s in e.scores] for e in (before, after)]
    if pairs[0] != pairs[1]:
        raise ValueError(
            f"compare: expected the same facts in the same order, got {len(pairs[0])} and {len(pairs[1])} wordings."
        )
    return Comparison(before, after)


def _text_scores(old: str, new: str | None, text: str) -> dict[str, Any]:
    comparable = has_rouge_words(old)
    return {
        "text": text,
        "rouge_recall": rouge_l(old, text) if comparable else None,
        "rouge_f1": rouge_l(old, text, kind="f1") if comparable else None,
        "exact": says(text, old),
        "exact_new": None if new is None else says(text, new),
        "says_old": mentions(text, old),
        "distinct1": distinct_n(text, 1),
        "distinct2": distinct_n(text, 2),
        "repetition": repetition(text),
    }


def _per_fact(values: Sequence[tuple[str, float | None]]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for fact_id, value in values:
        if value is not None:
            grouped.setdefault(fact_id, []).append(value)
    return {fact_id: stats.fmean(group) for fact_id, group in grouped.items()}


def _same(before: Sequence[str | None], after: Sequence[str | None]) -> float | None:
    pairs = list(zip(before, after, strict=True))
    return None if not pairs or None in pairs[0] else stats.fmean(b == a for b, a in pairs)


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    mean, low, high = (None if math.isnan(x) else float(x) for x in bootstrap_ci(values)[:3])
    return {"mean": mean, "low": low, "high": high, "lowest": min(values), "highest": max(values), "n": len(values)}

"""What a model says about facts, before and after an edit: likelihoods, decoded text, paired differences.

Every number is averaged over a fact's wordings first, then over facts. Log-probabilities are sums over answer tokens,
in nats, on a canvas of exactly the answer's length; text is decoded on a canvas of fixed length, so that the model is
not told how long the answer is.
"""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..backbones import Backbone
from ..diffusion import Estimator, SamplerConfig, encode, generate, log_likelihood
from ..facts import Fact, FactError
from ..functional.text import distinct_n, has_rouge_words, repetition, rouge_l
from ..progress import SILENT, Progress
from .statistics import bootstrap_ci

if TYPE_CHECKING:
    from ..memory import EditMemory

Wording = Literal["prompt", "paraphrase"]
CHUNK = 32  # sequences between two reports of progress


@dataclass(frozen=True)
class Protocol:
    """How an evaluation was done; two can be compared only if theirs agree.

    Attributes:
        wording: ``"prompt"`` asks each fact as it stands, ``"paraphrase"`` in each of its other wordings.
        estimator: of the log-likelihood.
        samples: mask draws an answer (1 for deterministic estimators).
        seed: of the draws and the sampler; the same seed gives common random numbers.
        canvas: positions that text is decoded on; 0 where none was.
        sampler: how it was decoded.
    """

    wording: Wording = "prompt"
    estimator: Estimator = "elbo_sum"
    samples: int = 16
    seed: int = 0
    canvas: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    @property
    def likelihood(self) -> str:
        """Name of the likelihood, for tables."""
        if self.estimator in ("elbo_sum", "recon_mean"):
            return f"{self.estimator}, K = {self.samples}, seed {self.seed}, canvas of the answer's length"
        return f"{self.estimator}, canvas of the answer's length"

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
        object: the answer scored.
        log_prob: of the answer, summed over its tokens, nats.
        standard_error: of ``log_prob`` over mask draws, nats.
        tokens: answer tokens.
        text: what was decoded; None if nothing was. The fields below are None with it.
        rouge_recall: ROUGE-L recall of ``text`` against ``object``, with stemming, 0 to 1; None where ``object`` has no
            word that ROUGE compares.
        rouge_f1: ROUGE-L F1.
        exact: 1 where ``text`` is ``object`` (white space and letter case aside), else 0.
        exact_new: 1 where ``text`` is the fact's new object; None where it has none.
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
    text: str | None = None
    rouge_recall: float | None = None
    rouge_f1: float | None = None
    exact: float | None = None
    exact_new: float | None = None
    distinct1: float | None = None
    distinct2: float | None = None
    repetition: float | None = None


MEASURES = (
    "log_prob", "rouge_recall", "rouge_f1", "exact", "exact_new", "distinct1", "distinct2", "repetition",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Scores of some facts under one protocol.

    Attributes:
        protocol: how it was done.
        backbone: name of the model.
        memory: what was attached, as text; None for the model alone.
        scores: one a wording, facts in order.
        edited_rows: rows of all forwards that the memory edited; 0 means it never acted.
    """

    protocol: Protocol
    backbone: str
    memory: str | None
    scores: tuple[Score, ...]
    edited_rows: int = 0

    def per_fact(self, measure: str) -> dict[str, float]:
        """Return a measure by fact id, averaged over the fact's wordings; facts without it are left out.

        Raises:
            ValueError: there is no such measure.
        """
        if measure not in MEASURES:
            raise ValueError(f"Evaluation.per_fact: expected one of {MEASURES}, got {measure!r}.")
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

    def only(self, fact_ids: Iterable[str], *, text: bool = True) -> Evaluation:
        """Return the part about some facts; with ``text=False``, only its likelihoods."""
        wanted = set(fact_ids)
        scores = [s for s in self.scores if s.fact_id in wanted]
        if text:
            return replace(self, scores=tuple(scores))
        bare = (Score(s.fact_id, s.prompt, s.object, s.log_prob, s.standard_error, s.tokens) for s in scores)
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
        pairs = list(zip(self.before.texts(), self.after.texts(), strict=True))
        return None if None in pairs[0] else stats.fmean(b == a for b, a in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "likelihood": self.before.protocol.likelihood,
            "decoding": self.before.protocol.decoding,
            "n": len(self.deltas),
            "delta_logprob_nats": _summary(list(self.deltas.values())),
            "text_unchanged": self.unchanged,
            "deltas": self.deltas,
            "before": self.before.summary(),
            "after": self.after.summary(),
        }


def evaluate(
    backbone: Backbone,
    facts: Sequence[Fact],
    *,
    memory: EditMemory | None = None,
    wording: Wording = "prompt",
    estimator: Estimator = "elbo_sum",
    samples: int = 16,
    seed: int = 0,
    canvas: int = 64,
    sampler: SamplerConfig | None = None,
    decode: bool = True,
    progress: Progress | None = None,
    label: str = "evaluate",
) -> Evaluation:
    """Measure what a model says about facts: log-probability of ``fact.object``, and decoded text against it.

    Args:
        backbone: the model, with whatever is attached to it.
        facts: the facts.
        memory: attached for the duration; None measures the model as it is.
        wording: ``"prompt"``, or ``"paraphrase"`` for all other wordings of each fact (facts without are left out).
        estimator: of the likelihood, see :func:`timerome.diffusion.log_likelihood`.
        samples: mask draws an answer.
        seed: of mask draws; use one seed for evaluations that are compared.
        canvas: answer positions for decoding.
        sampler: how text is decoded; greedy low-confidence unmasking in 16 steps by default.
        decode: False takes likelihoods only.
        progress: shows how far it is.
        label: what the progress display calls it.

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
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> evaluate(backbone, [fact], decode=False).mean("log_prob") < 0
        True
    """
    if wording not in get_args(Wording):
        raise ValueError(f"evaluate: expected wording in {get_args(Wording)}, got {wording!r}.")
    if len(facts) == 0:
        raise FactError("evaluate: expected at least one fact, got none.")
    wordings = [(f.prompt,) if wording == "prompt" else f.paraphrases for f in facts]
    asked = [(f, p) for f, prompts in zip(facts, wordings, strict=True) for p in prompts]
    owner = [i for i, prompts in enumerate(wordings) for _ in prompts]
    if not asked:
        raise FactError("evaluate: none of the facts has paraphrases; give them some, or use wording='prompt'.")
    sampler = sampler or SamplerConfig(seed=seed)
    attachment = None if memory is None else memory.attached(backbone)
    with attachment or nullcontext():
        sequences = [encode(backbone, fact, prompt=prompt) for fact, prompt in asked]
        # Chunks of similar length, so that batches inside them stay large.
        by_size = sorted(range(len(asked)), key=lambda i: len(sequences[i].ids))

        def in_chunks(name: str, function: Callable[[list[int]], list[Any]]) -> list[Any]:
            results: list[Any] = [None] * len(asked)
            with (progress or SILENT).task(f"{label}: {name}", len(asked)) as step:
                for start in range(0, len(by_size), CHUNK):
                    chunk = by_size[start : start + CHUNK]
                    with backbone.on_rows([owner[i] for i in chunk]):
                        found = function(chunk)
                    for i, result in zip(chunk, found, strict=True):
                        results[i] = result
                    step(len(chunk))
            return results

        def likelihoods(chunk: list[int]) -> list[tuple[float, float, int]]:
            found = log_likelihood(
                backbone, [sequences[i] for i in chunk], estimator=estimator, samples=samples, seed=seed
            )
            columns = (found.log_prob.tolist(), found.standard_error.tolist(), found.tokens.tolist())
            return list(zip(*columns, strict=True))

        def texts(chunk: list[int]) -> list[str]:
            return generate(backbone, [asked[i][1] for i in chunk], canvas=canvas, config=sampler)

        scored = in_chunks("likelihood", likelihoods)
        decoded = in_chunks("text", texts) if decode else [None] * len(asked)
    scores = tuple(
        Score(fact.id, prompt, fact.object, *numbers, **({} if text is None else _text_scores(fact, text)))
        for (fact, prompt), numbers, text in zip(asked, scored, decoded, strict=True)
    )
    drawn = samples if estimator in ("elbo_sum", "recon_mean") else 1
    protocol = Protocol(wording, estimator, drawn, seed, canvas if decode else 0, sampler)
    edited = 0 if attachment is None else sum(attachment.hits.values())
    return Evaluation(protocol, backbone.name, None if memory is None else repr(memory), scores, edited)


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


def _text_scores(fact: Fact, text: str) -> dict[str, Any]:
    def same(wanted: str) -> float:
        return float(" ".join(text.split()).casefold() == " ".join(wanted.split()).casefold())

    comparable = has_rouge_words(fact.object)
    return {
        "text": text,
        "rouge_recall": rouge_l(fact.object, text) if comparable else None,
        "rouge_f1": rouge_l(fact.object, text, kind="f1") if comparable else None,
        "exact": same(fact.object),
        "exact_new": None if fact.new_object is None else same(fact.new_object),
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


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    mean, low, high = (None if math.isnan(x) else float(x) for x in bootstrap_ci(values)[:3])
    return {"mean": mean, "low": low, "high": high, "lowest": min(values), "highest": max(values), "n": len(values)}

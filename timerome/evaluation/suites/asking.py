"""What the benchmarks of edits have in common: how they ask, and answers looked up by what was asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from ...diffusion import Estimator, SamplerConfig
from ...functional.text import ngram_entropy, repetition
from ..measurement import Sheet
from ..metrics import editing as metric
from ..respondent import Pair, Respondent, Scored
from ..tokens import States, TokenScores

P = TypeVar("P")
K = TypeVar("K")


@dataclass(frozen=True)
class EditProtocol:
    """How benchmarks of edits are asked.

    Attributes:
        states: in which states tokens are read: ``"l2r"`` is closest to autoregressive results.
        seed: of the sampler.
        canvas: positions for short free answers.
        generation: positions for texts of which fluency is taken; 100 is customary.
        sampler: how text is decoded.
        prompts: at most so many prompts of one kind are *decoded* a record; likelihoods are taken of all.
    """

    states: States = "l2r"
    seed: int = 0
    canvas: int = 16
    generation: int = 100
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=32))
    prompts: int = 2

    def reading(self, states: str | None = None) -> str:
        """How tokens are read, in words."""
        return f"{states or self.states}, canvas of the answer's length, no end-of-text"

    def decoding(self, canvas: str) -> str:
        """How text is decoded, in words."""
        return f"{self.sampler.remasking}, at most {self.sampler.steps} steps on {canvas}"


class Asked:
    """Answers of a respondent, by what was asked; each kind of question is asked in one go.

    Args:
        respondent: whom to ask.
        protocol: how.
    """

    def __init__(self, respondent: Respondent, protocol: EditProtocol) -> None:
        self.respondent, self.protocol = respondent, protocol
        self._tokens: dict[Pair, TokenScores] = {}
        self._texts: dict[tuple[str, int], str] = {}

    def read(self, pairs: Iterable[Pair], label: str) -> None:
        """Read the tokens of these answers; what does not fit into the context is left out."""
        fit = [p for p in dict.fromkeys(pairs) if p not in self._tokens and self.respondent.fits(*p)]
        found = self.respondent.tokens(fit, states=self.protocol.states, label=label)
        self._tokens.update(zip(fit, found, strict=True))

    def decode(self, asked: Iterable[tuple[str, int]], label: str) -> None:
        """Decode after these prompts, each on its canvas; what does not fit is left out."""
        fit = [a for a in dict.fromkeys(asked) if a not in self._texts and self.respondent.fits(a[0], canvas=a[1])]
        found = self.respondent.texts(
            [p for p, _ in fit], canvas=[n for _, n in fit], sampler=self.protocol.sampler, label=label
        )
        self._texts.update(zip(fit, found, strict=True))

    def likelihoods(self, pairs: Iterable[Pair], estimator: Estimator, canvas: int | None = None) -> dict[Pair, Scored]:
        """Return likelihoods by pair, of those that fit."""
        asked = [p for p in pairs if canvas is None or self.respondent.length(p[1]) <= canvas]
        return likelihoods(self.respondent, asked, f"likelihood, {estimator}", estimator=estimator, canvas=canvas)

    def tokens(self, prompt: str, answer: str) -> TokenScores | None:
        """Return what was read of an answer; None if it does not fit."""
        return self._tokens.get((prompt, answer))

    def exact(self, prompt: str, wanted: str, old: str | None) -> tuple[str, int]:
        """Return the question whose decoded text is compared with an answer: prompt, and a canvas of its length.

        Where the model can end a text, the canvas holds the old answer, too: what cannot be said is not edited.
        """
        lengths = [self.respondent.length(answer) for answer in (wanted, old or "")]
        return prompt, lengths[0] if self.respondent.backbone.eos_id is None else max(lengths)

    def accuracy(self, prompt: str, answer: str) -> float | None:
        """Return the share of an answer's tokens that are the first choice; None if it does not fit."""
        found = self.tokens(prompt, answer)
        return None if found is None else metric.token_accuracy(found.hit)

    def agreement(self, before: Asked, prompt: str, answer: str) -> float | None:
        """Return the share of an answer's tokens at which the first choice is that of another model."""
        first, second = before.tokens(prompt, answer), self.tokens(prompt, answer)
        return None if first is None or second is None else metric.agreement(first.choice, second.choice)

    def nll(self, prompt: str, answer: str) -> float | None:
        """Return ℓ of an answer, nats a token."""
        scores = self._tokens.get((prompt, answer))
        return None if scores is None else -fmean(scores.log_prob)

    def text(self, prompt: str, canvas: int) -> str | None:
        """Return what was decoded; None if it does not fit."""
        return self._texts.get((prompt, canvas))


def likelihoods(respondent: Respondent, pairs: Iterable[Pair], label: str, **how: Any) -> dict[Pair, Scored]:
    """Return the likelihoods of answers, of those that fit; see :meth:`Respondent.likelihoods`."""
    fit = [pair for pair in dict.fromkeys(pairs) if respondent.fits(*pair, canvas=how.get("canvas") or 0)]
    return dict(zip(fit, respondent.likelihoods(fit, label=label, **how), strict=True))


def decoded(
    respondent: Respondent, prompts: Mapping[K, str], label: str, *, canvas: int, sampler: SamplerConfig
) -> dict[K, str]:
    """Return what is decoded after prompts, by what they are called, of those that fit."""
    fit = {k: prompt for k, prompt in prompts.items() if respondent.fits(prompt, canvas=canvas)}
    found = respondent.texts(list(fit.values()), canvas=canvas, sampler=sampler, label=label)
    return dict(zip(fit, found, strict=True))


def changed(protocol: P, **changes: Any) -> P:
    """Return a protocol with other settings; what is None stays as it is.

    Example:
        >>> changed(EditProtocol(), canvas=8, seed=None).canvas
        8
    """
    return replace(protocol, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[type-var]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of what is there; None if nothing is."""
    there = [v for v in values if v is not None]
    return fmean(there) if there else None


def present(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that are there."""
    return {k: v for k, v in values.items() if v is not None}


def add_fluency(sheet: Sheet, texts: Mapping[str, Sequence[str | None]], how: str, of: int) -> None:
    """Add GE, the n-gram entropy times 100, and the share of repetition, over texts by record."""
    there = {k: [t for t in found if t is not None] for k, found in texts.items()}
    there = {k: found for k, found in there.items() if found}
    sheet.add("GE", {k: ngram_entropy(t) for k, t in there.items()}, how, of=of, unit="100 bits")
    sheet.add("repetition", {k: fmean(map(repetition, t)) for k, t in there.items()}, how, of=of, better="lower")

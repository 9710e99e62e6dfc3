"""A respondent whose answers are given, so that what a benchmark makes of them can be computed by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from timerome.evaluation.respondent import Pair, Scored
from timerome.evaluation.tokens import TokenScores

# Published data sets, which are not part of the package: beside the repository, or where this says.
PUBLISHED = Path(os.environ.get("TIMEROME_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


class Scripted:
    """Says what it is told to say; one word is one token.

    Args:
        said: log-probabilities of an answer's tokens, by prompt and answer. Anything else has the one it has by
            default, for each of its words.
        default: log-probability of any other word.
        choices: first choices at an answer's tokens, by prompt and answer; a hit is a choice that equals ``10 + i`` at
            token i. Anything else is hit where its log-probability is above ln ½.
        texts: what is decoded, by prompt; or by prompt and canvas.
        eos: whether there is an end-of-text token.
        context: words that a prompt and its answer may have.
        moments: mean and deviation of each token's log-probability under the predictive distribution.

    Attributes:
        asked: the kind, question and settings of everything asked.
    """

    def __init__(
        self,
        said: Mapping[Pair, Sequence[float]] | None = None,
        *,
        default: float = -5.0,
        choices: Mapping[Pair, Sequence[int]] | None = None,
        texts: Mapping[Any, str] | None = None,
        eos: int | None = None,
        context: int = 60,
        moments: tuple[float, float] = (-1.0, 0.5),
    ) -> None:
        self.said, self.default, self.choices, self.decoded = dict(said or {}), default, choices or {}, texts or {}
        self.backbone = SimpleNamespace(eos_id=eos, tokenizer=SimpleNamespace(chat_template=None))
        self.context, self.moments, self.asked = context, moments, []

    def log_probs(self, prompt: str, answer: str) -> list[float]:
        return list(self.said.get((prompt, answer), [self.default] * len(answer.split())))

    def likelihoods(self, pairs, *, estimator="elbo_sum", samples=32, seed=0, canvas=None, label=""):
        self.asked += [(estimator, pair, canvas) for pair in pairs]
        # On a fixed canvas each end-of-text token after the answer costs a tenth of a nat.
        return [
            Scored(sum(own) - (0.1 * (canvas - len(own)) if canvas else 0.0), 0.0, canvas or len(own))
            for own in (self.log_probs(*pair) for pair in pairs)
        ]

    def tokens(self, pairs, *, states="l2r", moments=False, label=""):
        self.asked += [(states, pair, None) for pair in pairs]
        found = []
        for pair in pairs:
            own = self.log_probs(*pair)
            given = self.choices.get(pair, [10 + i if x > -0.693 else 0 for i, x in enumerate(own)])
            hit = [int(c == 10 + i) for i, c in enumerate(given)]
            mean, std = ([m] * len(own) if moments else [] for m in self.moments)
            found.append(TokenScores(own, hit, list(given), [], mean, std))
        return found

    def texts(self, prompts, *, canvas, sampler=None, label=""):
        sizes = [canvas] * len(prompts) if isinstance(canvas, int) else list(canvas)
        self.asked += [("text", prompt, size) for prompt, size in zip(prompts, sizes, strict=True)]
        return [
            self.decoded.get((prompt, size), self.decoded.get(prompt, ""))
            for prompt, size in zip(prompts, sizes, strict=True)
        ]

    def fits(self, prompt, answer="", canvas=0):
        return len(prompt.split()) + max(canvas if canvas < 30 else 0, len(answer.split())) <= self.context

    def length(self, answer):
        return len(answer.split())


def value(sheet: Any, name: str) -> float:
    """The value of a measurement of a sheet; what is absent has none."""
    return sheet[name].value


def reason(sheet: Any, name: str) -> str:
    """Why a metric of a sheet is absent; a measurement has no reason."""
    return sheet[name].reason


def write(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def without(record: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy that lacks a field, which may be an inner one: ``requested_rewrite.prompt``."""
    outer, _, inner = field.partition(".")
    if inner:
        return {**record, outer: without(record[outer], inner)}
    return {k: v for k, v in record.items() if k != outer}


def published(folder: str) -> Path:
    """The folder of a published data set; skips the test where it is not there."""
    if not (PUBLISHED / folder).is_dir():
        pytest.skip(f"needs the data set {folder} in {PUBLISHED}; name another folder by TIMEROME_DATA")
    return PUBLISHED / folder

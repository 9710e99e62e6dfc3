"""A model under one condition, asked in batches, with every answer kept: what benchmarks are run on.

Batches are planned from the whole list of questions before the first forward, and a batch is answered as a whole or not
at all. So a run that is stopped and started again makes the same batches, and its numbers are the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .._version import __version__
from ..backbones import Backbone
from ..diffusion import Encoded, Estimator, SamplerConfig, generate, log_likelihood
from ..diffusion.states import fill
from ..progress import SILENT, Progress
from .answers import AnswerFile
from .tokens import States, TokenScores, token_scores

if TYPE_CHECKING:
    from ..memory import EditMemory

BATCH = 32  # questions answered, and written down, together
EDITED = "edited"

Pair = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Condition:
    """What is done to a model while it is asked.

    Attributes:
        name: for tables: ``"no edit"``, ``"edited"``, ``"prompt memory"``.
        identity: changes whenever anything of ``attach`` or ``rewrite`` does; answers are kept under it.
        attach: returns a context manager inside which the model is changed.
        rewrite: what becomes of a prompt before it is asked.
        about: what it is, in words.
    """

    name: str
    identity: str = ""
    attach: Callable[[Backbone], AbstractContextManager[Any]] = lambda backbone: nullcontext()
    rewrite: Callable[[str], str] = lambda prompt: prompt
    about: str | None = None

    @classmethod
    def of_memory(cls, memory: EditMemory, name: str = EDITED) -> Condition:
        """Return the condition of a memory being attached."""
        return cls(name, memory.digest(), memory.attached, about=repr(memory))


NO_EDIT = Condition("no edit")


@dataclass(frozen=True)
class Scored:
    """Likelihood of one answer.

    Attributes:
        log_prob: summed over its tokens, nats.
        standard_error: of that over mask draws, nats; 0 for a deterministic estimator.
        tokens: its tokens.
    """

    log_prob: float
    standard_error: float
    tokens: int

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood a token, nats."""
        return -self.log_prob / self.tokens


class Respondent:
    """Answers questions about texts: how likely, which tokens, what is decoded.

    Args:
        backbone: the model.
        condition: what is done to it; nothing by default.
        cache: folder in which answers are kept; None keeps them for this object's life only.
        progress: shows how far it is.

    Attributes:
        condition: as given.
        asked: forwards' worth of questions answered here rather than from the cache.
        hits: rows that a memory edited meanwhile, by edit id.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation import Respondent
        >>> respondent = Respondent(tr.load("testbed"))
        >>> scored = respondent.likelihoods([("The capital city of Nigeria is", "Abuja")], estimator="l2r")
        >>> scored[0].nll < 0.1
        True
    """

    def __init__(
        self,
        backbone: Backbone,
        condition: Condition = NO_EDIT,
        *,
        cache: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.backbone, self.condition, self.progress = backbone, condition, progress or SILENT
        self.asked = 0
        self.hits: Counter[str] = Counter()
        self._kept: dict[str, list[Any]] = {}
        self._file: AnswerFile | None = None
        if cache is not None:
            name = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:24]
            self._file = AnswerFile(Path(cache) / f"{name}.jsonl")
            self._kept = self._file.kept

    def identity(self) -> dict[str, str]:
        """Return all that its answers depend on beside the questions."""
        return {
            "model": self.backbone.fingerprint(),
            "tokenizer": self.backbone.tokenizer_digest(),
            "dtype": str(self.backbone.dtype),
            "condition": self.condition.identity,
            "timerome": __version__,
            "torch": str(torch.__version__),
        }

    def likelihoods(
        self,
        pairs: Sequence[Pair],
        *,
        estimator: Estimator = "elbo_sum",
        samples: int = 32,
        seed: int = 0,
        canvas: int | None = None,
        rows: Sequence[int] | None = None,
        label: str = "likelihood",
    ) -> list[Scored]:
        """Return the likelihood of each (prompt, answer), in order.

        Args:
            pairs: prompt and answer; the answer is tokenized after one space.
            estimator: see :func:`timerome.diffusion.log_likelihood`.
            samples: mask draws an answer.
            seed: of the draws. Answers of one length get the same draws under every condition.
            canvas: answer positions; the answer is filled up with end-of-text, so that the model is not told its
                length. None is exactly the answer's tokens.
            rows: which row of the caller's each pair is, where rows may have different edits.
            label: what the progress display calls it.
        """

        def answer(batch: list[Any]) -> list[list[float]]:
            # Answers are told apart by their rows, so that states which they share are run for each.
            sequences = [replace(self.encode(p, a, canvas), fact_id=str(row)) for p, a, *row in batch]
            with self._on_rows(batch):
                found = log_likelihood(self.backbone, sequences, estimator=estimator, samples=samples, seed=seed)
            columns = (found.log_prob.tolist(), found.standard_error.tolist(), found.tokens.tolist())
            return [list(row) for row in zip(*columns, strict=True)]

        settings = {"kind": "likelihood", "estimator": estimator, "samples": samples, "seed": seed,
                    "canvas": canvas}  # fmt: skip
        return [Scored(*row) for row in self._ask(_with(pairs, rows), settings, answer, label)]

    def tokens(
        self, pairs: Sequence[Pair], *, states: States = "l2r", moments: bool = False, label: str = "tokens"
    ) -> list[TokenScores]:
        """Return what the model says of each answer token, in states of one kind; see :class:`TokenScores`.

        Args:
            pairs: prompt and answer.
            states: which positions are masked when a token is read.
            moments: also take mean and variance of the log-probability under the predictive distribution.
            label: what the progress display calls it.
        """

        def answer(batch: list[Pair]) -> list[dict[str, Any]]:
            sequences = [self.encode(p, a) for p, a in batch]
            return [asdict(s) for s in token_scores(self.backbone, sequences, states=states, moments=moments)]

        settings = {"kind": "tokens", "states": states, "moments": moments}
        return [TokenScores(**row) for row in self._ask(list(pairs), settings, answer, label)]

    def texts(
        self,
        prompts: Sequence[str],
        *,
        canvas: int | Sequence[int],
        sampler: SamplerConfig | None = None,
        rows: Sequence[int] | None = None,
        label: str = "text",
    ) -> list[str]:
        """Return what is decoded after each prompt, in order.

        Args:
            prompts: the questions.
            canvas: answer positions; one number for all, or one a prompt.
            sampler: how the canvas is unmasked; of its steps no more are made than there are positions.
            rows: which row of the caller's each prompt is, where rows may have different edits.
            label: what the progress display calls it.
        """
        config = sampler or SamplerConfig()
        sizes = [canvas] * len(prompts) if isinstance(canvas, int) else list(canvas)

        def answer(batch: list[Any]) -> list[str]:
            sizes = {size for size, *_ in batch}
            if len(sizes) > 1:  # of one canvas after the other, in order; questions come sorted by it
                return [text for size in sorted(sizes) for text in answer([q for q in batch if q[0] == size])]
            (size,) = sizes
            how = replace(config, steps=max(1, min(config.steps, size)))
            prompts = [self.condition.rewrite(prompt) for _, prompt, *_ in batch]
            with self._on_rows(batch):
                return generate(self.backbone, prompts, canvas=size, config=how)

        settings = {"kind": "text", "sampler": asdict(config)}
        return self._ask(_with(list(zip(sizes, prompts, strict=True)), rows), settings, answer, label)

    def custom(
        self,
        kind: str,
        settings: dict[str, Any],
        questions: Sequence[T],
        answer: Callable[[list[T]], list[Any]],
        *,
        label: str,
    ) -> list[Any]:
        """Ask questions of another kind, with the same batching, cache and progress.

        Args:
            kind: its name; a kind of questions has one way of being answered.
            settings: JSON-ready; all that answers depend on beside the question.
            questions: JSON-ready.
            answer: takes a batch of questions, returns JSON-ready answers, inside the condition.
            label: what the progress display calls it.
        """
        return self._ask(list(questions), {"kind": kind, **settings}, answer, label)

    def encode(self, prompt: str, answer: str, canvas: int | None = None) -> Encoded:
        """Tokenize a prompt, as the condition rewrites it, and its answer, after one space; without prompt, a text.

        Raises:
            FactError: the answer is longer than the canvas.
            ValueError: the answer is empty, or both together exceed the context.
        """
        text, prompt_ids, answer_ids = self._ids(prompt, answer)
        if not answer.strip() or not answer_ids:
            raise ValueError(f"Respondent: expected an answer with tokens, got {answer!r} to {text!r}.")
        if canvas is not None:
            answer_ids = fill(self.backbone, answer_ids, canvas)
        length = len(prompt_ids) + len(answer_ids)
        if length > self.backbone.max_length:
            raise ValueError(
                f"Respondent: {text[:60]!r}… and its answer need {length} tokens, but {self.backbone.name} has a "
                f"context of {self.backbone.max_length}; leave that record out."
            )
        nowhere = torch.zeros(length, dtype=torch.bool)
        return Encoded(torch.tensor(prompt_ids + answer_ids), torch.arange(length) >= len(prompt_ids), nowhere)

    def fits(self, prompt: str, answer: str = "", canvas: int = 0) -> bool:
        """Whether a prompt with its answer, or with a canvas, is within the model's context."""
        _, prompt_ids, answer_ids = self._ids(prompt, answer)
        return len(prompt_ids) + max(canvas, len(answer_ids)) <= self.backbone.max_length

    def length(self, answer: str) -> int:
        """Tokens of an answer."""
        return len(self.backbone.encode(" " + answer)) if answer else 0

    def _ids(self, prompt: str, answer: str) -> tuple[str, list[int], list[int]]:
        """The prompt as it is asked, and the tokens of both."""
        text = self.condition.rewrite(prompt)
        spaced = answer if not answer or not text or text[-1].isspace() else " " + answer
        prompt_ids, answer_ids = (self.backbone.encode(part) if part else [] for part in (text, spaced))
        return text, prompt_ids, answer_ids

    def _on_rows(self, batch: list[Any]) -> AbstractContextManager[Any]:
        return self.backbone.on_rows([row for _, _, row in batch]) if len(batch[0]) > 2 else nullcontext()

    def _ask(
        self, questions: list[Any], settings: dict[str, Any], answer: Callable[[list[Any]], list[Any]], label: str
    ) -> list[Any]:
        def size_of(question: Any) -> int:  # the canvas of what is decoded
            return question[0] if isinstance(question, (list, tuple)) and isinstance(question[0], int) else 0

        # Each question once; in order of length, so that batches inside a batch stay large.
        names = [json.dumps(q, ensure_ascii=False) for q in questions]
        distinct = dict(zip(names, questions, strict=True))
        order = sorted(distinct, key=lambda name: (size_of(distinct[name]), len(name), name))
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        how = json.dumps(settings, sort_keys=True)
        found: dict[str, Any] = {}
        with self._changed() as change, self.progress.task(f"{self.condition.name}: {label}", len(order)) as step:
            for batch in batches:
                key = hashlib.sha256("\n".join([how, *batch]).encode()).hexdigest()
                if key not in self._kept:
                    change()
                    self._keep(key, answer([distinct[name] for name in batch]))
                    self.asked += len(batch)
                found.update(zip(batch, self._kept[key], strict=True))
                step(len(batch))
        return [found[name] for name in names]

    @contextmanager
    def _changed(self) -> Iterator[Callable[[], None]]:
        """Yield a function that puts the model into the condition, once; it leaves it with the block."""
        with ExitStack() as stack:
            inside: list[Any] = []

            def change() -> None:
                if not inside:
                    inside.append(stack.enter_context(self.condition.attach(self.backbone)))

            yield change
        for run in inside:
            self.hits.update(getattr(run, "hits", {}))

    def _keep(self, key: str, answers: list[Any]) -> None:
        # Through JSON in both cases, so that a fresh answer and a kept one are the same values.
        answers = json.loads(json.dumps(answers, allow_nan=False))
        if self._file is not None:
            self._file.add(key, answers)
        self._kept[key] = answers


def _with(questions: Sequence[tuple[Any, ...]], rows: Sequence[int] | None) -> list[Any]:
    return list(questions) if rows is None else [(*q, row) for q, row in zip(questions, rows, strict=True)]

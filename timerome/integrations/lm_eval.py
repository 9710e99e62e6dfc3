"""A masked diffusion model, with or without an edit memory, as a model of lm-evaluation-harness."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backbones import Backbone
from ..diffusion import Encoded, Estimator, SamplerConfig, complete, log_likelihood
from ..memory import EditMemory

try:
    from lm_eval.api.model import LM
except ImportError:  # the harness asks for its own class, but whoever does without it needs none
    LM = object

UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Request(Protocol):
    """What the harness asks; its ``Instance``."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The request's arguments."""


class HarnessLM(LM):
    """What lm-evaluation-harness calls a model: likelihoods of continuations, of whole texts, and generated text.

    Pass it as ``model`` to ``lm_eval.simple_evaluate``. The memory is attached during each request and at no other
    time, so one model serves for runs with and without it. Texts that are too long lose their beginning.

    - ``loglikelihood``: the sum over the continuation's tokens given the context, by ``estimator``; and whether
      greedy decoding of a canvas of the continuation's length, one token a step, gives exactly the continuation.
    - ``loglikelihood_rolling``: the sum over all tokens of a text, by ``estimator``; a text longer than the context is
      cut into windows, each with the last token of the one before as its context.
    - ``generate_until``: text decoded on a canvas of ``max_gen_toks`` tokens up to the first stop string.

    Args:
        backbone: the model.
        memory: an edit memory or the path of its file; None leaves the model as it is.
        estimator: of likelihoods, see :func:`timerome.log_likelihood`.
        samples: mask draws a likelihood.
        canvas: answer positions to generate on where a task names no ``max_gen_toks``.
        sampler: how text is decoded, and the seed of all draws; a task's temperature, ``top_p`` and ``top_k`` take the
            place of its own.
        greedy: whether it is found out if continuations are what greedy decoding gives, at a forward a token; it is
            taken to be false otherwise. Few metrics ask for it.
        batch_size: rows that are run together.

    Raises:
        MemoryMismatchError: the memory was built on another model.

    Example:
        >>> import timerome as tr
        >>> from types import SimpleNamespace
        >>> from timerome.integrations.lm_eval import HarnessLM
        >>> model = HarnessLM(tr.load("testbed"))
        >>> asked = [("The capital city of Nigeria is", answer) for answer in (" Abuja", " Lagos")]
        >>> (right, greedy), (wrong, _) = model.loglikelihood([SimpleNamespace(args=pair) for pair in asked])
        >>> right > wrong, greedy
        (True, True)
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: EditMemory | str | Path | None = None,
        *,
        estimator: Estimator = "elbo_sum",
        samples: int = 32,
        canvas: int = 128,
        sampler: SamplerConfig | None = None,
        greedy: bool = True,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        memory = EditMemory.load(memory, backbone) if isinstance(memory, (str, Path)) else memory
        self._attachment = None if memory is None else memory.attached(backbone)
        self.estimator, self.samples = estimator, samples
        self.canvas, self.sampler = canvas, sampler or SamplerConfig()
        self.greedy, self.batch_size = greedy, batch_size

    @property
    def hits(self) -> Counter[str]:
        """Rows edited so far, by edit id."""
        return Counter() if self._attachment is None else self._attachment.hits

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self.backbone.tokenizer_digest()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template writes it."""
        template = self.backbone.tokenizer.apply_chat_template
        return str(template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def loglikelihood(self, requests: Sequence[Request], **options: Any) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the log-likelihood, nats, and whether it is decoded greedily.

        Raises:
            ValueError: a continuation is empty, or longer than the model's context.
        """
        sequences = [self._pair(*request.args) for request in requests]
        with self._edited():
            log_probs = self._log_probs(sequences)
            greedy = self._decoded(sequences) if self.greedy else [False] * len(sequences)
        return list(zip(log_probs, greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Request], **options: Any) -> list[float]:
        """Return the log-likelihood of each text as a whole, nats."""
        windows = [
            (i, window) for i, request in enumerate(requests) for window in self._windows(str(request.args[0]))
        ]  # fmt: skip
        with self._edited():
            found = self._log_probs([window for _, window in windows])
        total = [0.0] * len(requests)
        for (i, _), log_prob in zip(windows, found, strict=True):
            total[i] += log_prob
        return total

    def generate_until(self, requests: Sequence[Request], **options: Any) -> list[str]:
        """Return the text that each (context, keyword arguments) is answered with, up to its first stop string.

        Of the keyword arguments, ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_p`` and ``top_k``
        are heeded; others are warned of.
        """
        groups: dict[tuple[int, SamplerConfig], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._how(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        with self._edited():
            for (canvas, sampler), members in groups.items():
                prompts = [self._fitting(self.backbone.encode(requests[i].args[0]), canvas) for i in members]
                found = complete(
                    self.backbone, prompts, canvas=canvas, config=sampler, batch_size=self.batch_size
                )  # fmt: skip
                for i, row in zip(members, found, strict=True):
                    texts[i] = _until(self.backbone.decode(row), requests[i].args[1].get("until"))
        return texts

    def _edited(self) -> AbstractContextManager[Any]:
        return self._attachment or nullcontext()

    def _pair(self, context: str, continuation: str) -> Encoded:
        """A context and its continuation as tokens; white space between them belongs to the continuation."""
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        prompt = self.backbone.encode(context) if context else []
        whole = self.backbone.encode(context + continuation)
        # Where a token reaches across the seam, the two are tokenized apart.
        together = whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :] if together else self.backbone.encode(continuation)
        if not answer:
            raise ValueError(f"HarnessLM: expected a continuation of at least one token, got {continuation!r}.")
        return _sequence(self._fitting(prompt, len(answer)), answer)

    def _fitting(self, prompt: list[int], more: int) -> list[int]:
        """The end of a prompt that leaves room for ``more`` tokens."""
        room = self.backbone.max_length - more
        if room < 0:
            raise ValueError(
                f"HarnessLM: {self.backbone.name} has a context of {self.backbone.max_length} tokens, but an answer of "
                f"{more} is asked for; shorten the continuation or max_gen_toks."
            )
        return prompt[max(0, len(prompt) - room) :]

    def _windows(self, text: str) -> Iterable[Encoded]:
        tokens, size = self.backbone.encode(text), self.backbone.max_length
        if len(tokens) <= size:
            return [_sequence([], tokens)] if tokens else []
        first, rest = tokens[:size], range(size, len(tokens), size - 1)
        return [_sequence([], first), *(_sequence([tokens[i - 1]], tokens[i : i + size - 1]) for i in rest)]

    def _log_probs(self, sequences: Sequence[Encoded]) -> list[float]:
        if not sequences:
            return []
        found = log_likelihood(
            self.backbone, sequences, estimator=self.estimator, samples=self.samples, seed=self.sampler.seed,
            batch_size=self.batch_size,
        )  # fmt: skip
        return [float(value) for value in found.log_prob]

    def _decoded(self, sequences: Sequence[Encoded]) -> list[bool]:
        """Whether each answer is what greedy decoding gives; each prompt and length is decoded once."""
        asked: dict[int, dict[tuple[int, ...], Tensor]] = {}
        keys = [(len(s.answer), tuple(s.ids[~s.canvas].tolist())) for s in sequences]
        for length, prompt in keys:
            asked.setdefault(length, {})[prompt] = torch.empty(0)
        for length, decoded in asked.items():
            sampler = replace(self.sampler, steps=length, temperature=0.0, block_length=None)
            rows = complete(
                self.backbone, list(decoded), canvas=length, config=sampler, batch_size=self.batch_size
            )  # fmt: skip
            decoded.update(zip(decoded, rows, strict=True))
        return [
            bool(torch.equal(asked[length][prompt].cpu(), s.answer))
            for (length, prompt), s in zip(keys, sequences, strict=True)
        ]

    def _how(self, given: dict[str, Any]) -> tuple[int, SamplerConfig]:
        """Canvas and sampler that a task's keyword arguments ask for."""
        if unknown := sorted(set(given) - UNDERSTOOD):
            warnings.warn(f"HarnessLM.generate_until: {', '.join(unknown)} have no meaning here.", stacklevel=3)
        sampled = given.get("do_sample", given.get("temperature", 0) > 0)
        changes = {name: given[name] for name in ("top_p", "top_k") if given.get(name) is not None}
        if "do_sample" in given or "temperature" in given:
            changes["temperature"] = float(given.get("temperature", 1.0)) if sampled else 0.0
        return int(given.get("max_gen_toks", self.canvas)), replace(self.sampler, **changes)


def _sequence(prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    ids = torch.tensor([*prompt, *answer], dtype=torch.int64)
    canvas = torch.arange(len(ids)) >= len(prompt)
    return Encoded(ids, canvas, torch.zeros_like(canvas))


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Return a text up to the first of its stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text

"""Facts as token sequences with a canvas, and the partially masked states generation passes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Role
from ..facts import Fact, FactError, find_subject


@dataclass(frozen=True)
class Encoded:
    """One prompt with its answer, as tokens.

    Attributes:
        ids: prompt and answer, shape ``(L,)``, int64, on the CPU.
        canvas: True at the answer's positions, shape ``(L,)``.
        subject: True at the subject's positions, shape ``(L,)``; all False where there is none.
        fact_id: which fact it states; empty where none.
    """

    ids: Tensor
    canvas: Tensor
    subject: Tensor
    fact_id: str = ""

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return int((~self.canvas).sum())

    @property
    def answer(self) -> Tensor:
        """Ids of the answer, shape ``(canvas,)``."""
        return self.ids[self.canvas]

    def masked(self, mask_id: int, where: Tensor | None = None) -> Tensor:
        """Return ids ``(L,)`` with the canvas masked, or its part where the boolean ``where`` ``(L,)`` is True."""
        return torch.where(self.canvas if where is None else self.canvas & where, mask_id, self.ids)


def encode(
    backbone: Backbone,
    fact: Fact,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    canvas: int | None = None,
    context: str = "",
) -> Encoded:
    """Tokenize a fact: prompt and answer separately, as LLaDA's likelihood does, the answer after one space.

    Args:
        backbone: whose tokenizer to use.
        fact: the fact.
        prompt: another wording of the prompt; the subject is looked up in it and may be absent.
        answer: another answer than ``fact.object``.
        canvas: number of answer positions; the answer is closed and filled with end-of-text. None means exactly the
            answer's tokens.
        context: text put before the prompt.

    Returns:
        The sequence, with the positions of the last occurrence of the subject marked.

    Raises:
        FactError: the answer is empty or longer than the canvas.
        ValueError: the sequence is longer than the model's context.
    """
    text = fact.prompt if prompt is None else prompt
    full = f"{context} {text}" if context else text
    named, before = find_subject(text, fact.subject), len(full) - len(text)
    prompt_ids, offsets = _tokens(backbone, full)
    answer_ids = answer_tokens(backbone, fact, fact.object if answer is None else answer, full)
    if canvas is not None:
        answer_ids = fill(backbone, answer_ids, canvas, fact.id)
    length = len(prompt_ids) + len(answer_ids)
    if length > backbone.max_length:
        raise ValueError(
            f"encode: fact {fact.id!r} needs {length} tokens (prompt {len(prompt_ids)}, canvas {len(answer_ids)}), but "
            f"{backbone.name} has a context of {backbone.max_length}; shorten the prompt or the canvas."
        )
    span = (0, 0) if named is None else _span(backbone, full, before + named[0], before + named[1], offsets)
    return _laid_out(prompt_ids, answer_ids, span, fact.id)


def answer_tokens(backbone: Backbone, fact: Fact, answer: str, prompt: str) -> list[int]:
    """Return the tokens of an answer as they follow a prompt: after one space.

    Raises:
        FactError: there are none.
    """
    ids = backbone.encode(answer if prompt[-1:].isspace() else " " + answer)
    if not answer.strip() or not ids:
        raise FactError(f"encode: the answer of fact {fact.id!r} is empty; expected at least one token.")
    return ids


def _laid_out(prompt_ids: list[int], answer_ids: list[int], span: tuple[int, int], fact_id: str) -> Encoded:
    places = torch.arange(len(prompt_ids) + len(answer_ids))
    return Encoded(
        ids=torch.tensor(prompt_ids + answer_ids),
        canvas=places >= len(prompt_ids),
        subject=(places >= span[0]) & (places < span[1]),
        fact_id=fact_id,
    )


def fill(backbone: Backbone, answer_ids: list[int], canvas: int, fact_id: str = "") -> list[int]:
    """Close an answer and fill it to ``canvas`` tokens with end-of-text.

    Raises:
        FactError: the answer is longer than the canvas.
        ValueError: the backbone has no end-of-text token.
    """
    if len(answer_ids) > canvas:
        raise FactError(
            f"encode: the answer of fact {fact_id!r} has {len(answer_ids)} tokens, more than the canvas of {canvas}; "
            "use a longer canvas."
        )
    if backbone.eos_id is None and len(answer_ids) < canvas:
        raise ValueError(f"encode: {backbone.name} has no end-of-text token to fill the canvas with.")
    return answer_ids + [backbone.eos_id or 0] * (canvas - len(answer_ids))


def _tokens(backbone: Backbone, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Return a text's ids and, of a fast tokenizer, the characters each stands for."""
    if not getattr(backbone.tokenizer, "is_fast", False):
        return backbone.encode(text), None
    found = backbone.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), found["offset_mapping"]


def _span(
    backbone: Backbone, text: str, start: int, end: int, offsets: list[tuple[int, int]] | None
) -> tuple[int, int]:
    if offsets is not None:
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        return inside[0], inside[-1] + 1
    # Slow tokenizers give no offsets: count the tokens of the text before and up to the end.
    before, upto = len(backbone.encode(text[:start])), len(backbone.encode(text[:end]))
    return min(before, upto - 1), upto


def with_answer(sequence: Encoded, answer_ids: Sequence[int]) -> Encoded:
    """Return ``sequence`` with other tokens on its canvas, which becomes as long as they are."""
    marked = sequence.subject.nonzero().flatten().tolist()
    span = (marked[0], marked[-1] + 1) if marked else (0, 0)
    return _laid_out(sequence.ids[~sequence.canvas].tolist(), list(answer_ids), span, sequence.fact_id)


def without_prompt(sequence: Encoded, mask_id: int) -> Tensor:
    """Return ids ``(L,)`` with every prompt token masked: the state in which the model is not asked anything."""
    return torch.where(sequence.canvas, sequence.ids, mask_id)


def role_positions(sequence: Encoded, ids: Tensor, role: Role, mask_id: int) -> Tensor:
    """Return the boolean positions ``(L,)`` of a role in the state ``ids`` ``(L,)`` of a sequence.

    ``object`` are the canvas positions still masked in ``ids``; on a backbone with shifted logits pass the result
    through :meth:`Backbone.reads_from`.
    """
    if role == "object":
        return sequence.canvas & (ids == mask_id)
    if role == "prompt":
        return ~sequence.canvas
    if role == "subject":
        return sequence.subject
    last = torch.zeros_like(sequence.subject)
    if sequence.subject.any():
        last[int(sequence.subject.nonzero().max())] = True
    return last


def random_reveal(canvas: Tensor, masked: int, generator: torch.Generator) -> Tensor:
    """Return a boolean ``(L,)`` with exactly ``masked`` canvas positions True, drawn without replacement."""
    places = canvas.nonzero().flatten()
    chosen = places[torch.randperm(len(places), generator=generator)[:masked]]
    out = torch.zeros_like(canvas)
    out[chosen] = True
    return out


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices whose sequences have one length, so that none needs padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or lengths[i] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

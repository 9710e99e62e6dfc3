"""Facts as padded, partly masked batches for methods that train."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import timerome as tr
from timerome.diffusion import Encoded, encode
from timerome.facts import Fact


@dataclass(frozen=True)
class Batch:
    """Sequences of several lengths, padded on the right.

    Attributes:
        truth: ids with the whole answer shown, ``(B, L)``.
        canvas: answer positions, ``(B, L)``.
        attend: False at padding, ``(B, L)``.
        masked: answer positions that the model does not see, ``(B, L)``.
    """

    truth: Tensor
    canvas: Tensor
    attend: Tensor
    masked: Tensor

    def seen(self, mask_id: int) -> Tensor:
        """What the model is shown, ``(B, L)``."""
        return torch.where(self.masked, mask_id, self.truth)

    def unasked(self, mask_id: int) -> Tensor:
        """The same with every prompt token masked, too, ``(B, L)``."""
        return torch.where(self.masked | ~self.canvas & self.attend, mask_id, self.truth)


def sequences_of(backbone: tr.Backbone, facts: Sequence[Fact]) -> list[Encoded]:
    """Tokenize facts with the answer they shall have, on a canvas of the longer of both answers."""
    found = []
    for fact in facts:
        present = encode(backbone, fact)
        if fact.new_object is None:
            found.append(present)
            continue
        new = encode(backbone, fact, answer=fact.new_object)
        found.append(encode(backbone, fact, answer=fact.new_object, canvas=max(len(present.answer), len(new.answer))))
    return found


def pad(sequences: Sequence[Encoded], fill: int) -> Batch:
    """Stack sequences with the whole answer masked."""
    longest = max(len(s.ids) for s in sequences)

    def stack(tensors: list[Tensor], value: int | bool) -> Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, longest - len(t)), value=value) for t in tensors])

    canvas = stack([s.canvas for s in sequences], False)
    attend = stack([torch.ones_like(s.canvas) for s in sequences], False)
    return Batch(stack([s.ids for s in sequences], fill), canvas, attend, canvas)


def mask_at_random(batch: Batch, generator: torch.Generator) -> Batch:
    """Mask each answer token with a chance t of its row's own, t uniform on (0, 1); at least one a row."""
    t = torch.rand(len(batch.truth), 1, generator=generator)
    u = torch.rand(batch.truth.shape, generator=generator)
    lowest = torch.where(batch.canvas, u, torch.inf).amin(1, keepdim=True)
    masked = batch.canvas & ((u < t) | (u == lowest))
    return Batch(batch.truth, batch.canvas, batch.attend, masked)


def shuffled(sequences: Sequence[Encoded], size: int, seed: int) -> Iterator[list[Encoded]]:
    """Yield batches for ever, in a new random order every epoch."""
    order = random.Random(seed)
    queue: list[Encoded] = []
    while True:
        while len(queue) < size:
            queue += order.sample(list(sequences), len(sequences))
        yield [queue.pop(0) for _ in range(size)]


def logits_of(backbone: tr.Backbone, ids: Tensor, attend: Tensor) -> Tensor:
    """Logits ``(B, L, V)``, aligned with what they predict; padding is not attended to."""
    return backbone.logits(ids, attention_mask=attend)

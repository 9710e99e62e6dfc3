"""What each masked position becomes, and which of them are kept: pure functions of logits and of given randomness."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Remasking


def keep_likely(logits: Tensor, top_p: float | None = None, top_k: int | None = None) -> Tensor:
    """Set the logits ``(*, V)`` of all but the likeliest tokens to the least value of their dtype.

    Args:
        logits: unnormalised, float.
        top_p: keep the smallest set of tokens whose probability exceeds this; the likeliest is always kept.
        top_k: keep so many, and any that tie with the last.
    """
    least = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = -1.0
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before > top_p), least
        )
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1:], least)
    return logits


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers; float64 is needed, in float32 it loses its tail."""
    return -torch.log(-torch.log(uniform))


def confidences(logits: Tensor, tokens: Tensor, remasking: Remasking) -> Tensor:
    """How sure the prediction of each position is, ``(n,)`` for logits ``(n, V)`` and the ``tokens`` ``(n,)`` chosen.

    ``entropy`` is the negative entropy in nats, ``topk_margin`` the distance of the two largest probabilities,
    ``low_confidence`` the probability of the chosen token.
    """
    probability = logits.softmax(-1)
    if remasking == "topk_margin":
        first, second = probability.topk(2, dim=-1)[0].unbind(-1)
        return first - second
    if remasking == "entropy":
        return (probability * torch.log(probability + 1e-10)).sum(-1)
    return probability.gather(-1, tokens[:, None])[:, 0]


def highest(scores: Tensor, counts: Tensor) -> Tensor:
    """Where the ``counts`` ``(B,)`` highest scores of each row of ``(B, L)`` are; of equal ones, the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < counts[:, None]


def times(steps: int, eps: float) -> list[float]:
    """The chance 1 - s/t of being unmasked at each step, for times t falling evenly from 1 to ``eps``.

    In float32, as published: the whole part of masked · (1 - s/t) depends on its last bit.
    """
    t = torch.linspace(1, eps, steps + 1)
    return [float(1 - s / t) for t, s in zip(t[:-1], t[1:], strict=True)]

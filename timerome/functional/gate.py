"""Gates: similarity to keys, and thresholds with a promised false-trigger rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor


def cosine_similarity(rows: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every row with every key, float32 ``(*batch, T, N)``; zero vectors are similar to nothing.

    Args:
        rows: ``(*batch, T, d)``.
        keys: ``(N, d)``.
    """
    unit_rows = torch.nn.functional.normalize(rows.float(), dim=-1)
    return unit_rows @ torch.nn.functional.normalize(keys.float(), dim=-1).T


def conformal_threshold(scores: Tensor, epsilon: float) -> float:
    """Threshold that a fresh negative's score reaches with probability at most ``epsilon`` (split conformal).

    With n calibration scores exchangeable with the fresh one, the ⌈(1 − ε)(n + 1)⌉-th smallest of them is exceeded with
    probability at most ε. A gate fires strictly above the threshold.

    Args:
        scores: calibration scores of negatives, ``(n,)``.
        epsilon: promised rate, 0 < ε < 1. Below 1 / (n + 1) no n scores can promise it.

    Raises:
        ValueError: no scores, some are not finite, ε is outside (0, 1) or too small for n.

    Source: Vovk, Gammerman, Shafer 2005; Papadopoulos et al. 2002 (inductive conformal prediction).

    Example:
        >>> conformal_threshold(torch.arange(99.0), epsilon=0.01)
        98.0
    """
    n = scores.numel()
    if n == 0 or not torch.isfinite(scores).all():
        raise ValueError(f"conformal_threshold: expected finite calibration scores, got {n} of them, not all finite.")
    if not 0 < epsilon < 1:
        raise ValueError(f"conformal_threshold: expected 0 < epsilon < 1, got {epsilon}.")
    rank = n + 1 - _above(n, epsilon)
    if rank > n:
        raise ValueError(
            f"conformal_threshold: {n} negatives can promise a false-trigger rate of at least {1 / (n + 1):.2g}, not "
            f"{epsilon:g}; calibrate on more, or ask for less."
        )
    return float(scores.flatten().kthvalue(rank).values)


def deciding(n: int, epsilon: float | None) -> int:
    """Return how many of the largest of ``n`` calibration scores can decide about a threshold, at least one.

    Args:
        n: number of scores.
        epsilon: promised rate, as of :func:`conformal_threshold`; None takes the largest score as the threshold.

    Example:
        >>> deciding(99, 0.01), deciding(99, 0.05), deciding(99, None)
        (1, 5, 1)
    """
    return 1 if epsilon is None else min(n, max(1, _above(n, epsilon)))


def _above(n: int, epsilon: float) -> int:
    """How many of the n + 1 gaps between ``n`` scores may lie above a threshold that ``epsilon`` of them exceed."""
    return n + 1 - math.ceil((1 - epsilon) * (n + 1) - 1e-9)


def name_overlap(texts: Sequence[AbstractSet[int]], names: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Share of each name's tokens that each text holds; the best of a name's spellings counts.

    Args:
        texts: the token ids that each holds.
        names: for each name its spellings, token ids each.

    Returns:
        ``(texts, names)`` float32, 0 to 1.

    Example:
        >>> name_overlap([{0, 1, 2}], [[[1, 2]], [[2, 3], [4]]])
        tensor([[1.0000, 0.5000]])
    """
    spelled = [(i, spelling) for i, name in enumerate(names) for spelling in name if spelling]
    column = {token: i for i, token in enumerate({token for _, spelling in spelled for token in spelling})}
    holds = torch.zeros(len(texts), len(column))
    for row, text in zip(holds, texts, strict=True):
        row[[column[token] for token in column.keys() & text]] = 1.0
    owner = torch.tensor([i for i, _ in spelled], dtype=torch.int64)
    sizes = torch.tensor([len(spelling) for _, spelling in spelled], dtype=torch.int64)
    tokens = torch.tensor([column[token] for _, spelling in spelled for token in spelling], dtype=torch.int64)
    held = torch.zeros(len(texts), len(spelled))
    held.index_add_(1, torch.arange(len(spelled)).repeat_interleave(sizes), holds[:, tokens])
    found = torch.zeros(len(texts), len(names))
    return found.scatter_reduce_(1, owner.expand_as(held), held / sizes, "amax")

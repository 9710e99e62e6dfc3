"""Choose the keys that represent a fact."""

from __future__ import annotations

import torch
from torch import Tensor


def pivoted_cholesky(gram: Tensor, rank: int, *, tolerance: float = 1e-6) -> Tensor:
    """Choose rows that span the others best, greedily: the pivots of a Cholesky factorisation with diagonal pivoting.

    Args:
        gram: K Kᵀ, symmetric positive semi-definite, shape ``(n, n)``; computed in float64.
        rank: at most so many rows.
        tolerance: stop once no remaining row has more than this share of the largest squared norm left to explain.

    Returns:
        Indices of the chosen rows, in the order chosen, int64, shape ``(r,)`` with r <= ``rank``.

    Raises:
        ValueError: ``gram`` is not square or not finite, or ``rank`` is not positive.

    Source: Harbrecht, Peters, Schneider 2012, "On the low-rank approximation by the pivoted Cholesky decomposition".

    Example:
        >>> keys = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> pivoted_cholesky(keys @ keys.T, rank=3)
        tensor([1, 2])
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"pivoted_cholesky: expected a square matrix, got shape {tuple(gram.shape)}.")
    if rank < 1:
        raise ValueError(f"pivoted_cholesky: expected rank >= 1, got {rank}.")
    if not torch.isfinite(gram).all():
        raise ValueError("pivoted_cholesky: the Gram matrix is not finite; check the activations it was made from.")
    gram = gram.double()
    n = gram.shape[0]
    left = gram.diagonal().clone()
    floor = tolerance * float(left.max()) if n else 0.0
    factor = gram.new_zeros(min(rank, n), n)
    chosen: list[int] = []
    for j in range(min(rank, n)):
        pivot = int(left.argmax())
        if left[pivot] <= floor:
            break
        row = gram[pivot] - factor[:j].T @ factor[:j, pivot]
        factor[j] = row / left[pivot].sqrt()
        left = left - factor[j] ** 2
        left[pivot] = -torch.inf
        chosen.append(pivot)
    return torch.tensor(chosen, dtype=torch.int64)

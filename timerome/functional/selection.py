"""The few keys that represent a fact: chosen from all of them, or condensed from them."""

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


def condense(keys: Tensor, targets: Tensor, rank: int, *, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Replace many keys and targets by at most ``rank`` combinations of them that a ridge regression sees alike.

    With K = U S Vᵀ, the rows √(r/n) Uᵣᵀ [K, D] have r/n times the Gram matrix KᵀK and cross products KᵀD that the n
    rows had, but for what lies outside the first r principal directions. At full rank the ridge solution with a penalty
    relative to the mean squared row norm is the same; nothing is thrown away as it is where keys are chosen.

    Args:
        keys: K, centred, ``(n, d)``.
        targets: D, ``(n, d)``.
        rank: at most so many rows.
        tolerance: directions with less than this share of the largest one's energy are left out.

    Returns:
        Condensed keys and targets, ``(r, d)`` float32 each; the given ones if there are no more than ``rank``.

    Raises:
        ValueError: shapes disagree or ``rank`` is not positive.

    Example:
        >>> keys, targets = condense(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]), torch.ones(3, 2), rank=2)
        >>> keys.shape, bool((3 * keys.T @ keys).round(decimals=4)[0, 0] == 14)
        (torch.Size([1, 2]), True)
    """
    if keys.dim() != 2 or keys.shape != targets.shape:
        raise ValueError(
            f"condense: expected keys and targets of one shape (n, d), got {tuple(keys.shape)} and "
            f"{tuple(targets.shape)}."
        )
    if rank < 1:
        raise ValueError(f"condense: expected rank >= 1, got {rank}.")
    n = len(keys)
    if n <= rank:
        return keys, targets
    left, energy, _ = torch.linalg.svd(keys.double(), full_matrices=False)
    kept = energy[:rank] ** 2 > tolerance * energy[0] ** 2
    basis = left[:, :rank][:, kept]
    scale = (basis.shape[1] / n) ** 0.5
    return (scale * basis.T @ keys.double()).float(), (scale * basis.T @ targets.double()).float()

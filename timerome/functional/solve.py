"""The closed form of an edit memory: one ridge system."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops


class RidgeMemory(NamedTuple):
    """A solved ridge system; apply it with :func:`timerome.ops.sparse_lowrank_residual`.

    Attributes:
        mean: μ, ``(d,)`` float32.
        keys: K_c = [K − μ; √β (P − μ)], ``(N + P, d)`` float32; the first N rows are the edit's own keys.
        coef: the columns of A that meet a target, ``(N + P, N)`` float32.
        values: D, ``(N, d)`` float32.
        scale: s̄, the mean squared row norm of K_c, float64 scalar.
    """

    mean: Tensor
    keys: Tensor
    coef: Tensor
    values: Tensor
    scale: Tensor


def null_space_of(protect: Tensor, energy: float) -> Tensor:
    """Return the projector onto what is left beside the leading directions of some keys, float64 ``(d, d)``.

    Args:
        protect: P − μ, ``(P, d)``.
        energy: share of their squared norm that the directions taken out hold at least, 0 < energy < 1.

    Raises:
        ValueError: ``energy`` is out of range, or no direction is left.

    Source: AlphaEdit (Fang et al. 2025, arXiv 2410.02355), where eigenvalues below a threshold make the null space.

    Example:
        >>> null_space_of(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.9).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    if not 0 < energy < 1:
        raise ValueError(f"null_space_of: expected 0 < energy < 1, got {energy}.")
    held = protect.double()
    values, vectors = torch.linalg.eigh(held.T @ held)
    share = values.flip(0).clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    count = int((share < energy).sum()) + 1
    if count >= len(values):
        raise ValueError(
            f"null_space_of: the protected keys fill all {len(values)} dimensions before {energy:g} of their energy "
            "is held; project out less, or protect by the penalty beta."
        )
    free = vectors[:, : len(values) - count]
    return free @ free.T


def solve(
    keys: Tensor,
    targets: Tensor,
    *,
    ridge: float,
    mean: Tensor | None = None,
    protect: Tensor | None = None,
    beta: float = 1.0,
    null_space: float | None = None,
) -> RidgeMemory:
    r"""Solve for the memory that answers each key with its target and each protected key with nothing.

        K_c = [K − μ ; √β (P − μ)],  A = (K_c K_cᵀ + λ s̄ I)⁻¹,  R(H) = (H − μ) K_cᵀ A [D ; 0]

    Rows with zero target drop out of D but stay in A. Gram and factor are float64, what is returned float32.

    With ``null_space``, protected keys are kept out by projection and not by penalty: K_c = (K − μ) Q with Q of
    :func:`null_space_of`, and nothing is added along the directions that hold their energy.

    Args:
        keys: K, ``(N, d)``.
        targets: D, ``(N, d)``.
        ridge: λ > 0, relative to s̄, so that one value transfers between layers and models.
        mean: μ, ``(d,)``; None is zero.
        protect: P, ``(P, d)``; None protects nothing, which is the paper's form.
        beta: β >= 0, weight of the protected keys.
        null_space: share of the protected keys' energy that is projected out, in place of β; None is the penalty.

    Raises:
        ValueError: shapes disagree, or values are out of range or not finite.
        NotPositiveDefiniteError: the factorisation failed.

    Source: TimeROME-DLM (arXiv 2606.12841) for the ridge memory; mean, protection and the relative λ are ours.

    Example:
        >>> memory = solve(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), ridge=1e-6)
        >>> from timerome.ops import sparse_lowrank_residual
        >>> sparse_lowrank_residual(torch.zeros(1, 2) + torch.tensor([1.0, 0.0]), *memory[1:4]).round(decimals=3)
        tensor([[1., 1.]])
    """
    if keys.dim() != 2 or keys.shape != targets.shape or keys.shape[0] == 0:
        raise ValueError(
            f"solve: expected keys and targets of one shape (N, d) with N >= 1, got {tuple(keys.shape)} and "
            f"{tuple(targets.shape)}."
        )
    if not ridge > 0:
        raise ValueError(f"solve: expected ridge > 0, got {ridge}; a memory without ridge has no unique solution.")
    if beta < 0:
        raise ValueError(f"solve: expected beta >= 0, got {beta}.")
    for name, value in (("keys", keys), ("targets", targets), ("protect", protect), ("mean", mean)):
        if value is not None and not torch.isfinite(value).all():
            bad = (~torch.isfinite(value.reshape(value.shape[0], -1)).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"solve: {name} must be finite, but rows {bad[:8]} are not; the model's activations overflowed or its "
                "weights hold NaN."
            )
    centre = torch.zeros(keys.shape[1], dtype=torch.float64) if mean is None else mean.double()
    rows = keys.double() - centre
    if null_space is not None and (protect is None or not len(protect)):
        raise ValueError("solve: null_space needs protected keys, got none.")
    if protect is not None and len(protect) and (beta > 0 or null_space is not None):
        if protect.dim() != 2 or protect.shape[1] != keys.shape[1]:
            raise ValueError(f"solve: expected protect of shape (P, {keys.shape[1]}), got {tuple(protect.shape)}.")
        held = protect.double() - centre
        rows = torch.cat([rows, beta**0.5 * held]) if null_space is None else rows @ null_space_of(held, null_space)
    factor = ops.ridge_cholesky(rows, ridge=ridge)
    return RidgeMemory(
        mean=centre.float(),
        keys=rows.float(),
        coef=factor.inverse[:, : len(keys)].float().contiguous(),
        values=targets.float().contiguous(),
        scale=factor.scale,
    )

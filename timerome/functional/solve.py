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


def solve(
    keys: Tensor,
    targets: Tensor,
    *,
    ridge: float,
    mean: Tensor | None = None,
    protect: Tensor | None = None,
    beta: float = 1.0,
) -> RidgeMemory:
    r"""Solve for the memory that answers each key with its target and each protected key with nothing.

        K_c = [K − μ ; √β (P − μ)],  A = (K_c K_cᵀ + λ s̄ I)⁻¹,  R(H) = (H − μ) K_cᵀ A [D ; 0]

    Rows with zero target drop out of D but stay in A. Gram and factor are float64, what is returned float32.

    Args:
        keys: K, ``(N, d)``.
        targets: D, ``(N, d)``.
        ridge: λ > 0, relative to s̄, so that one value transfers between layers and models.
        mean: μ, ``(d,)``; None is zero.
        protect: P, ``(P, d)``; None protects nothing, which is the paper's form.
        beta: β >= 0, weight of the protected keys.

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
    if protect is not None and len(protect) and beta > 0:
        if protect.dim() != 2 or protect.shape[1] != keys.shape[1]:
            raise ValueError(f"solve: expected protect of shape (P, {keys.shape[1]}), got {tuple(protect.shape)}.")
        rows = torch.cat([rows, beta**0.5 * (protect.double() - centre)])
    factor = ops.ridge_cholesky(rows, ridge=ridge)
    return RidgeMemory(
        mean=centre.float(),
        keys=rows.float(),
        coef=factor.inverse[:, : len(keys)].float().contiguous(),
        values=targets.float().contiguous(),
        scale=factor.scale,
    )

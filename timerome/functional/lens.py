"""The smallest activation change that makes the unembedding prefer a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def norm_directions(norm: nn.Module, head_rows: Tensor) -> Tensor:
    """Fold a final RMSNorm's or LayerNorm's gain (and centring) into rows of the unembedding.

    Args:
        norm: the final norm.
        head_rows: rows of the unembedding, ``(*batch, d)``.

    Returns:
        u such that logit = u · h / rms(h) (+ a constant), ``(*batch, d)`` float32.
    """
    weight = getattr(norm, "weight", None)
    rows = head_rows.float() if weight is None else head_rows.float() * weight.float()
    if isinstance(norm, nn.LayerNorm):
        rows = rows - rows.mean(-1, keepdim=True)
    return rows


def lens_targets(
    hidden: Tensor,
    tokens: Tensor,
    unembed: Callable[[Tensor], Tensor],
    norm: nn.Module,
    head_weight: Tensor,
    *,
    margin: float,
    rivals: int = 8,
    rounds: int = 12,
) -> Tensor:
    r"""Find δ of small norm such that, at h + δ, each token's logit leads every rival's by ``margin``.

    Each round linearises the norm at the present point (logit_v = u_v · h / rms(h)), takes the strongest rivals that
    are still closer than the margin, and adds the least-norm change that closes those gaps:
    δ += Uᵀ (U Uᵀ + ε I)⁻¹ gap, U the rows (u_token − u_rival) / rms. No gradient is taken.

    Args:
        hidden: h, activations of the residual stream before the final norm, ``(n, d)``.
        tokens: the wanted token of each row, ``(n,)`` int64.
        unembed: exact logits of activations, ``(n, d)`` -> ``(n, V)``.
        norm: the final norm.
        head_weight: the unembedding, ``(V, d)``.
        margin: wanted lead m > 0, in logits.
        rivals: how many rivals are corrected at once.
        rounds: at most so many; rows that have their margin stop changing.

    Returns:
        δ, ``(n, d)`` float32.

    Raises:
        ValueError: shapes disagree, or margin, rivals or rounds are not positive.

    Source: ours; the logit lens is nostalgebraist 2020.
    """
    if hidden.dim() != 2 or tokens.shape != hidden.shape[:1]:
        raise ValueError(
            f"lens_targets: expected hidden (n, d) and tokens (n,), got {tuple(hidden.shape)} and "
            f"{tuple(tokens.shape)}."
        )
    if margin <= 0 or rivals < 1 or rounds < 1:
        raise ValueError(
            f"lens_targets: expected margin > 0, rivals >= 1 and rounds >= 1, got {margin}, {rivals}, {rounds}."
        )
    h = hidden.float().clone()
    eps = torch.finfo(torch.float32).eps
    for _ in range(rounds):
        logits = unembed(h)
        own = logits.gather(1, tokens[:, None])
        others = logits.scatter(1, tokens[:, None], -torch.inf)
        top, index = others.topk(min(rivals, logits.shape[1] - 1), dim=1)
        gap = (margin - (own - top)).clamp_min(0)
        if not (gap > 1e-3 * margin).any():
            break
        spread = h - h.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else h
        rms = spread.pow(2).mean(-1).clamp_min(eps).sqrt()
        rows = norm_directions(norm, head_weight[tokens])[:, None] - norm_directions(norm, head_weight[index])
        rows = rows / rms[:, None, None] * (gap > 0)[..., None]
        gram = rows @ rows.mT
        jitter = 1e-4 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(eps)
        solved = torch.linalg.solve(
            gram + jitter[:, None, None] * torch.eye(gram.shape[1], device=h.device), gap[..., None]
        )
        h = h + (rows.mT @ solved)[..., 0]
    return h - hidden.float()

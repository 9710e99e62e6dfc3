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
        rms = _size(norm, h)
        rows = norm_directions(norm, head_weight[tokens])[:, None] - norm_directions(norm, head_weight[index])
        rows = rows / rms[:, None, None] * (gap > 0)[..., None]
        gram = rows @ rows.mT
        jitter = 1e-4 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(eps)
        solved = torch.linalg.solve(
            gram + jitter[:, None, None] * torch.eye(gram.shape[1], device=h.device), gap[..., None]
        )
        h = h + (rows.mT @ solved)[..., 0]
    return h - hidden.float()


def shared_lens_target(
    hidden: Tensor,
    token: int,
    unembed: Callable[[Tensor], Tensor],
    norm: nn.Module,
    head_weight: Tensor,
    *,
    margin: float,
    rivals: int = 4,
    rounds: int = 24,
    active: int = 48,
) -> Tensor:
    """Find one δ of small norm such that, at every row h + δ, the token's logit leads every rival's by ``margin``.

    As :func:`lens_targets`, but one change for many activations: each round closes the ``active`` widest gaps over all
    rows together. A token that was never an answer in training lies so close to others like it that no such δ may
    exist, and the rounds run away; then δ is the direction in which the token leads all others most
    (:func:`separating_direction`), as long as the margin needs, or as helps.

    Args:
        hidden: h, activations before the final norm, ``(n, d)``.
        token: the wanted token.
        unembed: exact logits of activations, ``(n, d)`` -> ``(n, V)``.
        norm: the final norm.
        head_weight: the unembedding, ``(V, d)``.
        margin: wanted lead m > 0, in logits.
        rivals: how many rivals of a row are looked at in a round.
        rounds: at most so many.
        active: at most so many gaps are closed in a round.

    Returns:
        δ, ``(d,)`` float32.

    Raises:
        ValueError: there is no row, or margin, rivals, rounds or active are not positive.

    Source: ours.
    """
    if hidden.dim() != 2 or not len(hidden):
        raise ValueError(f"shared_lens_target: expected hidden (n, d) with n >= 1, got {tuple(hidden.shape)}.")
    if margin <= 0 or min(rivals, rounds, active) < 1:
        raise ValueError(
            f"shared_lens_target: expected margin > 0 and rivals, rounds, active >= 1, got {margin}, {rivals}, "
            f"{rounds}, {active}."
        )
    hidden = hidden.float()
    delta = torch.zeros(hidden.shape[1], device=hidden.device)
    wanted = norm_directions(norm, head_weight[token])
    for _ in range(rounds):
        h = hidden + delta
        lead, index = _leads(unembed(h), token, rivals)
        gap = margin - lead
        widest, where = gap.flatten().topk(min(active, gap.numel()))
        where = where[widest > 1e-3 * margin]
        if not len(where):
            return delta
        rms = _size(norm, h)
        row = where // gap.shape[1]
        rows = (wanted - norm_directions(norm, head_weight[index.flatten()[where]])) / rms[row, None]
        gram = rows @ rows.T
        # Many rows say nearly the same; the jitter shares a gap out among them instead of closing it for each.
        jitter = 1e-2 * gram.diagonal().mean()
        solved = torch.linalg.solve(gram + jitter * torch.eye(len(gram), device=gram.device), gap.flatten()[where])
        delta = delta + rows.T @ solved
    lead = _leads(unembed(hidden + delta), token, 1)[0].min()
    size = hidden.norm(dim=1).amax().clamp_min(1.0)
    if lead >= 0.5 * margin and delta.norm() <= 16 * size:
        return delta
    apart = separating_direction(norm_directions(norm, head_weight.detach()), token)
    best, most = delta, lead if delta.norm() <= 16 * size else torch.full_like(lead, -torch.inf)
    for length in (1.0, 2.0, 4.0, 8.0, 16.0):
        tried = length * size * apart
        lead = _leads(unembed(hidden + tried), token, 1)[0].min()
        if lead > most:
            best, most = tried, lead
        if lead >= margin:
            break
    return best


def separating_direction(rows: Tensor, token: int, *, rounds: int = 2000) -> Tensor:
    """Return the direction in which a token's row leads all others most, ``(d,)`` float32 of norm 1.

    It is that of the point nearest the origin in the convex hull of the differences from the others.

    Args:
        rows: of the unembedding, the norm's gain included, ``(V, d)``.
        token: whose row.
        rounds: at most so many; each looks at the rival that is closest by then.

    Source: Gilbert 1966, "An iterative procedure for computing the minimum of a quadratic form on a convex set".

    Example:
        >>> separating_direction(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -9.0]]), 0).round(decimals=2)
        tensor([0.9900, 0.1100])
    """
    rows = rows.float()
    rival = rows[token] - torch.cat([rows[:token], rows[token + 1 :]])
    point = rival.mean(0)
    for _ in range(rounds):
        closest = rival[(rival @ point).argmin()]
        step = closest - point
        share = float(-(point @ step) / (step @ step).clamp_min(torch.finfo(torch.float32).tiny))
        if share < 1e-6:
            break
        point = point + min(share, 1.0) * step
    return point / point.norm().clamp_min(torch.finfo(torch.float32).tiny)


def _size(norm: nn.Module, h: Tensor) -> Tensor:
    """What the norm divides each row by, ``(n,)``."""
    spread = h - h.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else h
    return spread.pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).eps).sqrt()


def _leads(logits: Tensor, token: int, rivals: int) -> tuple[Tensor, Tensor]:
    """Return by how much the token leads its best rivals in each row, and which they are, ``(n, rivals)``."""
    own = logits[:, token].clone()
    logits[:, token] = -torch.inf
    top, index = logits.topk(min(rivals, logits.shape[1] - 1), dim=1)
    return own[:, None] - top, index

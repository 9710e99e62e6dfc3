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


RIVALS, GAPS = 4, 48  # of a row looked at, and of a place closed, in a round of shared_lens_targets


def shared_lens_targets(
    hidden: Tensor,
    places: Tensor,
    tokens: Tensor,
    unembed: Callable[[Tensor], Tensor],
    norm: nn.Module,
    head_weight: Tensor,
    *,
    margin: float,
    rounds: int = 24,
) -> Tensor:
    """Find a δ of small norm for each place: at all its rows, h + δ gives its token the lead of ``margin`` over rivals.

    As :func:`lens_targets`, but one change for many activations: each round closes the 48 widest gaps over all
    rows of a place together. A token that was never an answer in training lies so close to others like it that no such
    δ may exist, and the rounds run away; then δ is the direction in which the token leads all others most
    (:func:`separating_direction`), as long as the margin needs, or as helps.

    Args:
        hidden: h, activations before the final norm, ``(n, d)``.
        places: which place each row belongs to, ``(n,)`` int64; one without rows gets δ = 0.
        tokens: the wanted token of each place, ``(P,)`` int64.
        unembed: exact logits of activations, ``(n, d)`` -> ``(n, V)``.
        norm: the final norm.
        head_weight: the unembedding, ``(V, d)``.
        margin: wanted lead m > 0, in logits.
        rounds: at most so many; a place that has its margin stops changing.

    Returns:
        δ, ``(P, d)`` float32.

    Raises:
        ValueError: shapes disagree, there is no row, or margin or rounds are not positive.

    Source: ours.
    """
    if hidden.dim() != 2 or not len(hidden) or places.shape != hidden.shape[:1] or tokens.dim() != 1:
        raise ValueError(
            "shared_lens_targets: expected hidden (n, d) with n >= 1, places (n,) and tokens (P,), got "
            f"{tuple(hidden.shape)}, {tuple(places.shape)} and {tuple(tokens.shape)}."
        )
    if margin <= 0 or rounds < 1:
        raise ValueError(f"shared_lens_targets: expected margin > 0 and rounds >= 1, got {margin} and {rounds}.")
    hidden = hidden.float()
    delta = torch.zeros(len(tokens), hidden.shape[1], device=hidden.device)
    open_places = places.unique()
    for _ in range(rounds):
        index = torch.isin(places, open_places).nonzero().flatten()
        place = torch.searchsorted(open_places, places[index])
        h = hidden[index] + delta[places[index]]
        lead, rival = _leads(unembed, h, tokens[places[index]], RIVALS)
        gap, slot = _by_place(margin - lead, place, len(open_places), -torch.inf)
        widest, where = gap.flatten(1).topk(min(GAPS, gap[0].numel()), dim=1)
        wide = widest > 1e-3 * margin
        still = wide.any(1)
        if not still.any():
            return delta
        chosen = slot.gather(1, where // lead.shape[1])[still]  # rows of h
        wide, widest, column = wide[still], widest[still], where[still] % lead.shape[1]
        open_places = open_places[still]
        rows = norm_directions(norm, head_weight[tokens[open_places]])[:, None] - norm_directions(
            norm, head_weight[rival[chosen, column]]
        )
        rows = rows * (wide / _size(norm, h)[chosen])[..., None]
        gram = rows @ rows.mT
        # Many rows say nearly the same; the jitter shares a gap out among them instead of closing it for each.
        jitter = 1e-2 * gram.diagonal(dim1=1, dim2=2).sum(1) / wide.sum(1)
        eye = torch.eye(gram.shape[1], device=gram.device)
        solved = torch.linalg.solve(gram + jitter[:, None, None] * eye, torch.where(wide, widest, 0.0)[..., None])
        delta[open_places] += (rows.mT @ solved)[..., 0]
    for p in open_places.tolist():
        mine = hidden[places == p]
        delta[p] = _or_apart(mine, int(tokens[p]), delta[p], unembed, norm, head_weight, margin)
    return delta


def _by_place(values: Tensor, place: Tensor, count: int, fill: float) -> tuple[Tensor, Tensor]:
    """Lay rows out by place: ``(count, most rows, rivals)``, and which row stands where, ``(count, most rows)``."""
    order = place.argsort(stable=True)
    size = place.bincount(minlength=count)
    at = torch.arange(len(place), device=place.device) - (size.cumsum(0) - size)[place[order]]
    table = values.new_full((count, int(size.max()), values.shape[1]), fill)
    rows = torch.zeros(table.shape[:2], dtype=torch.long, device=place.device)
    table[place[order], at], rows[place[order], at] = values[order], order
    return table, rows


def _or_apart(
    hidden: Tensor,
    token: int,
    delta: Tensor,
    unembed: Callable[[Tensor], Tensor],
    norm: nn.Module,
    head_weight: Tensor,
    margin: float,
) -> Tensor:
    """Return the change that the rounds ended with, or one along the separating direction where they ran away."""

    def lead_of(change: Tensor) -> Tensor:
        wanted = torch.full((len(hidden),), token, device=hidden.device)
        return _leads(unembed, hidden + change, wanted, 1)[0].min()

    lead, size = lead_of(delta), hidden.norm(dim=1).amax().clamp_min(1.0)
    near = delta.norm() <= 16 * size
    if lead >= 0.5 * margin and near:
        return delta
    apart = separating_direction(norm_directions(norm, head_weight.detach()), token)
    best, most = delta, lead if near else torch.full_like(lead, -torch.inf)
    for length in (1.0, 2.0, 4.0, 8.0, 16.0):
        tried = length * size * apart
        lead = lead_of(tried)
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


def _leads(unembed: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, rivals: int) -> tuple[Tensor, Tensor]:
    """Return by how much each row's token leads its best rivals, and which they are, ``(n, rivals)``."""
    found = []
    for h, token in zip(hidden.split(256), tokens.split(256), strict=True):  # a large vocabulary's logits add up
        logits = unembed(h)
        own = logits.gather(1, token[:, None])
        top, index = logits.scatter(1, token[:, None], -torch.inf).topk(min(rivals, logits.shape[1] - 1), dim=1)
        found.append((own - top, index))
    leads, indices = zip(*found, strict=True)
    return torch.cat(leads), torch.cat(indices)

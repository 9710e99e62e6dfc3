"""How likely a model is to say an answer, here and now: the score that tells an edit when to act.

Letters: P positions of a row, n tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 4  # tokens of an answer that is cut off by the end of the row, which are enough to know it by


def answer_scores(log_p: Tensor, at: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    r"""Score an answer at each place where it may begin, in nats a token.

        S_j = mean over the masked i of  log p(o_i at position j + i)

    Tokens that stand there already count as given: they add nothing if they are the answer's, and rule the place out
    if they are not. Where the row ends before the answer does, its beginning counts, if that takes all that is masked
    and at least four places: a canvas may be too short for what is said on it.

    Args:
        log_p: log-probabilities of the model at the masked positions ``at``, ``(A, V)`` float32.
        at: which positions these are, int64 ``(A,)``, ascending.
        ids: the row, with any token that no answer holds (the mask) at positions that are not in ``at`` and not
            known, int64 ``(P,)``.
        answer: o, int64 ``(n,)``, n >= 1.

    Returns:
        ``(P,)`` float32: the score of the answer beginning at each position; -inf where it cannot be: it does not fit,
        another token stands in its way, or all of it stands there already.

    Source: ours.

    Example:
        >>> log_p = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> answer_scores(log_p, torch.tensor([1, 2]), torch.tensor([0, 9, 9]), torch.tensor([0, 1])).round(decimals=2)
        tensor([-0.6900, -0.4900,    -inf])
    """
    n, positions, device = len(answer), len(ids), log_p.device
    if not len(at):
        return torch.full((positions,), -torch.inf, device=device)
    # Beyond the row, where a cut off answer would go on, nothing speaks for or against it.
    table = torch.zeros(positions + n - 1, n, device=device)
    table[:positions] = torch.where(ids[:, None] == answer.to(ids.device), 0.0, -torch.inf).to(device)
    table[at] = log_p[:, answer]
    masked = torch.zeros(positions + n - 1, device=device)
    masked[at] = 1.0
    places = torch.arange(positions, device=device)[:, None] + torch.arange(n, device=device)
    total = table[places, torch.arange(n, device=device)].sum(1)
    open_ = masked.unfold(0, n, 1).sum(1)
    starts = torch.arange(positions, device=device)
    fits = (starts <= positions - n) | ((starts <= at[0]) & (starts <= positions - PART) & (open_ >= PART))
    return torch.where(fits & (open_ > 0), total / open_.clamp_min(1.0), -torch.inf)


def resumable(ids: Tensor, masked: Tensor, answer: Tensor) -> list[int]:
    """Return where an answer may have been begun: part of it stands there, the rest and all else to come is masked.

    Args:
        ids: a row, int64 ``(P,)``.
        masked: its masked positions, boolean ``(P,)``.
        answer: int64 ``(n,)``.

    Example:
        >>> ids = torch.tensor([7, 1, 0, 0])
        >>> resumable(ids, ids == 0, torch.tensor([1, 2]))
        [1]
    """
    if not masked.any():
        return []
    n, first = len(answer), int(masked.nonzero()[0])
    found = []
    for start in range(max(0, first - n + 1), first + 1):
        own, hidden = ids[start : start + n], masked[start : start + n]
        fits = (own == answer[: len(own)]) | hidden
        if fits.all() and hidden.any() and not hidden.all():
            found.append(start)
    return found

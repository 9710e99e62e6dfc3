"""What a masked diffusion model says of single answer tokens, in states that hide chosen answer positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..backbones import Backbone
from ..diffusion import Encoded, by_length

States = Literal["l2r", "onestep", "pll", "folds"]
STATES_A_BATCH = 64
FOLDS = 8


@dataclass(frozen=True)
class TokenScores:
    """One answer, token by token.

    Attributes:
        log_prob: of each answer token, nats.
        hit: 1 where it is the model's first choice, else 0.
        choice: the model's first choice, a token id.
        tail: only for ``l2r``: 1 at k where every token from k on is the first choice with all of them hidden.
        mean: of the log-probability under the predictive distribution at each token, nats; empty unless asked for.
        std: its standard deviation, nats.
    """

    log_prob: list[float]
    hit: list[int]
    choice: list[int]
    tail: list[int]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Reading:
    """What the model said in each of some states of one answer of L tokens: tensors ``(K, L)``, only where hidden."""

    log_prob: Tensor
    hit: Tensor
    choice: Tensor
    mean: Tensor
    std: Tensor


def hidden_in(states: States, length: int) -> Tensor:
    """Return which answer positions each state hides, boolean ``(K, L)``.

    - ``l2r``: state k hides k and all after it; token k is read there.
    - ``onestep``: one state, all hidden.
    - ``pll``: state k hides k alone. It sees the rest of a name, so that it is optimistic.
    - ``folds``: :data:`FOLDS` states that hide a random eighth each, so that a long text is read in eight forwards.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> hidden_in("l2r", 2).tolist()
        [[True, True], [False, True]]
    """
    if states not in get_args(States):
        raise ValueError(f"hidden_in: expected states in {get_args(States)}, got {states!r}.")
    if states == "onestep":
        return torch.ones(1, length, dtype=torch.bool)
    if states == "folds":
        order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
        return torch.arange(min(FOLDS, length))[:, None] == order % FOLDS
    return torch.ones(length, length, dtype=torch.bool).triu() if states == "l2r" else torch.eye(length).bool()


@torch.no_grad()
def read_states(
    backbone: Backbone,
    sequences: Sequence[Encoded],
    hidden: Sequence[Tensor],
    *,
    moments: bool = False,
    batch_size: int = STATES_A_BATCH,
) -> list[Reading]:
    """Run a model on states of answers and read what it says at the hidden positions.

    Args:
        backbone: the model, with whatever is attached to it.
        sequences: prompts with their answers.
        hidden: for each, which answer positions its states hide, boolean ``(K, L)``.
        moments: also take mean and deviation of the log-probability under the predictive distribution.
        batch_size: states of one length that are run together.

    Returns:
        One reading a sequence; entries where nothing was hidden are 0.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    found = [Reading(*(torch.zeros(h.shape, dtype=torch.float64) for _ in range(5))) for h in hidden]
    states = [(i, k) for i, h in enumerate(hidden) for k in range(len(h))]
    for batch in by_length([len(sequences[i].ids) for i, _ in states], batch_size):
        rows = [states[j] for j in batch]
        truth = torch.stack([sequences[i].ids for i, _ in rows])
        canvas = torch.stack([sequences[i].canvas for i, _ in rows])
        masked = torch.zeros_like(canvas)
        for row, (i, k) in enumerate(rows):
            masked[row, sequences[i].canvas] = hidden[i][k]
        ids = torch.where(masked, backbone.mask_id, truth).to(backbone.device)
        logits = backbone.logits(ids, canvas.to(backbone.device))[masked.to(backbone.device)]
        log_p = logits.log_softmax(-1)
        wanted = truth[masked].to(backbone.device)
        own = log_p.gather(1, wanted[:, None])[:, 0]
        if not torch.isfinite(own).all():
            raise FloatingPointError(
                "read_states: the model's logits are not finite; check the weights, the dtype and any memory attached."
            )
        moment: list[Tensor] = []
        if moments:
            p, finite = log_p.exp(), log_p.masked_fill(log_p.isinf(), 0.0)
            mean = (p * finite).sum(1)
            moment = [mean, (p * (finite - mean[:, None]).square()).sum(1).sqrt()]
        log_p[:, backbone.mask_id] = -torch.inf  # a mask is never a prediction, as in the sampler
        choice = log_p.argmax(1)
        values = torch.stack([x.double() for x in (own, choice == wanted, choice, *moment)], 1).cpu()
        start = 0
        for i, k in rows:
            where = hidden[i][k]
            part = values[start : start + int(where.sum())]
            start += len(part)
            for target, column in zip(vars(found[i]).values(), part.T, strict=False):
                target[k, where] = column
    return found


def token_scores(
    backbone: Backbone, sequences: Sequence[Encoded], *, states: States = "l2r", moments: bool = False
) -> list[TokenScores]:
    """Return each answer's tokens as read in states of one kind; see :func:`hidden_in`.

    Args:
        backbone: the model, with whatever is attached to it.
        sequences: prompts with their answers.
        states: which states.
        moments: also take mean and deviation of the log-probability under the predictive distribution.

    Raises:
        ValueError: an unknown kind of states.
        FloatingPointError: the model's logits are not finite.

    Example:
        >>> import timerome as tr
        >>> from timerome.diffusion import encode
        >>> backbone = tr.load("testbed")
        >>> fact = tr.Fact(id="ng", prompt="The capital city of Nigeria is", subject="Nigeria", object="Abuja")
        >>> all(token_scores(backbone, [encode(backbone, fact)])[0].hit)
        True
    """
    hidden = [hidden_in(states, int(s.canvas.sum())) for s in sequences]
    results = []
    for reading, where in zip(read_states(backbone, sequences, hidden, moments=moments), hidden, strict=True):
        # Each token is read once: in the state of its own, or in the only one that hides it. What is not read is 0.
        columns = [x.diagonal() if states == "l2r" else x.sum(0) for x in vars(reading).values()]
        log_prob, hit, choice, mean, std = (column.tolist() for column in columns)
        tail = (reading.hit.bool() | ~where).all(1).int().tolist() if states == "l2r" else []
        results.append(
            TokenScores(
                log_prob,
                [int(h) for h in hit],
                [int(c) for c in choice],
                tail,
                mean if moments else [],
                std if moments else [],
            )
        )
    return results

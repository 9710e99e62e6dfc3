"""Likelihood of an answer under a masked diffusion model: six estimators, each with its name on the result.

Notation (metrics.md of the method's notes; LLaDA's evaluation code): answer positions 1..L, S the masked ones,
c_i(S) = -log p(y_i | prompt, answer outside S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from ..backbones import Backbone
from .states import Encoded, by_length

Estimator = Literal["elbo_sum", "recon_mean", "onestep", "l2r", "pll", "traj"]
DRAWN = ("elbo_sum", "recon_mean")  # averages over mask draws; the others are deterministic


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods of some answers.

    Attributes:
        estimator: which definition.
        log_prob: summed over answer tokens, nats, one an answer, ``(n,)`` float64.
        standard_error: of ``log_prob`` over mask draws, nats; zero for the deterministic estimators.
        tokens: answer tokens, ``(n,)``.
        samples: mask draws an answer (1 for deterministic estimators).
        seed: of the draws.
    """

    estimator: Estimator
    log_prob: Tensor
    standard_error: Tensor
    tokens: Tensor
    samples: int
    seed: int

    @property
    def nll_per_token(self) -> Tensor:
        """Mean negative log-likelihood a token, nats, ``(n,)``."""
        return -self.log_prob / self.tokens


def mask_draws(length: int, estimator: Estimator, samples: int, seed: int, *, antithetic: bool = False) -> Tensor:
    """Return which of ``length`` answer positions each state masks, boolean ``(K, length)``.

    With ``antithetic``, every second state masks the positions that the one before it would have masked last, so that
    pairs cover the answer more evenly; how many each masks is drawn as without.

    Depends on nothing but its arguments, so two models, or a model with and without an edit, are compared on common
    random numbers.
    """
    if estimator == "onestep":
        return torch.ones(1, length, dtype=torch.bool)
    if estimator == "l2r":
        return torch.ones(length, length, dtype=torch.bool).triu()
    if estimator == "pll":
        return torch.eye(length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
    k = 1 if length == 1 else samples
    if estimator == "elbo_sum":
        # n uniform on 1..L, stratified: an evenly spaced ladder with one random offset (LLaDA's get_log_likelihood).
        offset = torch.rand(1, generator=generator)
        counts = ((torch.arange(k) / k + offset) % 1.0 * length).long() + 1
    else:
        counts = torch.randint(1, length + 1, (k,), generator=generator)
    rank = torch.rand(k, length, generator=generator).argsort(1).argsort(1)
    if antithetic:
        rank[1::2] = length - 1 - rank[: k - 1 : 2]
    return rank < counts[:, None]


@torch.no_grad()
def log_likelihood(
    backbone: Backbone,
    sequences: Sequence[Encoded],
    *,
    estimator: Estimator = "elbo_sum",
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 64,
    antithetic: bool = False,
) -> Likelihood:
    """Estimate the log-likelihood of each sequence's answer given its prompt.

    - ``elbo_sum``: -(1/K) Σ_k (L/n_k) Σ_{i∈S_k} c_i(S_k), n_k stratified over 1..L (LLaDA's official estimate).
    - ``recon_mean``: the same with n_k drawn independently; what is averaged is (1/n_k) Σ c_i, so ``nll_per_token`` is
      the published quantity.
    - ``onestep``: c_i with the whole answer masked; one forward.
    - ``l2r``: c_i with i and everything to its right masked; L forwards, deterministic.
    - ``pll``: c_i with i alone masked; L forwards, deterministic. Optimistic: it sees the rest of a name.
    - ``traj``: the model chooses the order, one token a step, the surest first; the answer's token is put there and
      scored. L forwards, deterministic.

    States that several answers of one fact share, such as the fully masked one, are run once.

    Args:
        backbone: the model, with whatever is attached to it.
        sequences: what :func:`timerome.diffusion.encode` returns.
        estimator: the definition to use.
        samples: K, mask draws an answer; ignored by the deterministic estimators.
        seed: of the draws; the same seed gives the same masks for answers of the same length.
        batch_size: states of one length that are run together.
        antithetic: draw masks in complementary pairs, see :func:`mask_draws`. Standard errors, which take draws to be
            independent, are then rather too large.

    Returns:
        A :class:`Likelihood`, one entry a sequence, in order.

    Raises:
        ValueError: an unknown estimator, no sample, or a sequence without an answer.
        FloatingPointError: the model's logits are not finite.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"log_likelihood: expected estimator in {get_args(Estimator)}, got {estimator!r}.")
    if samples < 1:
        raise ValueError(f"log_likelihood: expected samples >= 1, got {samples}.")
    answers = [int(s.canvas.sum()) for s in sequences]
    if any(n == 0 for n in answers):
        raise ValueError(f"log_likelihood: sequence {answers.index(0)} has no answer position on its canvas.")
    if estimator == "traj":
        return _trajectories(backbone, sequences, answers, seed, batch_size)
    states: list[tuple[int, Tensor]] = []
    for i, sequence in enumerate(sequences):
        for draw in mask_draws(answers[i], estimator, samples, seed, antithetic=antithetic):
            masked = torch.zeros_like(sequence.canvas)
            masked[sequence.canvas] = draw
            states.append((i, masked))
    per_state = torch.zeros(len(states), dtype=torch.float64)
    for batch in by_length([len(sequences[i].ids) for i, _ in states], batch_size):
        chosen = [sequences[states[j][0]] for j in batch]
        truth = torch.stack([s.ids for s in chosen]).to(backbone.device)
        canvas = torch.stack([s.canvas for s in chosen]).to(backbone.device)
        masked = torch.stack([states[j][1] for j in batch]).to(backbone.device)
        ids, rows = torch.where(masked, backbone.mask_id, truth), [states[j][0] for j in batch]
        logits = _logits(backbone, ids, canvas, rows, [s.fact_id for s in chosen])
        cost = torch.nn.functional.cross_entropy(rearrange(logits, "b l v -> b v l"), truth, reduction="none")
        if estimator in ("l2r", "pll"):
            first = masked & (masked.cumsum(1) == 1)
            total = (cost * first).sum(1)
        else:
            total = (cost * masked).sum(1) * canvas.sum(1) / masked.sum(1)
        _check_finite(total, [chosen[k].fact_id or str(batch[k]) for k in range(len(batch))])
        per_state[torch.tensor(batch)] = -total.double().cpu()
    owner = torch.tensor([i for i, _ in states])
    log_prob, error = [], []
    for i in range(len(sequences)):
        mine = per_state[owner == i]
        if estimator in ("l2r", "pll"):
            log_prob.append(float(mine.sum()))
            error.append(0.0)
        else:
            log_prob.append(float(mine.mean()))
            error.append(float(mine.std()) / math.sqrt(len(mine)) if len(mine) > 1 else 0.0)
    return Likelihood(
        estimator,
        torch.tensor(log_prob, dtype=torch.float64),
        torch.tensor(error, dtype=torch.float64),
        torch.tensor(answers),
        samples if estimator in DRAWN else 1,
        seed,
    )


def _trajectories(
    backbone: Backbone, sequences: Sequence[Encoded], answers: Sequence[int], seed: int, batch_size: int
) -> Likelihood:
    """Score each answer in the order in which the model itself would unmask it."""
    total = torch.zeros(len(sequences), dtype=torch.float64)
    sizes = [len(s.ids) * 100_003 + n for s, n in zip(sequences, answers, strict=True)]
    for batch in by_length(sizes, batch_size):
        chosen = [sequences[i] for i in batch]
        truth = torch.stack([s.ids for s in chosen]).to(backbone.device)
        canvas = torch.stack([s.canvas for s in chosen]).to(backbone.device)
        masked, spent = canvas.clone(), torch.zeros(len(batch), dtype=torch.float64)
        for _ in range(answers[batch[0]]):
            with backbone.on_rows(batch):
                logits = backbone.logits(torch.where(masked, backbone.mask_id, truth), canvas)
            log_p = logits.log_softmax(-1)
            sure = log_p.index_fill(-1, torch.tensor(backbone.mask_id, device=log_p.device), -torch.inf).amax(-1)
            place = sure.masked_fill(~masked, -torch.inf).argmax(1, keepdim=True)  # a mask is never a prediction
            own = truth.gather(1, place)
            spent += log_p.gather(1, place[..., None].expand(-1, -1, log_p.shape[-1]))[:, 0].gather(1, own)[:, 0].cpu()
            masked = masked.scatter(1, place, False)
        _check_finite(spent, [s.fact_id or str(i) for i, s in zip(batch, chosen, strict=True)])
        total[torch.tensor(batch)] = spent
    return Likelihood("traj", total, torch.zeros_like(total), torch.tensor(answers), 1, seed)


def _logits(backbone: Backbone, ids: Tensor, canvas: Tensor, owner: Sequence[int], facts: Sequence[str]) -> Tensor:
    """Logits of states, which belong to the sequences ``owner`` and to facts; equal ones of one fact are run once."""
    number = {name: i for i, name in enumerate(dict.fromkeys(facts))}
    fact = torch.tensor([[number[name]] for name in facts], device=ids.device)
    _, where = torch.unique(torch.cat([ids, canvas.long(), fact], 1), dim=0, return_inverse=True)
    first = where.new_full((int(where.max()) + 1,), len(ids))
    first = first.scatter_reduce(0, where, torch.arange(len(ids), device=where.device), "amin")
    if len(first) == len(ids):  # each is run in its place
        first = where = torch.arange(len(ids), device=ids.device)
    with backbone.on_rows([owner[i] for i in first.tolist()]):
        return backbone.logits(ids[first], canvas[first])[where]


def _check_finite(total: Tensor, names: Sequence[str]) -> None:
    if not torch.isfinite(total).all():
        bad = [names[k] for k in (~torch.isfinite(total)).nonzero().flatten().tolist()]
        raise FloatingPointError(
            f"log_likelihood: the model's logits are not finite for {', '.join(dict.fromkeys(bad))}; "
            "check the weights, the dtype and any memory attached."
        )

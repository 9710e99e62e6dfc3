"""Training objectives of the unlearning baselines, from their papers, for masked diffusion models.

Notation: c_i = -log p(y_i | what is shown), S the masked answer positions of a row, n its size, L the answer's length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

from .batches import Batch


def row_cost(logits: Tensor, batch: Batch) -> Tensor:
    """(1/n) Σ_{i∈S} c_i, nats a token, ``(B,)``."""
    cost = cross_entropy(logits.flatten(0, 1), batch.truth.flatten(), reduction="none").view_as(batch.truth)
    return (cost * batch.masked).sum(1) / batch.masked.sum(1)


def gradient_ascent(cost: Tensor) -> Tensor:
    """Make the answer unlikely, without bound (Jang et al. 2023, arXiv 2210.01504)."""
    return -cost.mean()


def npo(cost: Tensor, reference: Tensor, length: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

    -(2/β) log σ(-β (log π - log π_ref)) with log π = -L · cost, the ELBO estimate, on the same masks for both models.
    """
    ratio = -length * (cost - reference)
    return -2 / beta * logsigmoid(-beta * ratio).mean()


def simnpo(cost: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    """NPO without a reference model, normalised by length (Fan et al. 2024, arXiv 2410.07163)."""
    return -2 / beta * logsigmoid(beta * cost - gamma).mean()


def null_anchor(logits: Tensor, unasked: Tensor, batch: Batch, tau: float) -> Tensor:
    """Masked diffusion unlearning (arXiv 2605.18253): match τ times the logits of the frozen model that is not asked.

    KL(softmax of the model's logits ‖ softmax of τ · those without a prompt), averaged over the masked positions.
    τ = 1 is the unasked model, τ = 0 the uniform distribution.
    """
    own = logits[batch.masked].log_softmax(-1)
    anchor = (tau * unasked[batch.masked]).log_softmax(-1).detach()
    return kl_div(anchor, own, reduction="batchmean", log_target=True)


def lengths(batch: Batch) -> Tensor:
    """L of each row, ``(B,)``."""
    return batch.canvas.sum(1).to(torch.float32)

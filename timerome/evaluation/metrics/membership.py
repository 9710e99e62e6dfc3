"""Membership inference: was a text in the training data?

Scores are signed so that a higher one is more like a member. Token log-probabilities are those of a masked diffusion
model in named states (see :func:`timerome.evaluation.tokens.hidden_in`); nothing here depends on which.

Source: LOSS: Yeom et al. 2018. zlib: Carlini et al. 2021. Min-k %: Shi et al. 2024, arXiv 2310.16789. Min-k %++: Zhang
et al. 2025, arXiv 2404.02936.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SIGMA_FLOOR = 1e-3  # deviation below which a prediction is all but certain and its z-score means nothing


def loss_score(log_probs: Sequence[float]) -> float:
    """-ℓ: mean log-probability a token.

    Example:
        >>> loss_score([-1.0, -3.0])
        -2.0
    """
    return float(_tokens("loss_score", log_probs).mean())


def zlib_score(log_probs: Sequence[float], text: str) -> float:
    """-ℓ over the text's length in bytes once compressed: improbable although simple.

    Example:
        >>> zlib_score([-8.0, -8.0], "") == -8.0 / 8
        True
    """
    return loss_score(log_probs) / len(zlib.compress(text.encode("utf-8")))


def min_k(log_probs: Sequence[float], k: float = 20.0) -> float:
    """Mean of the lowest ``k`` percent of the tokens' log-probabilities, of at least one.

    Raises:
        ValueError: there is no token, or ``k`` is outside (0, 100].

    Example:
        >>> min_k([-1.0, -5.0, -3.0, -2.0, -4.0], 40)
        -4.5
    """
    return _lowest("min_k", _tokens("min_k", log_probs), k)


def min_k_plus_plus(log_probs: Sequence[float], mean: Sequence[float], std: Sequence[float], k: float = 20.0) -> float:
    """Mean of the lowest ``k`` percent of (log p - μ) / σ, μ and σ of log p under each predictive distribution.

    Args:
        log_probs: of the tokens.
        mean: μ at each token.
        std: σ at each token; at least :data:`SIGMA_FLOOR` is taken.
        k: percent of the tokens.

    Raises:
        ValueError: lengths differ, there is no token, or ``k`` is outside (0, 100].

    Example:
        >>> min_k_plus_plus([-3.0, -1.0], [-1.0, -1.0], [0.5, 0.5], 50)
        -4.0
    """
    values = _tokens("min_k_plus_plus", log_probs)
    if not len(values) == len(mean) == len(std):
        raise ValueError(
            f"min_k_plus_plus: expected one mean and one deviation a token, got {len(mean)} and {len(std)} for "
            f"{len(values)} tokens."
        )
    return _lowest("min_k_plus_plus", (values - np.asarray(mean)) / np.maximum(np.asarray(std), SIGMA_FLOOR), k)


def area(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Chance that a member scores higher than a non-member, ties counting half: the area under the ROC curve (AUC).

    Args:
        members: scores of texts in the training data (the forget set), ``(*batch, n)``.
        others: scores of texts that are not (a holdout set), ``(*batch, m)``.

    Returns:
        ``(*batch)``.

    Example:
        >>> area(np.array([[3.0, 1.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [2.0, 2.0]])).tolist()
        [0.75, 0.0]
    """
    from scipy.stats import rankdata

    n, m = members.shape[-1], others.shape[-1]
    ranks = rankdata(np.concatenate([members, others], -1), axis=-1)[..., :n]
    return np.asarray((ranks.sum(-1) - n * (n + 1) / 2) / (n * m))


def _tokens(function: str, log_probs: Sequence[float]) -> npt.NDArray[np.float64]:
    values = np.asarray(log_probs, dtype=np.float64)
    if not values.size:
        raise ValueError(f"{function}: expected at least one token, got none; leave that record out.")
    return values


def _lowest(function: str, values: npt.NDArray[np.float64], k: float) -> float:
    if not 0 < k <= 100:
        raise ValueError(f"{function}: expected k, in percent, in (0, 100], got {k}.")
    return float(np.sort(values)[: max(1, int(len(values) * k / 100))].mean())

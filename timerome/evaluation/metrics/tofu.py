"""TOFU's metrics, from mean negative log-likelihoods a token.

Notation: ℓ(y) is the mean NLL per answer token in nats, p̄(y) = exp(-ℓ(y)), a the answer, a' its paraphrase, ã_j the
perturbed answers. R is the truth ratio. A model that knows the truth has R below 1.

Source: Maini et al., TOFU: A Task of Fictitious Unlearning for LLMs, 2024, arXiv 2401.06121.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UTILITY_TERMS = tuple(
    f"{group}.{metric}" for group in ("retain", "real_authors", "world_facts")
    for metric in ("probability", "rouge_recall", "truth_score")
)  # fmt: skip


def probability(nll: float) -> float:
    """p̄ = exp(-ℓ), the probability of an answer normalised by its length.

    Example:
        >>> probability(0.0)
        1.0
    """
    return math.exp(-nll)


def normalised_probability(nll: float, perturbed: Sequence[float]) -> float:
    """p̄(a) / (p̄(a) + Σ_j p̄(ã_j)): TOFU's probability of real authors and world facts.

    Computed from differences of ℓ, so that it does not underflow where all of the answers are improbable.

    Raises:
        ValueError: there is no perturbed answer.

    Example:
        >>> normalised_probability(50.0, [50.0, 50.0, 50.0])
        0.25
    """
    _check("normalised_probability", perturbed)
    smallest = min([nll, *perturbed])
    own = math.exp(smallest - nll)
    return own / (own + sum(math.exp(smallest - x) for x in perturbed))


def log_truth_ratio(reference: float, perturbed: Sequence[float]) -> float:
    """Natural logarithm of the truth ratio: ℓ(a') - mean_j ℓ(ã_j).

    R = exp(-mean_j ℓ(ã_j)) / p̄(a'): the **geometric** mean over perturbed answers, as in the paper. All perturbed
    answers of the record count.

    Args:
        reference: ℓ of the paraphrased answer; of the answer itself for real authors and world facts.
        perturbed: ℓ of the perturbed answers.

    Raises:
        ValueError: there is no perturbed answer.

    Example:
        >>> log_truth_ratio(1.0, [2.0, 4.0])
        -2.0
    """
    _check("log_truth_ratio", perturbed)
    return reference - math.fsum(perturbed) / len(perturbed)


def mdu_log_truth_ratio(nll: float, perturbed: Sequence[float]) -> float:
    """Truth ratio as masked diffusion unlearning's code has it: the *original* answer, the *first three* perturbed.

    Its exponential is averaged raw, with neither :func:`truth_score` nor :func:`forget_truth_score`.

    Example:
        >>> mdu_log_truth_ratio(1.0, [2.0, 2.0, 2.0, 99.0])
        -1.0
    """
    return log_truth_ratio(nll, list(perturbed)[:3])


def truth_score(log_ratio: float) -> float:
    """max(0, 1 - R): the truth ratio's score where knowledge shall stay.

    Example:
        >>> truth_score(math.log(0.25)), truth_score(1.0)
        (0.75, 0.0)
    """
    return max(0.0, 1.0 - math.exp(min(log_ratio, 1.0)))


def forget_truth_score(log_ratio: float) -> float:
    """min(R, 1/R): the truth ratio's score on the forget set; 1 where truth and untruth are equally probable.

    Example:
        >>> forget_truth_score(math.log(4.0)), forget_truth_score(math.log(0.25))
        (0.25, 0.25)
    """
    return math.exp(-abs(log_ratio))


def truth_ratio(log_ratio: float) -> float:
    """R itself, at most the largest float.

    Example:
        >>> truth_ratio(0.0)
        1.0
    """
    return math.exp(min(log_ratio, 709.0))


def prob_mean(log_ratio: float) -> float:
    """P_true / (P_true + P_false) = 1 / (1 + R): OpenUnlearning's ``prob_mean`` form of the truth ratio.

    Example:
        >>> prob_mean(0.0)
        0.5
    """
    return 1.0 / (1.0 + truth_ratio(log_ratio))


class ForgetQuality(NamedTuple):
    """Outcome of the Kolmogorov-Smirnov test.

    Attributes:
        log10_p: of the p-value; 0 where the samples are equal.
        p_value: chance of samples at least as far apart from one distribution.
        statistic: largest distance of the two empirical distribution functions.
    """

    log10_p: float
    p_value: float
    statistic: float


def forget_quality(log_ratios: Sequence[float], reference: Sequence[float]) -> ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test between truth ratios of the unlearned and of a retain-only model.

    The test sees ranks only, so that R, 1/R and log R give one p-value.

    Args:
        log_ratios: of the unlearned model, one a forget record.
        reference: of the model that was never taught them, the same records under the same protocol.

    Raises:
        ValueError: a sample is empty or not finite.

    Example:
        >>> forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]).p_value
        1.0
    """
    from scipy.stats import ks_2samp

    for name, sample in (("log_ratios", log_ratios), ("reference", reference)):
        if not len(sample) or not np.isfinite(np.asarray(sample, dtype=np.float64)).all():
            raise ValueError(f"forget_quality: expected {name} to be finite and at least one, got {list(sample)[:5]}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where its exact p-value fails SciPy takes the asymptotic one
        found = ks_2samp(np.asarray(log_ratios), np.asarray(reference))
    p = max(float(found.pvalue), 5e-324)
    return ForgetQuality(math.log10(p), p, float(found.statistic))


def _check(function: str, perturbed: Sequence[float]) -> None:
    if not len(perturbed):
        raise ValueError(f"{function}: expected at least one perturbed answer, got none; leave that record out.")

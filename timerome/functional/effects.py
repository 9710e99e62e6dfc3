"""Effects of restoring activations: scores, normalisation, static sites, the temporal gain and its interval.

Letters: F facts, N sites, S denoising steps of the loop, s traced steps, R roles, n object tokens, ``*`` any batch.
NaN means undefined (there is no later step, or nothing to restore) and is left out of every mean.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .bootstrap import Interval as Interval
from .bootstrap import bootstrap_ci

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Score = Literal["log_prob", "prob", "rank"]
SCORES: tuple[Score, ...] = get_args(Score)
TIED = 1e-6  # effects that differ by no more count as equal: it is what rounding does


def nanmean(values: Floats, axis: int | tuple[int, ...] | None = None) -> Floats:
    """Mean of what is not NaN; NaN, without a warning, where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=axis), dtype=np.float64)


def last_masked(log_prob: Floats, masked: Bools) -> Floats:
    """Carry each position's log-probability forward from the last step in which it was masked.

    A masked position is predicted at every step. Once it is committed, the model's logits there copy the input and say
    nothing of what it knew, so the value of the step that committed it stays.

    Args:
        log_prob: of the true token at each position and step, nats, ``(*, S, n)``.
        masked: whether the position was masked in the state the step started from, ``(*, S, n)``; all True at step 0.

    Returns:
        ``(*, S, n)`` nats.

    Raises:
        ValueError: shapes differ, or a position is not masked at step 0.

    Example:
        >>> log_prob = np.array([[-3.0, -2.0], [-9.0, -1.0]])
        >>> last_masked(log_prob, np.array([[True, True], [False, True]]))
        array([[-3., -2.],
               [-3., -1.]])
    """
    if log_prob.shape != masked.shape:
        raise ValueError(
            f"last_masked: expected log_prob and masked of one shape, got {log_prob.shape} and {masked.shape}."
        )
    if log_prob.shape[-2] and not masked[..., 0, :].all():
        raise ValueError("last_masked: expected every position to be masked at step 0.")
    carried = np.array(log_prob, dtype=np.float64)
    for step in range(1, carried.shape[-2]):
        carried[..., step, :] = np.where(masked[..., step, :], log_prob[..., step, :], carried[..., step - 1, :])
    return carried


def object_score(log_prob: Floats, log_rank: Floats, score: Score, where: Bools | None = None) -> Floats:
    """Score of an object from its tokens; larger is better.

    Args:
        log_prob: of each true token, nats, ``(*, n)``.
        log_rank: logarithm of each one's rank in the vocabulary, 0 for the first, ``(*, n)``.
        score: ``log_prob``: mean over tokens, nats a token. ``prob``: its exponential, the geometric mean of the
            tokens' probabilities; with one token, its probability. ``rank``: minus the mean logarithm of the rank, so
            that 0 is first and halving the rank is worth the same anywhere; exp(-rank) is the geometric mean rank.
        where: tokens that count, broadcast against the others; None is all. Where none does the score is NaN.

    Returns:
        ``(*)``.

    Raises:
        ValueError: an unknown score.

    Example:
        >>> log_prob, log_rank = np.log([[0.5, 0.125]]), np.log([[1.0, 4.0]])
        >>> object_score(log_prob, log_rank, "prob"), object_score(log_prob, log_rank, "rank")
        (array([0.25]), array([-0.69314718]))
    """
    if score not in SCORES:
        raise ValueError(f"object_score: expected score in {SCORES}, got {score!r}.")
    values = -np.asarray(log_rank) if score == "rank" else np.asarray(log_prob)
    mean = values.mean(-1) if where is None else masked_mean(values, where)
    return np.asarray(np.exp(mean) if score == "prob" else mean, dtype=np.float64)


def later_mean(scores: Floats, step: int) -> Floats:
    """Mean score over the steps after ``step``; NaN where there is none.

    Args:
        scores: ``(*, S)``.
        step: from 0.

    Returns:
        ``(*)``.

    Example:
        >>> later_mean(np.array([0.0, 1.0, 3.0]), 0)
        array(2.)
        >>> later_mean(np.array([0.0, 1.0, 3.0]), 2)
        array(nan)
    """
    return nanmean(np.asarray(scores[..., step + 1 :], dtype=np.float64), axis=-1)


def masked_mean(values: Floats, where: Bools) -> Floats:
    """Mean over the last axis of the values ``(*, n)`` at which ``where`` ``(*, n)`` is True; NaN where none is.

    Example:
        >>> masked_mean(np.array([1.0, 3.0, 9.0]), np.array([True, True, False]))
        array(2.)
    """
    return nanmean(np.where(where, values, np.nan), axis=-1)


def share_of(indirect: Floats, total: Floats, minimum: float) -> Floats:
    """Indirect effects (restored - corrupted) divided by total ones (clean - corrupted); shapes broadcast.

    NaN where the total is below ``minimum``, or NaN: a ratio to almost nothing says nothing. Not clipped to [0, 1]:
    clipping would turn the noise of sites that do nothing into positive effects, and a control could no longer be
    compared with.

    Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1, there on probabilities; here on log-probabilities.

    Example:
        >>> share_of(np.array([0.5, 1.0]), np.array(2.0), minimum=0.1)
        array([0.25, 0.5 ])
    """
    total = np.asarray(total, dtype=np.float64)
    return np.asarray(indirect / np.where(total >= minimum, total, np.nan), dtype=np.float64)


def static_effect(effects: Floats) -> Floats:
    """Effect of a site whatever the step: the mean over traced steps.

    Args:
        effects: ``(F, N, s, R)``.

    Returns:
        ``(F, N, R)``.
    """
    return nanmean(effects, axis=2)


def first_largest(values: Floats, tolerance: float = TIED) -> tuple[int, ...]:
    """Return the index of the largest value; of those within ``tolerance`` of it, the first in C order.

    Raises:
        ValueError: every value is NaN.

    Example:
        >>> first_largest(np.array([[0.2, 1.0], [1.0 + 1e-9, np.nan]]))
        (0, 1)
    """
    if values.size == 0 or np.isnan(values).all():
        raise ValueError("first_largest: expected at least one value that is not NaN.")
    near = np.flatnonzero(values.ravel() >= np.nanmax(values) - tolerance)
    return tuple(int(i) for i in np.unravel_index(near[0], values.shape))


def average_over_facts(effects: Floats, share: float = 0.5) -> Floats:
    """Mean over facts; NaN in cells that too few facts define, so that one only a long answer reaches cannot win.

    Args:
        effects: ``(F, ...)``.
        share: of the facts that define the best-covered cell; a cell needs at least as many.

    Returns:
        ``(...)``.

    Example:
        >>> average_over_facts(np.array([[1.0, 9.0], [2.0, np.nan], [3.0, np.nan]]))
        array([ 2., nan])
    """
    count = (~np.isnan(effects)).sum(0)
    enough = count >= max(1.0, share * count.max(initial=0))
    return np.where(enough, nanmean(effects, axis=0), np.nan)


def bootstrap_interval(values: Floats, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean over facts.

    Args:
        values: one a fact, ``(F,)``; NaN are left out.
        level: of the interval, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: ``values`` is not one-dimensional, or ``level`` is outside (0, 1).

    Source: Efron 1979; percentile interval.

    Example:
        >>> interval = bootstrap_interval(np.array([0.9, 1.0, 1.1, 1.0]))
        >>> interval.low < interval.mean < interval.high, interval.contains_zero
        (True, False)
    """
    if values.ndim != 1:
        raise ValueError(f"bootstrap_interval: expected values of shape (F,), got {values.shape}.")
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    return bootstrap_ci(values, level=level, resamples=resamples, seed=seed)


def temporal_gain(effects: Floats, static: Floats) -> Floats:
    """What choosing the step adds for each fact: effect of the best cell - effect of the best static site.

    Both are chosen on the *other half* of the facts (every second one). Chosen on the same facts, the best of many
    cells is never below the best average, and the gain would be positive for pure noise. Leaving out one fact at a time
    removes that bias from the mean but not from its interval, as the choice is then much the same for all: on pure
    noise (18 sites, 4 steps, 2 roles) the 95 % interval lay above 0 in 18 % of trials with 8 facts and in 39 % with 40;
    for halves it was 8 % and 5 %. One fact has no other half: both are chosen on it, and the gain is biased upwards.

    Args:
        effects: ``(F, N, s, R)``.
        static: effects without a step, ``(F, N, R)``, e.g. :func:`static_effect`.

    Returns:
        ``(F,)``; NaN for a fact without a value at the chosen cells.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> effects = np.zeros((3, 2, 2, 1))
        >>> effects[:, 1, 0] = 1.0  # one site, at one step
        >>> temporal_gain(effects, static_effect(effects))
        array([0.5, 0.5, 0.5])
    """
    if effects.ndim != 4 or static.shape != (*effects.shape[:2], effects.shape[3]):
        raise ValueError(
            f"temporal_gain: expected effects (F, N, s, R) and static (F, N, R), got {effects.shape} and "
            f"{static.shape}."
        )
    gains = np.full(len(effects), np.nan)
    half = np.arange(len(effects)) % 2
    for own in (half == 0, half == 1):
        other = ~own if len(effects) > 1 else own
        cells, sites = average_over_facts(effects[other]), average_over_facts(static[other])
        if not (np.isnan(cells).all() or np.isnan(sites).all()):
            cell, site = (slice(None), *first_largest(cells)), (slice(None), *first_largest(sites))
            gains[own] = effects[own][cell] - static[own][site]
    return gains

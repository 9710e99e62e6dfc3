"""What a map of effects allows to be said: intervals over facts and draws, tests that know how many cells there are.

Letters: F facts, D draws, C cells. NaN means undefined and is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .bootstrap import Interval, check_resamples
from .effects import Floats, average_over_facts, first_largest, nanmean

EXACT_FACTS = 12  # up to so many facts every pattern of signs is tried


def two_stage_interval(
    values: Floats, totals: Floats | None = None, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a mean over facts and noise draws: facts are resampled, then draws within each.

    The spread of a fact's draws is in the spread of facts' means already, so with few draws the interval is somewhat
    wide rather than narrow.

    Args:
        values: ``(F, D)``; facts without a value are left out.
        totals: what each draw's value is a share of, as a multiple of its mean over draws, ``(F, D)``: resampled draws
            are then divided by their own mean total. None takes the denominator as given.
        level: of the interval, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: ``values`` is not two-dimensional, ``level`` is outside (0, 1), or ``resamples`` < 1.

    Source: Davison and Hinkley 1997, section 3.8, hierarchical data.

    Example:
        >>> interval = two_stage_interval(np.array([[0.9, 1.1], [1.0, 1.2], [0.8, 1.0]]))
        >>> round(interval.mean, 6), interval.low < 1 < interval.high, interval.n
        (1.0, True, 3)
    """
    if values.ndim != 2:
        raise ValueError(f"two_stage_interval: expected values (F, D), got shape {values.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"two_stage_interval: expected level in (0, 1), got {level}.")
    check_resamples("two_stage_interval", resamples)
    shares = np.ones_like(values) if totals is None else totals
    finite = np.isfinite(values + shares)
    given = [(row[ok], share[ok]) for row, share, ok in zip(values, shares, finite, strict=True) if ok.any()]
    means = [row.mean() for row, _ in given]
    if len(given) < 2:
        return Interval(float(means[0]) if given else np.nan, np.nan, np.nan, len(given))
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(given), np.full(len(given), 1 / len(given)), size=resamples)
    found = np.zeros(resamples)
    for count, (row, total), mean in zip(times.T, given, means, strict=True):
        # Drawing n of n for each of so many copies of the fact is one multinomial.
        drawn = rng.multinomial(count * len(row), np.full(len(row), 1 / len(row)))
        own, whole = drawn @ row, drawn @ total
        # Draws that happened to do no harm are no denominator.
        usable = whole > 0.1 * count * len(row)
        found += count * np.where(usable, own / np.where(usable, whole, 1.0), mean)
    low, high = np.quantile(found / len(given), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(means)), float(low), float(high), len(given))


def max_sign_test(differences: Floats, *, resamples: int = 4096, seed: int = 0) -> Floats:
    """P-values of "this cell's mean difference is positive", each corrected for having looked at all cells.

    Under the null hypothesis a fact's differences to its control are as likely to have the opposite sign, all cells'
    together. So signs are flipped fact by fact, and each cell's statistic, sum / root of the sum of squares, is
    compared with the largest of all cells': the chance that any cell is called positive wrongly is at most the level.
    Up to 12 facts every pattern of signs is tried. The smallest p-value is 1 / 2^F: fewer than five facts can show
    nothing at 5 %.

    Args:
        differences: effect - control, ``(F, C)``.
        resamples: patterns of signs where not all are tried.
        seed: of the patterns.

    Returns:
        ``(C,)``; NaN for a cell no fact defines.

    Raises:
        ValueError: ``differences`` is not two-dimensional, or ``resamples`` < 1.

    Source: Westfall and Young 1993, single-step maxT, here with sign flips.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> noise = rng.normal(0, 1, (12, 50))
        >>> noise[:, 7] += 3
        >>> bool(max_sign_test(noise)[7] < 0.01), int((max_sign_test(noise) < 0.05).sum())
        (True, 1)
    """
    if differences.ndim != 2:
        raise ValueError(f"max_sign_test: expected differences (F, C), got shape {differences.shape}.")
    check_resamples("max_sign_test", resamples)
    if not differences.size:
        return np.full(differences.shape[1], np.nan)
    defined = np.isfinite(differences).any(0)
    x = np.nan_to_num(differences)
    scale = np.sqrt((x**2).sum(0))
    x = x / np.where(scale > 0, scale, 1.0)
    facts = len(x)
    if facts <= EXACT_FACTS:
        signs = 1.0 - 2.0 * ((np.arange(2**facts)[:, None] >> np.arange(facts)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, facts))
        signs[0] = 1.0  # what was observed is one of the patterns
    largest = np.sort((signs @ x).max(1))
    reached = len(largest) - np.searchsorted(largest, x.sum(0) - 1e-9)
    return np.where(defined, reached / len(largest), np.nan)


class Stability(NamedTuple):
    """How far a choice depends on which facts made it. Shares and means over random halves.

    Attributes:
        same_cell: share of halvings in which both halves choose one cell.
        same_site: share in which they choose one site, the first axis of the cells.
        chosen_effect: effect of a half's choice on that half.
        held_out_effect: its effect on the other half, which did not choose it.
        correlation: Spearman's, of the two halves' maps.
    """

    same_cell: float
    same_site: float
    chosen_effect: float
    held_out_effect: float
    correlation: float


def split_half(effects: Floats, *, repeats: int = 100, seed: int = 0) -> Stability:
    """Choose the best cell on random halves of the facts and compare.

    Args:
        effects: ``(F, N, ...)``, at least two facts.
        repeats: random halvings.
        seed: of the halvings.

    Raises:
        ValueError: there are fewer than two facts, or ``repeats`` < 1.

    Example:
        >>> effects = np.zeros((6, 3, 2))
        >>> effects[:, 1, 0] = 1.0
        >>> split_half(effects, repeats=10)[:4]
        (1.0, 1.0, 1.0, 1.0)
    """
    if len(effects) < 2:
        raise ValueError(f"split_half: expected at least two facts, got {len(effects)}.")
    check_resamples("split_half", repeats)
    from scipy.stats import spearmanr

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        order = rng.permutation(len(effects))
        maps = [average_over_facts(effects[half]) for half in np.array_split(order, 2)]
        if any(np.isnan(m).all() for m in maps):
            continue
        one, two = (first_largest(m) for m in maps)
        both = np.isfinite(maps[0]) & np.isfinite(maps[1])
        flat = both.sum() < 2 or any(np.ptp(m[both]) == 0 for m in maps)
        found.append(
            [
                one == two,
                one[0] == two[0],
                nanmean(np.array([maps[0][one], maps[1][two]])),
                nanmean(np.array([maps[1][one], maps[0][two]])),
                np.nan if flat else spearmanr(maps[0][both], maps[1][both]).statistic,
            ]
        )
    if not found:
        return Stability(*[np.nan] * 5)
    return Stability(*(float(x) for x in nanmean(np.array(found, dtype=np.float64), axis=0)))

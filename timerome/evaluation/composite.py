"""What a published definition makes of several metrics: harmonic means, areas under curves; with paired comparison.

Such a number is no mean over records. Its interval and its tests come from drawing, or swapping, the records of all its
terms together: a record that several terms are taken of is drawn or swapped in all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .measurement import Absent, Better, Measurement, Result, UnlikeMeasurementsError
from .metrics.membership import area

Array = npt.NDArray[np.float64]
Statistic = Callable[[Sequence[Array]], Array]

RESAMPLES = 2000
BATCH = 500  # resamples computed at once


def _harmonic_mean(terms: Sequence[Array]) -> Array:
    from scipy.stats import hmean

    return np.asarray(hmean(np.stack([term.mean(-1) for term in terms]), axis=0))


def _auc(terms: Sequence[Array]) -> Array:
    return area(*terms)


def _privleak(terms: Sequence[Array]) -> Array:
    return 100.0 * (0.5 - area(*terms)) / (1.0 - 0.5)


# Of the records' values of each term, ``(…, records)``; the result is ``(…)``.
STATISTICS: dict[str, Statistic] = {
    "harmonic mean": _harmonic_mean,  # of the terms' means; 0 if one of them is
    "AUC": _auc,  # chance that a record of the first term is above one of the second, ties counting half
    "PrivLeak": _privleak,  # against a retain-only model's AUC of ½, which cannot tell them apart
}


def composite(
    metric: str,
    terms: Mapping[str, Result],
    statistic: str,
    *,
    definition: str,
    unit: str = "share",
    better: Better = "higher",
    resamples: int = RESAMPLES,
) -> Result:
    """Combine measurements by a published definition, such as TOFU's model utility.

    Args:
        metric: name of the combination.
        terms: what it is made of, by the name the definition gives it; means over records.
        statistic: one of :data:`STATISTICS`.
        definition: the same in words; it goes into the protocol.
        unit: of the result.
        better: which direction is the wanted one.
        resamples: bootstrap samples.

    Returns:
        The measurement; Absent, with the reasons, if one term is. A term of one record has no interval, so that the
        whole has none.

    Raises:
        UnlikeMeasurementsError: a term is no mean over records.

    Example:
        >>> from timerome.evaluation import Measurement, composite
        >>> x, y = (Measurement.over(k, {"a": v}, protocol="l2r", seed=0) for k, v in (("x", 1.0), ("y", 0.5)))
        >>> round(composite("hm", {"x": x, "y": y}, "harmonic mean", definition="harmonic mean of x and y").value, 3)
        0.667
    """
    if gone := {name: term.reason for name, term in terms.items() if isinstance(term, Absent)}:
        return Absent(metric, f"{definition} needs " + "; ".join(f"{name} ({why})" for name, why in gone.items()))
    parts = [term for term in terms.values() if isinstance(term, Measurement)]
    of, seed = STATISTICS[statistic], parts[0].seed
    names = [_records(part) for part in parts]
    values = [np.array(list(part.per_record.values())) for part in parts]
    spread = (math.nan, math.nan, math.nan)
    if all(len(own) > 1 for own in names):
        drawn = np.concatenate([
            of([own[at] for own, at in zip(values, draw, strict=True)]) for draw in _draws(names, resamples, seed)
        ])  # fmt: skip
        spread = (float(drawn.std(ddof=1)), *np.quantile(drawn, (0.025, 0.975)).tolist())
    how = f"{definition}; terms: " + "; ".join(dict.fromkeys(part.protocol for part in parts))
    return Measurement(
        metric, float(of(values)), unit, how, seed, len({name for own in names for name in own}), *spread, better,
        statistic=statistic, terms=tuple(part.metric for part in parts),
    )  # fmt: skip


class Difference(NamedTuple):
    """How a combination differs between two conditions; see :class:`timerome.evaluation.Paired` for what is in it."""

    difference: float
    low: float
    high: float
    p_value: float
    exact: bool
    effect_size: float
    n: int


def composite_difference(
    statistic: str, before: Sequence[Measurement], after: Sequence[Measurement], *, resamples: int = RESAMPLES
) -> Difference:
    """Compare a combination under two conditions: a bootstrap over records, and a permutation test by record.

    Args:
        statistic: one of :data:`STATISTICS`.
        before: its terms under one condition.
        after: the same under the other, over the same records.
        resamples: bootstrap samples, and permutations where they are too many to count.

    Returns:
        Difference, its 95 % interval, p-value and effect size: the difference over n / √(n - 1) of its bootstrap
        standard errors, n being the number of records, which for a plain mean is Cohen's d_z.

    Raises:
        UnlikeMeasurementsError: a term's records differ between the conditions, or it is no mean over records.
    """
    names, of = [_records(term) for term in before], STATISTICS[statistic]
    for own, term in zip(names, after, strict=True):
        if set(own) != set(term.per_record):
            raise UnlikeMeasurementsError(f"composite_difference: the records of {term.metric} differ.")
    first = [np.array(list(term.per_record.values())) for term in before]
    second = [np.array([term.per_record[k] for k in own]) for term, own in zip(after, names, strict=True)]
    difference, seed = float(of(second) - of(first)), before[0].seed
    low, high, effect = math.nan, math.nan, math.nan
    n = len({name for own in names for name in own})
    if all(len(own) > 1 for own in names):
        drawn = np.concatenate([
            of([y[at] for y, at in zip(second, draw, strict=True)])
            - of([x[at] for x, at in zip(first, draw, strict=True)])
            for draw in _draws(names, resamples, seed)
        ])  # fmt: skip
        low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
        # Of a mean the bootstrap's deviation is that of the n values, not of n - 1, over √n.
        error = float(drawn.std()) * n / math.sqrt(n - 1)
        effect = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    exact = 2**n <= resamples
    swapped = np.concatenate([
        of([np.where(swap, x, y) for x, y, swap in zip(first, second, swaps, strict=True)])
        - of([np.where(swap, y, x) for x, y, swap in zip(first, second, swaps, strict=True)])
        for swaps in _swaps(names, resamples, exact, seed)
    ])  # fmt: skip
    # One assignment, that which was observed, is always among those counted.
    slack, seen = 1e-12 * max(1.0, abs(difference)), 0 if exact else 1
    tails = [int((swapped * sign >= difference * sign - slack).sum()) + seen for sign in (1, -1)]
    p_value = min(1.0, 2 * min(tails) / (len(swapped) + seen))
    return Difference(difference, low, high, p_value, exact, effect, n)


def _records(term: Measurement) -> tuple[str, ...]:
    if not term.per_record:
        raise UnlikeMeasurementsError(f"composite: expected means over records, but {term.metric} is none.")
    return tuple(term.per_record)


def _draws(names: Sequence[tuple[str, ...]], resamples: int, seed: int) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Yield batches of bootstrap samples: which records each term takes, ``(batch, records)``."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, BATCH):
        size = min(BATCH, resamples - start)
        drawn = {own: generator.integers(len(own), size=(size, len(own))) for own in dict.fromkeys(names)}
        yield [drawn[own] for own in names]


def _swaps(
    names: Sequence[tuple[str, ...]], resamples: int, exact: bool, seed: int
) -> Iterator[list[npt.NDArray[np.bool_]]]:
    """Yield batches of assignments: which records of each term change places, ``(batch, records)``."""
    place = {name: i for i, name in enumerate(dict.fromkeys(name for own in names for name in own))}
    columns, generator = [[place[name] for name in own] for own in names], np.random.default_rng(seed)
    total = 2 ** len(place) if exact else resamples
    for start in range(0, total, BATCH):
        size = min(BATCH, total - start)
        if exact:
            swap = (np.arange(start, start + size)[:, None] >> np.arange(len(place)) & 1).astype(bool)
        else:
            swap = generator.random((size, len(place))) < 0.5
        yield [swap[:, own] for own in columns]

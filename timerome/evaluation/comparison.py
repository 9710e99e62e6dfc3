"""Numbers made of several metrics, and two conditions on the same records: the difference, how sure it is, how large.

What a published definition makes of several metrics (a harmonic mean, an area under a curve) is no mean over records.
Its interval and its tests come from drawing, or swapping, the records of all its terms together: a record that several
terms are taken of is drawn or swapped in all of them at once. A plain mean is the case of one term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..functional.bootstrap import check_resamples
from .measurement import Absent, Better, Measurement, Result, UnlikeMeasurementsError, finite_or_none
from .metrics.membership import area

Array = npt.NDArray[np.float64]
Statistic = Callable[[Sequence[Array]], Array]

RESAMPLES = 2000  # bootstrap samples
PERMUTATIONS = 9999  # drawn where the assignments are too many to count
BATCH = 500  # resamples computed at once


def _harmonic_mean(terms: Sequence[Array]) -> Array:
    from scipy.stats import hmean

    return np.asarray(hmean(np.stack([term.mean(-1) for term in terms]), axis=0))


# Of the records' values of each term, ``(…, records)``; the result is ``(…)``.
STATISTICS: dict[str, Statistic] = {
    "mean": lambda terms: terms[0].mean(-1),
    "harmonic mean": _harmonic_mean,  # of the terms' means; 0 if one of them is
    "AUC": lambda terms: area(*terms),  # chance that a record of the first term is above one of the second; ties: half
    # Shi et al., MUSE, arXiv 2407.06460: 100 ((1 - AUC) - (1 - AUC_r)) / (1 - AUC_r), where a retain-only model's AUC_r
    # is ½: it cannot tell them apart. Positive is over-unlearned (the Streisand effect), negative under-unlearned.
    "PrivLeak": lambda terms: 200.0 * (0.5 - area(*terms)),
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
        drawn = _bootstrap(of, names, values, resamples, seed)
        spread = (float(drawn.std(ddof=1)), *np.quantile(drawn, (0.025, 0.975)).tolist())
    how = f"{definition}; terms: " + "; ".join(dict.fromkeys(part.protocol for part in parts))
    return Measurement(
        metric, float(of(values)), unit, how, seed, len({name for own in names for name in own}), *spread, better,
        statistic=statistic, terms=tuple(part.metric for part in parts),
    )  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """How one condition differs from another on the same records.

    Attributes:
        metric: of both.
        before: the value without.
        after: the value with.
        difference: after - before.
        low: lower end of its 95 % bootstrap interval over records; NaN for one record.
        high: upper end.
        p_value: of the paired permutation test, two-sided: chance of a difference at least as far out if the two were
            interchangeable in each pair. Never 0, so that one pair can show nothing.
        exact: whether all assignments were counted.
        effect_size: Cohen's d_z: mean difference over the differences' standard deviation; infinite where all pairs
            differ by the same, NaN for one. Of what is made of several metrics: the difference over n / √(n - 1) of its
            bootstrap standard errors, which for a mean is the same.
        n: pairs.

    Source: Fisher, The Design of Experiments, 1935; Cohen, Statistical Power Analysis, 1988, section 2.3.5.
    """

    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float
    exact: bool
    effect_size: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; infinite or undefined numbers are None."""
        return {k: finite_or_none(v) if isinstance(v, float) else v for k, v in vars(self).items()}


def paired(before: Measurement, after: Measurement, *, resamples: int = PERMUTATIONS) -> Paired:
    """Compare two conditions record by record: difference, interval, permutation test, effect size.

    Args:
        before: one condition.
        after: the other, of the same metric, protocol, seed and records.
        resamples: permutations drawn where they are too many to count.

    Raises:
        UnlikeMeasurementsError: they are not alike, or not means over the same records.

    Example:
        >>> from timerome.evaluation import Measurement, paired
        >>> a, b = ({str(i): x + i for i in range(4)} for x in (0.0, 1.0))
        >>> paired(*(Measurement.over("nll", v, unit="nats", protocol="l2r", seed=0) for v in (a, b))).difference
        1.0
    """
    return paired_composite(before, after, [before], [after], resamples=resamples)


def paired_composite(
    before: Measurement,
    after: Measurement,
    first: Sequence[Measurement],
    second: Sequence[Measurement],
    *,
    resamples: int = PERMUTATIONS,
) -> Paired:
    """Compare what is made of several metrics under two conditions.

    Args:
        before: its value under one condition.
        after: the same under the other.
        first: the terms of ``before``.
        second: the terms of ``after``, over the same records.
        resamples: permutations drawn where they are too many to count.

    Raises:
        UnlikeMeasurementsError: they are not alike, a term's records differ, or it is no mean over records.
    """
    check_alike("paired", before, after)
    check_resamples("paired", resamples)
    names, of, seed = [_records(term) for term in first], STATISTICS[before.statistic or "mean"], before.seed
    for own, term in zip(names, second, strict=True):
        if set(own) != set(term.per_record):
            raise UnlikeMeasurementsError(
                f"paired: expected {term.metric} of the same records twice, got {len(own)} and {len(term.per_record)} "
                f"records of which {len(set(own) & set(term.per_record))} are shared."
            )
    x = [np.array(list(term.per_record.values())) for term in first]
    y = [np.array([term.per_record[k] for k in own]) for term, own in zip(second, names, strict=True)]
    difference, n = float(of(y) - of(x)), len({name for own in names for name in own})
    low, high, effect = math.nan, math.nan, math.nan
    if all(len(own) > 1 for own in names):
        drawn = _bootstrap(of, names, y, RESAMPLES, seed) - _bootstrap(of, names, x, RESAMPLES, seed)
        low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
        if before.statistic:  # the bootstrap's deviation is that of the n values, not of n - 1, over √n
            deviation = float(drawn.std()) * n / math.sqrt(n - 1)
        else:  # that of equal numbers may round to a little above 0
            deviation = float((y[0] - x[0]).std(ddof=1)) if np.ptp(y[0] - x[0]) else 0.0
        effect = difference / deviation if deviation else math.copysign(math.inf, difference) if difference else 0.0
    exact = 2**n <= resamples
    swapped = np.concatenate([
        of([np.where(swap, a, b) for a, b, swap in zip(x, y, swaps, strict=True)])
        - of([np.where(swap, b, a) for a, b, swap in zip(x, y, swaps, strict=True)])
        for swaps in _swaps(names, resamples, exact, seed)
    ])  # fmt: skip
    # One assignment, that which was observed, is always among those counted.
    slack, seen = 1e-12 * max(1.0, abs(difference)), 0 if exact else 1
    tails = [int((swapped * sign >= difference * sign - slack).sum()) + seen for sign in (1, -1)]
    p_value = min(1.0, 2 * min(tails) / (len(swapped) + seen))
    return Paired(before.metric, before.value, after.value, difference, low, high, p_value, exact, effect, n)


def paired_all(before: Sequence[Result], after: Sequence[Result]) -> list[Paired]:
    """Compare every metric that two conditions have over the same records: means, and what is made of several means.

    Others are left out: a p-value such as forget quality is a comparison already.

    Args:
        before: one condition's results.
        after: the other's.
    """
    named = [{m.metric: m for m in found if isinstance(m, Measurement)} for found in (before, after)]
    found = []
    for name, first in named[0].items():
        second = named[1].get(name)
        if second is None or first.statistic != second.statistic:
            continue
        terms = [[of.get(term) for term in first.terms or (name,)] for of in named]
        if all(
            a and b and a.per_record and set(a.per_record) == set(b.per_record) for a, b in zip(*terms, strict=True)
        ):
            found.append(paired_composite(first, second, *terms))  # type: ignore[arg-type]
    return found


def check_alike(function: str, a: Measurement, b: Measurement) -> None:
    """Refuse two measurements that differ in metric, unit, protocol or seed, in the name of ``function``."""
    for name in ("metric", "unit", "protocol", "seed"):
        if getattr(a, name) != getattr(b, name):
            raise UnlikeMeasurementsError(
                f"{function}: expected measurements of one metric under one protocol, but their {name} differs: "
                f"{getattr(a, name)!r} and {getattr(b, name)!r}."
            )


def _records(term: Measurement) -> tuple[str, ...]:
    if not term.per_record:
        raise UnlikeMeasurementsError(f"composite: expected means over records, but {term.metric} is none.")
    return tuple(term.per_record)


def _bootstrap(
    of: Statistic, names: Sequence[tuple[str, ...]], values: Sequence[Array], resamples: int, seed: int
) -> Array:
    """The statistic of bootstrap samples; which records each term takes depends on the seed alone."""
    generator, found = np.random.default_rng(seed), []
    for start in range(0, resamples, BATCH):
        size = min(BATCH, resamples - start)
        drawn = {own: generator.integers(len(own), size=(size, len(own))) for own in dict.fromkeys(names)}
        found.append(of([term[drawn[own]] for own, term in zip(names, values, strict=True)]))
    return np.concatenate(found)


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

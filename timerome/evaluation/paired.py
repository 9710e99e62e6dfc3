"""Two conditions on the same records: the difference, how sure it is, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .composite import composite_difference
from .measurement import Measurement, Result, UnlikeMeasurementsError, check_alike, finite_or_none
from .statistics import bootstrap_ci, paired_effect_size, paired_permutation_test


@dataclass(frozen=True)
class Paired:
    """How one condition differs from another on the same records.

    Attributes:
        metric: of both.
        before: the value without.
        after: the value with.
        difference: after - before, over the records both have.
        low: lower end of its 95 % bootstrap interval over records; NaN for one record.
        high: upper end.
        p_value: of the paired permutation test, two-sided.
        exact: whether all assignments were counted.
        effect_size: Cohen's d_z, see :func:`timerome.evaluation.statistics.paired_effect_size`; for what is made of
            several metrics see :func:`timerome.evaluation.composite.composite_difference`.
        n: pairs.
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


def paired(before: Measurement, after: Measurement, *, resamples: int = 9999) -> Paired:
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
    check_alike("paired", before, after)
    shared = set(before.per_record) & set(after.per_record)
    if not before.per_record or not len(shared) == len(before.per_record) == len(after.per_record):
        raise UnlikeMeasurementsError(
            f"paired: expected {before.metric} of the same records twice, got {len(before.per_record)} and "
            f"{len(after.per_record)} records of which {len(shared)} are shared."
        )
    first = np.array(list(before.per_record.values()))
    second = np.array([after.per_record[name] for name in before.per_record])
    interval = bootstrap_ci(second - first, seed=before.seed)
    test = paired_permutation_test(second, first, resamples=resamples, seed=before.seed)
    return Paired(
        before.metric, before.value, after.value, test.difference, interval.low, interval.high, test.p_value,
        test.exact, paired_effect_size(second, first), test.n,
    )  # fmt: skip


def paired_all(before: Sequence[Result], after: Sequence[Result]) -> list[Paired]:
    """Compare every metric that two conditions have over the same records: means, and what is made of several means.

    Others are left out: a p-value such as forget quality is a comparison already.

    Args:
        before: one condition's results.
        after: the other's.
    """
    named = [{m.metric: m for m in found if isinstance(m, Measurement)} for found in (before, after)]
    found = []
    for first in named[0].values():
        second = named[1].get(first.metric)
        if second is None:
            continue
        if first.per_record and set(first.per_record) == set(second.per_record):
            found.append(paired(first, second))
        elif first.statistic and first.statistic == second.statistic:
            terms = [[of.get(name) for name in first.terms] for of in named]
            if all(a and b and set(a.per_record) == set(b.per_record) for a, b in zip(*terms, strict=True)):
                found.append(_paired_composite(first, second, *terms))  # type: ignore[arg-type]
    return found


def _paired_composite(
    before: Measurement, after: Measurement, first: Sequence[Measurement], second: Sequence[Measurement]
) -> Paired:
    check_alike("paired", before, after)
    found = composite_difference(before.statistic, first, second)
    return Paired(
        before.metric, before.value, after.value, found.difference, found.low, found.high, found.p_value, found.exact,
        found.effect_size, found.n,
    )  # fmt: skip

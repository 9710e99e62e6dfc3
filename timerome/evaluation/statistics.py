"""How sure a measured mean or difference is: bootstrap intervals, paired permutation tests, effect sizes.

A unit is a fact: average over its wordings and draws first, so that values are independent.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..functional.bootstrap import BATCH, Values, check_resamples, checked_values
from ..functional.bootstrap import Interval as Interval
from ..functional.bootstrap import bootstrap_ci as bootstrap_ci

Alternative = Literal["two-sided", "less", "greater"]


class PairedTest(NamedTuple):
    """Outcome of a paired permutation test.

    Attributes:
        difference: mean of a - b.
        p_value: chance of a difference at least as far out, if a and b were interchangeable in each pair.
        n: number of pairs.
        exact: whether all 2ⁿ assignments were counted, rather than a random sample of them.
    """

    difference: float
    p_value: float
    n: int
    exact: bool


def _differences(function: str, a: Values, b: Values) -> npt.NDArray[np.float64]:
    first, second = checked_values(function, "a", a), checked_values(function, "b", b)
    if first.shape != second.shape:
        raise ValueError(
            f"{function}: expected a and b of equal length, the same facts in the same order, "
            f"got {len(first)} and {len(second)}."
        )
    return first - second


def paired_permutation_test(
    a: Values, b: Values, *, resamples: int = 9999, seed: int = 0, alternative: Alternative = "two-sided"
) -> PairedTest:
    """Test whether two conditions differ on the same facts, by swapping them within pairs at random.

    Args:
        a: one value a fact, shape ``(n,)``, finite.
        b: the same facts in the same order, under the other condition.
        resamples: how many assignments are drawn; where there are no more than these (n ≤ 13 by default), all are
            counted and the p-value is exact.
        seed: of the drawing; without effect on an exact test.
        alternative: ``"two-sided"``, ``"less"`` (a below b) or ``"greater"`` (a above b).

    Returns:
        Difference, p-value, n, exact. The p-value is never 0: two-sided at least 2/2ⁿ if exact, else
        2/(resamples + 1), and half of that one-sided. So one pair can show nothing.

    Raises:
        ValueError: ``a`` or ``b`` is empty, not one-dimensional or not finite, their lengths differ, ``alternative`` is
            unknown, or ``resamples`` < 1.

    Source: Fisher, The Design of Experiments, 1935; ``scipy.stats.permutation_test`` on the signs of the differences.

    Example:
        >>> paired_permutation_test([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])  # 2 of 16 assignments are as far out
        PairedTest(difference=2.5, p_value=0.125, n=4, exact=True)
    """
    difference = _differences("paired_permutation_test", a, b)
    if alternative not in ("two-sided", "less", "greater"):
        raise ValueError(
            f"paired_permutation_test: expected alternative 'two-sided', 'less' or 'greater', got {alternative!r}."
        )
    check_resamples("paired_permutation_test", resamples)
    n, mean = len(difference), float(difference.mean())
    if n == 1:  # two assignments: the difference, and its negative
        out = {"two-sided": False, "less": mean < 0, "greater": mean > 0}[alternative]
        return PairedTest(mean, 0.5 if out else 1.0, 1, True)
    from scipy.stats import permutation_test

    result = permutation_test(
        (difference,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples,
        alternative=alternative, batch=max(1, BATCH // n), random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return PairedTest(mean, float(result.pvalue), n, 2**n <= resamples)


def paired_effect_size(a: Values, b: Values) -> float:
    """Mean of a - b in units of the standard deviation of a - b (Cohen's d_z).

    Args:
        a: one value a fact, shape ``(n,)``, finite.
        b: the same facts in the same order, under the other condition.

    Returns:
        The effect size; positive where a is above b. 0 if a equals b, infinite with the difference's sign if every pair
        differs by the same amount, NaN for a single pair.

    Raises:
        ValueError: ``a`` or ``b`` is empty, not one-dimensional or not finite, or their lengths differ.

    Source: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, section 2.3.5.

    Example:
        >>> paired_effect_size([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
        2.0
    """
    difference = _differences("paired_effect_size", a, b)
    if len(difference) == 1:
        return float("nan")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:  # the standard deviation of equal numbers may round to a little above 0
        return float(np.copysign(np.inf, mean)) if mean else 0.0
    return mean / float(difference.std(ddof=1))

"""Bootstrap intervals of a mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.floating]
BATCH = 2_000_000  # resampled values held at once, 16 MB


class Interval(NamedTuple):
    """A mean and its confidence interval.

    Attributes:
        mean: of the values, in their units.
        low: lower end; NaN if there is only one value.
        high: upper end; NaN if there is only one value.
        n: number of values.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def contains_zero(self) -> bool:
        """Whether 0 lies inside, or the interval is undefined: whether the data leave no effect possible."""
        return not (self.low > 0 or self.high < 0)


def checked_values(function: str, name: str, values: Values) -> npt.NDArray[np.float64]:
    """Return ``values`` as float64 ``(n,)``; refuse empty and non-finite ones in the name of ``function``."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{function}: expected {name} of shape (n,) with n of at least 1, one a fact, got {array.shape}."
        )
    if bad := np.flatnonzero(~np.isfinite(array)).tolist():
        raise ValueError(
            f"{function}: expected finite {name}, got {array[bad[0]]} at {bad[:5]} ({len(bad)} of {array.size}); "
            "find out why, or leave those facts out and report how many."
        )
    return array


def check_resamples(function: str, resamples: int) -> None:
    """Refuse fewer than one bootstrap sample or permutation."""
    if resamples < 1:
        raise ValueError(f"{function}: expected resamples of at least 1, got {resamples}.")


def bootstrap_ci(values: Values, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: one a fact, shape ``(n,)``, finite.
        level: chance that such an interval covers the true mean, in (0, 1). With fewer than about 20 values it covers
            less often than that.
        resamples: bootstrap samples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        Mean, ends and n. One value says nothing about spread: its ends are NaN. Equal values have an interval of no
        width.

    Raises:
        ValueError: ``values`` is empty, not one-dimensional or not finite, ``level`` is outside (0, 1), or
            ``resamples`` < 1.

    Source: Efron, Bootstrap Methods: Another Look at the Jackknife, 1979; ``scipy.stats.bootstrap``.

    Example:
        >>> interval = bootstrap_ci([-3.0, -1.0, -2.0, -2.5, -1.5])
        >>> interval.mean, interval.low < -2 < interval.high, interval.n
        (-2.0, True, 5)
    """
    array = checked_values("bootstrap_ci", "values", values)
    if not 0 < level < 1:
        raise ValueError(f"bootstrap_ci: expected level in (0, 1), got {level}; 0.95 is customary.")
    check_resamples("bootstrap_ci", resamples)
    n = len(array)
    if n == 1:
        return Interval(float(array[0]), float("nan"), float("nan"), 1)
    from scipy.stats import bootstrap

    result = bootstrap(
        (array,), np.mean, n_resamples=resamples, confidence_level=level, method="percentile", vectorized=True,
        batch=max(1, BATCH // n), random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(array.mean()), float(result.low), float(result.high), n)

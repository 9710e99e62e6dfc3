"""Intervals, paired tests and effect sizes of means."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.evaluation import Measurement, UnlikeMeasurementsError, paired
from timerome.functional.bootstrap import Interval, bootstrap_ci

VALUES = st.lists(st.integers(-5, 5), min_size=1, max_size=8)  # whole numbers: sums do not depend on their order


def compared(a, b, *, seed=0, **more):
    """How b differs from a, record by record."""
    conditions = ({str(i): float(v) for i, v in enumerate(values)} for values in (a, b))
    return paired(*(Measurement.over("em", c, protocol="l2r", seed=seed) for c in conditions), **more)


@settings(deadline=None, max_examples=30)
@given(VALUES, VALUES)
def test_exact_permutation_test_counts_every_sign_flip(a, b):
    n = min(len(a), len(b))
    a, b = np.array(a[:n]), np.array(b[:n])
    flips = [np.sum((b - a) * signs) for signs in itertools.product((1, -1), repeat=n)]
    less, greater = (np.mean([test(f, np.sum(b - a)) for f in flips]) for test in (np.less_equal, np.greater_equal))
    result = compared(a, b)
    assert result.exact and result.n == n
    assert result.p_value == pytest.approx(min(1.0, 2 * min(less, greater)))
    assert result.difference == pytest.approx(np.mean(b - a))


def test_an_effect_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    before, noise = rng.normal(size=60), rng.normal(size=60)
    found = compared(before + 0.1 * noise, before + 1.0)
    assert not found.exact and found.p_value == 2 / 10_000  # the least there is
    assert compared(before, before).p_value == 1.0


def test_p_values_are_uniform_where_there_is_no_effect():
    rng = np.random.default_rng(0)
    p_values = [
        compared(rng.normal(size=20), rng.normal(size=20), resamples=199, seed=i).p_value for i in range(150)
    ]  # fmt: skip
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.12)


def test_effect_size_by_hand():
    assert compared([0, 0, 0], [1, 2, 3]).effect_size == 2.0
    assert compared([1, 2, 3], [0, 0, 0]).effect_size == -2.0
    assert compared([1, 2], [1, 2]).effect_size == 0.0
    assert compared([0.1] * 3, [-0.1] * 3).effect_size == -math.inf
    assert math.isnan(compared([0.0], [1.0]).effect_size)


def test_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    for level in (0.95, 0.5):
        found = [bootstrap_ci(rng.normal(3.0, size=40), level=level, resamples=400, seed=i) for i in range(300)]
        assert np.mean([i.low <= 3.0 <= i.high for i in found]) == pytest.approx(level, abs=0.07)


@settings(deadline=None, max_examples=50)
@given(VALUES.filter(lambda v: len(v) > 1), st.integers(-3, 3))
def test_interval_holds_its_mean_and_moves_with_the_values(values, shift):
    found = bootstrap_ci(values, resamples=200)
    assert min(values) <= found.low <= found.high <= max(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.n == len(values)
    assert bootstrap_ci(np.add(values, shift), resamples=200) == pytest.approx((*np.add(found[:3], shift), found.n))
    assert bootstrap_ci(values, resamples=200) == found  # the same seed


def test_interval_of_one_and_of_equal_values():
    one = bootstrap_ci([2.0])
    assert (one.mean, one.n) == (2.0, 1) and math.isnan(one.low) and math.isnan(one.high)
    assert bootstrap_ci([2.0] * 3) == Interval(2.0, 2.0, 2.0, 3)


def test_many_values_stay_within_memory():
    assert bootstrap_ci(np.arange(5000.0), resamples=100).n == 5000


@settings(deadline=None, max_examples=20)
@given(VALUES.filter(lambda v: len(set(v)) > 1), st.integers(1, 9))
def test_effect_size_has_no_units(differences, scale):
    zero = [0.0] * len(differences)
    scaled = compared(zero, np.multiply(differences, scale)).effect_size
    assert scaled == pytest.approx(compared(zero, differences).effect_size)


def test_bad_pairs_are_refused():
    with pytest.raises(UnlikeMeasurementsError, match="2 and 1 records of which 1 are shared"):
        compared([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        compared([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ValueError, match="resamples of at least 1"):
        compared([1.0], [2.0], resamples=0)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, r"got \(0,\)"),
        ([[1.0], [2.0]], {}, r"got \(2, 1\)"),
        ([1.0, float("inf")], {}, "finite"),
        ([1.0, 2.0], {"level": 95}, r"level in \(0, 1\), got 95"),
        ([1.0, 2.0], {"resamples": 0}, "resamples of at least 1"),
    ],
)
def test_bad_intervals_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(values, **options)

"""Intervals, paired tests and effect sizes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.evaluation.statistics import Interval, bootstrap_ci, paired_effect_size, paired_permutation_test

VALUES = st.lists(st.integers(-5, 5), min_size=1, max_size=8)  # whole numbers: sums do not depend on their order


@settings(deadline=None, max_examples=50)
@given(VALUES, VALUES)
def test_exact_permutation_test_counts_every_sign_flip(a, b):
    n = min(len(a), len(b))
    a, b = np.array(a[:n]), np.array(b[:n])
    flips = [np.sum((a - b) * signs) for signs in itertools.product((1, -1), repeat=n)]
    less, greater = (np.mean([test(f, np.sum(a - b)) for f in flips]) for test in (np.less_equal, np.greater_equal))
    wanted = {"less": less, "greater": greater, "two-sided": min(1.0, 2 * min(less, greater))}
    for alternative, p_value in wanted.items():
        result = paired_permutation_test(a, b, alternative=alternative)
        assert result.exact and result.n == n
        assert result.p_value == pytest.approx(p_value)
        assert result.difference == pytest.approx(np.mean(a - b))


def test_an_effect_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    before, noise = rng.normal(size=60), rng.normal(size=60)
    found = paired_permutation_test(before + 1.0, before + 0.1 * noise)
    assert not found.exact and found.p_value == 2 / 10_000  # the least there is
    assert paired_permutation_test(before + 1.0, before + 0.1 * noise, alternative="less").p_value == 1.0
    assert paired_permutation_test(before, before).p_value == 1.0


def test_p_values_are_uniform_where_there_is_no_effect():
    rng = np.random.default_rng(0)
    p_values = [
        paired_permutation_test(rng.normal(size=20), rng.normal(size=20), resamples=199, seed=i).p_value
        for i in range(300)
    ]
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.1)


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


def test_effect_size():
    assert paired_effect_size([1, 2, 3], [0, 0, 0]) == 2.0
    assert paired_effect_size([0, 0, 0], [1, 2, 3]) == -2.0
    assert paired_effect_size([1, 2], [1, 2]) == 0.0
    assert paired_effect_size([-0.1] * 3, [0.1] * 3) == -math.inf
    assert math.isnan(paired_effect_size([1.0], [0.0]))


@settings(deadline=None, max_examples=50)
@given(VALUES.filter(lambda v: len(set(v)) > 1), st.integers(1, 9))
def test_effect_size_has_no_units(differences, scale):
    zero = [0.0] * len(differences)
    scaled = paired_effect_size(np.multiply(differences, scale), zero)
    assert scaled == pytest.approx(paired_effect_size(differences, zero))


@pytest.mark.parametrize("function", [paired_permutation_test, paired_effect_size])
def test_bad_pairs_are_refused(function):
    with pytest.raises(ValueError, match="equal length, .* got 2 and 1"):
        function([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"expected finite a, got nan at \[1\]"):
        function([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ValueError, match="expected finite b, got inf"):
        function([1.0, 2.0], [1.0, float("inf")])
    with pytest.raises(ValueError, match=r"shape \(n,\) .* got \(0,\)"):
        function([], [])


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


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="got 'larger'"):
        paired_permutation_test([1.0], [2.0], alternative="larger")
    with pytest.raises(ValueError, match="resamples of at least 1"):
        paired_permutation_test([1.0], [2.0], resamples=0)

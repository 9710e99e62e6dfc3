"""Paired statistics."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timerome.evaluation.statistics import bootstrap_ci, paired_effect_size, paired_permutation_test

VALUES = st.lists(st.integers(-5, 5), min_size=2, max_size=8)  # whole numbers: sums do not depend on their order


@given(VALUES)
def test_exact_permutation_test_counts_every_sign_flip(differences):
    before, after = [0.0] * len(differences), differences
    flips = [np.mean(np.multiply(differences, signs)) for signs in itertools.product((1, -1), repeat=len(differences))]
    observed = np.mean(differences)
    slack = 1e-9
    greater = np.mean([f >= observed - slack for f in flips])
    less = np.mean([f <= observed + slack for f in flips])
    assert paired_permutation_test(before, after, alternative="greater") == pytest.approx(greater, abs=1e-6)
    assert paired_permutation_test(before, after) == pytest.approx(min(1.0, 2 * min(greater, less)), abs=1e-6)


def test_an_effect_is_found_and_none_is_not():
    noise = np.random.default_rng(0).normal(size=60)
    assert paired_permutation_test(noise, noise + 1.0) < 0.001
    assert paired_permutation_test(noise, noise + np.random.default_rng(1).normal(size=60)) > 0.01


def test_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        found = bootstrap_ci(rng.normal(size=40), resamples=400, seed=i)
        inside += found.low <= 0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_one_fact_has_a_mean_and_no_interval():
    found = bootstrap_ci([2.0])
    assert found.mean == 2.0
    assert math.isnan(found.low)


def test_effect_size():
    assert paired_effect_size([0, 0, 0], [1, 2, 3]) == 2.0
    assert paired_effect_size([1, 2], [1, 2]) == 0.0
    assert paired_effect_size([0, 0], [-1, -1]) == -math.inf


@pytest.mark.parametrize("function", [paired_permutation_test, paired_effect_size])
def test_bad_pairs_are_refused(function):
    with pytest.raises(ValueError, match="as many"):
        function([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        function([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        function([], [])

import warnings

import numpy as np
import pytest

from timerome.functional import effects as fx


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_last_masked_keeps_what_committed_a_position():
    log_prob = -np.arange(12.0).reshape(4, 3)
    masked = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=bool)
    expected = [[0, -1, -2], [-3, -1, -5], [-3, -1, -8], [-3, -1, -11]]
    np.testing.assert_array_equal(fx.last_masked(log_prob, masked), expected)
    np.testing.assert_array_equal(fx.last_masked(log_prob[None], masked[None])[0], expected)
    with pytest.raises(ValueError, match="one shape"):
        fx.last_masked(log_prob, masked[:2])
    with pytest.raises(ValueError, match="step 0"):
        fx.last_masked(log_prob, ~masked)


def test_the_last_step_has_no_later_mean():
    scores = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    np.testing.assert_array_equal(fx.later_mean(scores, 0), [4.0, 1.5])
    assert np.isnan(fx.later_mean(scores, 2)).all() and np.isnan(fx.later_mean(scores, 7)).all()


def test_an_effect_is_a_share_and_never_a_division_by_nothing():
    gained = np.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_array_equal(fx.share_of(gained, np.array(2.0), 0.1), [0.0, 0.5, 1.0, 1.5])
    for total in (0.0, 0.05, -1.0, np.nan):
        assert np.isnan(fx.share_of(gained, np.array(total), 0.1)).all()


def test_static_effect_leaves_out_undefined_steps():
    effects = np.zeros((1, 1, 3, 1))
    effects[0, 0, :, 0] = [1.0, 0.5, np.nan]
    assert fx.static_effect(effects) == pytest.approx(0.75)


def test_masked_mean_of_nothing_is_undefined():
    values = np.array([[1.0, 5.0], [2.0, 4.0]])
    np.testing.assert_array_equal(fx.masked_mean(values, np.array([[True, False], [False, False]])), [1.0, np.nan])


def test_first_largest_takes_the_first_of_equals():
    assert fx.first_largest(np.array([0.0, 1.0, 1.0 + 1e-8])) == (1,)
    assert fx.first_largest(np.array([[np.nan, 0.0], [1.0, 2.0]])) == (1, 1)
    for empty in (np.full((2, 2), np.nan), np.empty((0, 2))):
        with pytest.raises(ValueError, match="not NaN"):
            fx.first_largest(empty)


def test_average_over_facts_wants_enough_of_them():
    effects = np.array([[1.0, 1.0, np.nan], [3.0, np.nan, np.nan], [5.0, np.nan, np.nan]])
    np.testing.assert_array_equal(fx.average_over_facts(effects), [3.0, np.nan, np.nan])
    assert fx.average_over_facts(np.empty((0, 2))).shape == (2,)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        (lambda i: i.low <= 0.3 <= i.high)(fx.bootstrap_interval(rng.normal(0.3, 1.0, 40), resamples=400, seed=k))
        for k in range(300)
    ]
    assert 0.9 <= np.mean(hits) <= 0.98


def test_bootstrap_interval_of_little():
    assert fx.bootstrap_interval(np.array([2.0, np.nan]))[0] == 2.0
    assert fx.bootstrap_interval(np.array([2.0])).contains_zero
    empty = fx.bootstrap_interval(np.array([]))
    assert np.isnan(empty[:3]).all()
    assert empty.n == 0
    first, again = (fx.bootstrap_interval(np.array([1.0, 2.0, 4.0]), seed=3) for _ in range(2))
    assert first == again
    with pytest.raises(ValueError, match="shape"):
        fx.bootstrap_interval(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="level"):
        fx.bootstrap_interval(np.zeros(2), level=95)


def test_temporal_gain_of_noise_is_not_positive():
    """Chosen on the same facts it would be: the best of many cells always beats the best mean."""
    rng = np.random.default_rng(0)
    gains, naive = [], []
    for _ in range(40):
        effects = rng.normal(0.5, 1.0, (10, 6, 4, 2))
        gains.append(fx.temporal_gain(effects, fx.static_effect(effects)).mean())
        naive.append(effects.mean(0).max() - fx.static_effect(effects).mean(0).max())
    assert abs(np.mean(gains)) < 3 * np.std(gains) / np.sqrt(len(gains)) < np.mean(naive)
    assert min(naive) > 0


def test_the_interval_of_the_gain_lies_above_zero_for_noise_about_as_rarely_as_it_says():
    rng = np.random.default_rng(1)
    above = []
    for _ in range(100):
        effects = rng.normal(0.5, 0.3, (40, 6, 4, 2)) + rng.normal(0.0, 0.3, (40, 1, 1, 1))
        above.append(fx.bootstrap_interval(fx.temporal_gain(effects, fx.static_effect(effects)), resamples=200).low > 0)
    assert np.mean(above) <= 0.1


def test_temporal_gain_of_a_step_that_matters():
    effects = np.random.default_rng(0).normal(0.0, 0.01, (8, 3, 4, 1))
    effects[:, 1, 2] += 1.0
    assert fx.temporal_gain(effects, fx.static_effect(effects)) == pytest.approx(np.full(8, 0.75), abs=0.1)


def test_temporal_gain_of_one_fact_and_of_wrong_shapes():
    effects = np.zeros((1, 2, 2, 1))
    effects[0, 1, 1] = 1.0
    assert fx.temporal_gain(effects, fx.static_effect(effects)) == pytest.approx([0.5])
    assert np.isnan(fx.temporal_gain(np.full((2, 1, 1, 1), np.nan), np.full((2, 1, 1), np.nan))).all()
    with pytest.raises(ValueError, match=r"\(F, N, s, R\)"):
        fx.temporal_gain(effects, effects)

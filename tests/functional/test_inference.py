import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from timerome.functional.bootstrap import bootstrap_ci
from timerome.functional.inference import max_sign_test, split_half, two_stage_interval


def test_of_one_draw_the_interval_is_the_bootstrap_over_facts():
    values = np.random.default_rng(0).normal(1, 0.3, (30, 1))
    ours, plain = two_stage_interval(values, resamples=20_000), bootstrap_ci(values[:, 0], resamples=20_000)
    assert ours.mean == pytest.approx(plain.mean)
    assert ours[1:3] == pytest.approx(plain[1:3], abs=0.01)


def test_noise_of_draws_widens_the_interval():
    rng = np.random.default_rng(0)
    facts = rng.normal(1, 0.1, (20, 1))
    quiet, noisy = (facts + rng.normal(0, sd, (20, 4)) for sd in (0.001, 0.5))
    widths = [i.high - i.low for i in map(two_stage_interval, (quiet, noisy))]
    assert widths[1] > 3 * widths[0]


def test_resampled_draws_are_divided_by_their_own_total():
    """What restores everything in every draw restores everything, however much the draws differ."""
    totals = np.random.default_rng(0).uniform(0.2, 1.8, (8, 6))
    totals /= totals.mean(1, keepdims=True)
    interval = two_stage_interval(totals, totals)
    assert interval[:3] == pytest.approx((1, 1, 1))
    assert two_stage_interval(totals).low < 0.95


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        values = 0.5 + rng.normal(0, 0.2, (25, 1)) + rng.normal(0, 0.3, (25, 3))
        interval = two_stage_interval(values, resamples=400, seed=seed)
        hits += interval.low <= 0.5 <= interval.high
    assert hits >= 180


def test_missing_draws_and_facts_are_left_out():
    values = np.array([[1.0, np.nan], [3.0, 3.0], [np.nan, np.nan]])
    assert two_stage_interval(values)[::3] == (2.0, 2)
    assert np.isnan(two_stage_interval(values[:1]).low)
    assert np.isnan(two_stage_interval(values[2:]).mean)
    for wrong in ({"values": np.zeros(3)}, {"values": np.zeros((3, 1)), "level": 1.0}):
        with pytest.raises(ValueError, match="two_stage_interval"):
            two_stage_interval(**wrong)


@pytest.mark.parametrize("facts", [8, 20])
def test_on_noise_the_corrected_test_calls_something_in_at_most_a_twentieth(facts):
    """Cells are correlated, as layers are; the uncorrected test calls something nearly always."""
    rng = np.random.default_rng(0)
    called = plain = 0
    for seed in range(300):
        noise = rng.normal(0, 1, (facts, 40)) + rng.normal(0, 1, (facts, 1))
        called += bool((max_sign_test(noise, resamples=1000, seed=seed) <= 0.05).any())
        z = noise.mean(0) / (noise.std(0, ddof=1) / np.sqrt(facts))
        plain += bool((z > 1.645).any())
    assert called <= 25  # 15 expected, three standard deviations
    assert plain > 100


def test_an_effect_is_called_and_noise_beside_it_is_not():
    noise = np.random.default_rng(0).normal(0, 1, (16, 100))
    noise[:, 3] += 2.0
    p = max_sign_test(noise)
    assert p[3] < 0.01 and (np.delete(p, 3) > 0.05).all()


def test_few_facts_can_show_nothing():
    assert max_sign_test(np.ones((4, 3))).min() == pytest.approx(1 / 16)
    assert max_sign_test(np.ones((5, 3))).max() == pytest.approx(1 / 32)


def test_undefined_cells_have_no_p_value_and_count_for_nothing():
    values = np.random.default_rng(0).normal(1, 1, (10, 5))
    more = np.concatenate([values, np.full((10, 3), np.nan)], axis=1)
    np.testing.assert_array_equal(max_sign_test(more)[:5], max_sign_test(values))
    assert np.isnan(max_sign_test(more)[5:]).all()
    with pytest.raises(ValueError, match="max_sign_test"):
        max_sign_test(np.zeros(3))


@given(arrays(np.float64, (6, 4), elements=st.floats(-5, 5, width=32)), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_p_values_do_not_depend_on_units_and_lie_in_range(values, unit):
    p = max_sign_test(values)
    np.testing.assert_allclose(max_sign_test(values * unit), p)
    assert ((p >= 1 / 64) & (p <= 1)).all()


def test_halves_of_noise_disagree_and_regress():
    noise = np.random.default_rng(0).normal(0, 1, (20, 10, 4))
    found = split_half(noise)
    assert found.same_cell < 0.3
    assert found.chosen_effect > 0.4 and abs(found.held_out_effect) < 0.35
    assert abs(found.correlation) < 0.4


def test_halves_of_one_map_agree():
    effects = np.random.default_rng(0).normal(0, 0.05, (20, 10, 4))
    effects[:, 6, 2] += 1
    found = split_half(effects)
    assert found.same_cell == found.same_site == 1 and found.held_out_effect > 0.9
    with pytest.raises(ValueError, match="two facts"):
        split_half(effects[:1])

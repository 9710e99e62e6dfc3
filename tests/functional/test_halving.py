import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.functional.halving import errors_of, rounds_of, survivors


@given(st.integers(1, 200), st.integers(1, 5))
def test_rounds_use_every_draw_once_and_double(draws, first):
    rounds = rounds_of(draws, first)
    assert [d for r in rounds for d in r] == list(range(draws))
    for before, now in zip(rounds, rounds[1:], strict=False):
        assert len(now) <= before.stop and (now.stop == draws or len(now) == before.stop)


@given(st.integers(3, 200), st.floats(0.001, 0.5))
def test_errors_add_up_and_go_where_draws_are_saved(draws, error):
    rounds = rounds_of(draws)
    errors = errors_of(rounds, error)
    assert sum(errors) == pytest.approx(error) and len(errors) == len(rounds) - 1
    for one, other, a, b in zip(errors, errors[1:], rounds, rounds[1:], strict=False):
        assert one * (draws - b.stop) == pytest.approx(other * (draws - a.stop))


def test_what_is_far_behind_goes_and_what_is_close_stays():
    rng = np.random.default_rng(0)
    values = np.array([1.0, 0.97, 0.5, 0.0, 0.0]) + rng.normal(0, 0.05, (4, 5))
    assert survivors(values, 0.05).tolist() == [True, True, False, False, False]
    assert survivors(values, 0.0).all()


def test_one_draw_says_nothing_and_nan_is_out():
    assert survivors(np.array([[1.0, 0.0, np.nan]]), 0.5).tolist() == [True, True, False]
    assert not survivors(np.full((3, 2), np.nan), 0.5).any()
    for wrong in ((np.zeros(3), 0.1), (np.zeros((2, 3)), 1.0)):
        with pytest.raises(ValueError, match="survivors"):
            survivors(*wrong)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_the_leader_stays_and_more_error_drops_no_fewer(seed):
    values = np.random.default_rng(seed).normal(0, 1, (3, 12))
    few, many = survivors(values, 0.01), survivors(values, 0.4)
    assert few[values.mean(0).argmax()] and not (many & ~few).any()


def test_exact_ties_all_stay():
    values = np.repeat(np.random.default_rng(0).normal(1, 0.2, (4, 1)), 3, axis=1)
    assert survivors(np.concatenate([values, values - 5], axis=1), 0.05).tolist() == [True] * 3 + [False] * 3


def test_the_best_is_lost_no_more_often_than_stated():
    """Two rounds of 2 and 4 draws at 0.05 each; the best is 0.3 ahead of half, noise has 0.2."""
    rng = np.random.default_rng(0)
    lost, kept, trials = 0, 0.0, 400
    for _ in range(trials):
        truth = np.where(np.arange(30) < 15, 0.7, 0.0)
        truth[7] = 1.0
        values = truth + rng.normal(0, 0.2, (4, 30))
        alive = survivors(values[:2], 0.05)
        again = survivors(np.where(alive, values, np.nan), 0.05)
        lost += not again[7]
        kept += again.mean()
    assert lost / trials <= 0.1
    assert kept / trials < 0.4  # and it is worth something


def sized(rng, truth, spread=0.05):
    """Ten draws that differ in how much there is to restore, and what coordinates restore of it."""
    sizes = rng.uniform(0.2, 1.8, 10)
    return sizes, sizes[:, None] * (truth + rng.normal(0, spread, (10, len(truth))))


def test_sizes_tell_small_effects_from_large_ones():
    """Draws differ far more than coordinates do within one."""
    truth = np.repeat([1.0, 0.4], [1, 29])
    kept = {True: 0, False: 0}
    for seed in range(50):
        sizes, values = sized(np.random.default_rng(seed), truth)
        for known in kept:
            kept[known] += int(survivors(values[:2], 0.05, sizes if known else None).sum())
    assert kept[True] < 0.1 * kept[False]


def test_the_best_over_all_planned_draws_is_lost_no_more_often_than_stated():
    lost, trials = 0, 400
    rng = np.random.default_rng(0)
    for _ in range(trials):
        sizes, values = sized(rng, np.repeat([0.9, 0.7, 0.0], 10), spread=0.2)
        lost += not survivors(values[:4], 0.1, sizes)[values.mean(0).argmax()]
    assert lost / trials <= 0.1


def test_once_all_planned_draws_are_made_the_best_is_known():
    sizes, values = sized(np.random.default_rng(0), np.linspace(0.5, 0.6, 12))
    values[:, 3] = values[:, values.mean(0).argmax()]  # an exact tie stays
    best = values.mean(0).max()
    assert (survivors(values, 1e-6, sizes) == (values.mean(0) == best)).all()


def test_sizes_that_say_nothing_drop_nothing():
    values = np.random.default_rng(0).normal(0, 1, (2, 5))
    assert survivors(values, 0.5, np.array([-1.0, 1.0, 3.0])).all()
    with pytest.raises(ValueError, match="sizes"):
        survivors(values, 0.5, np.ones(1))

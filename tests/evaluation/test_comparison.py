"""What is made of several metrics: its value, its interval, and its comparison between two conditions."""

import itertools
import math
from statistics import harmonic_mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.evaluation import Absent, Measurement, UnlikeMeasurementsError, composite, paired, paired_all
from timerome.evaluation.comparison import STATISTICS, paired_composite

SHARES = st.lists(st.integers(0, 20).map(lambda k: k / 20), min_size=1, max_size=6)


def measured(values, metric="em"):
    named = values if isinstance(values, dict) else {str(i): v for i, v in enumerate(values)}
    return Measurement.over(metric, named, protocol="l2r", seed=0)


def test_a_composite_is_its_definition_and_absent_with_a_term():
    terms = {"x": measured([1.0, 1.0]), "y": measured([0.5, 0.5], "ps")}
    found = composite("hm", terms, "harmonic mean", definition="the harmonic mean")
    assert found.value == pytest.approx(2 / 3)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)
    assert (found.n, found.terms, found.statistic) == (2, ("em", "ps"), "harmonic mean")
    assert "the harmonic mean; terms: l2r" in found.protocol
    gone = composite("hm", {**terms, "z": Absent("z", "no holdout set")}, "harmonic mean", definition="it")
    assert gone == Absent("hm", "it needs z (no holdout set)")
    with pytest.raises(UnlikeMeasurementsError, match="means over records, but hm is none"):
        composite("of", {"x": found}, "harmonic mean", definition="it")
    assert Measurement.from_dict(found.to_dict()) == found


def difference(statistic, before, after, **more):
    """The comparison of what is made of the same terms under two conditions."""
    made = (
        composite("it", {m.metric: m for m in terms}, statistic, definition="it", resamples=2)
        for terms in (before, after)
    )
    return paired_composite(*made, before, after, **more)


@given(SHARES, SHARES, SHARES)
def test_statistics_are_what_they_say(a, b, c):
    arrays = [np.array(values) for values in (a, b, c)]
    means = [float(values.mean()) for values in arrays]
    wanted = harmonic_mean(means) if min(means) else 0.0
    assert STATISTICS["harmonic mean"](arrays) == pytest.approx(wanted)
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert STATISTICS["AUC"](arrays[:2]) == pytest.approx(np.mean(pairs))
    assert STATISTICS["PrivLeak"](arrays[:2]) == pytest.approx(100 * (0.5 - np.mean(pairs)) / 0.5)


def test_one_record_has_no_interval():
    found = composite("hm", {"x": measured([0.5]), "y": measured([0.2, 0.4], "ps")}, "harmonic mean", definition="it")
    assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(found.standard_error)


def test_its_interval_covers_the_truth_about_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(60):
        terms = {name: measured(rng.beta(a, b, 60), name) for name, a, b in (("x", 2, 2), ("y", 4, 1))}
        found = composite("hm", terms, "harmonic mean", definition="harmonic mean", resamples=200)
        inside += found.low <= harmonic_mean([0.5, 0.8]) <= found.high
    assert 51 <= inside <= 60


def test_terms_over_the_same_records_are_drawn_together():
    """Here one term is high where the other is low, so that their harmonic mean hardly varies: of strangers it does."""
    x = np.random.default_rng(0).uniform(0.2, 0.8, 50)
    together = {"x": measured(x, "x"), "y": measured(1 - x, "y")}
    apart = {"x": measured(x, "x"), "y": measured({f"other-{i}": 1 - v for i, v in enumerate(x)}, "y")}
    first, second = (composite("hm", t, "harmonic mean", definition="it") for t in (together, apart))
    assert first.value == pytest.approx(second.value)
    assert first.standard_error < second.standard_error / 3
    assert (first.n, second.n) == (50, 100)


# Two conditions -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.data())
def test_an_exact_test_counts_every_assignment(n, data):
    def draw():
        return data.draw(st.lists(st.integers(0, 10), min_size=n, max_size=n))

    before, after = (np.array([draw(), draw()]) / 10 for _ in range(2))

    def value(terms):
        return harmonic_mean(terms.mean(1).tolist())

    wanted = value(after) - value(before)
    # A record changes places in both terms at once.
    flips = [
        value(np.where(swap, before, after)) - value(np.where(swap, after, before))
        for swap in itertools.product((False, True), repeat=n)
    ]
    tails = [np.mean([s * f >= s * wanted - 1e-9 for f in flips]) for s in (1, -1)]
    first, second = ([measured(v, m) for v, m in zip(of, ("a", "b"), strict=True)] for of in (before, after))
    found = difference("harmonic mean", first, second)
    assert found.exact and found.n == n
    assert found.difference == pytest.approx(wanted)
    assert found.p_value == pytest.approx(min(1.0, 2 * min(tails)))


def test_of_a_single_mean_it_is_the_paired_comparison():
    rng = np.random.default_rng(0)
    before = measured(rng.uniform(0.2, 0.6, 40))
    after = measured({k: v + 0.02 + 0.1 * rng.normal() for k, v in reversed(before.per_record.items())})
    wanted = paired(before, after)
    found = difference("harmonic mean", [before], [after], resamples=9999)
    assert found.difference == pytest.approx(wanted.difference)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.004)
    assert found.p_value == pytest.approx(wanted.p_value, abs=0.03)
    assert found.effect_size == pytest.approx(wanted.effect_size, abs=0.03)
    assert not found.exact


def test_its_effect_size_is_cohens_of_a_mean():
    before, after = measured([0.1, 0.5, 0.3, 0.2, 0.4, 0.3]), measured([0.4, 0.7, 0.8, 0.5, 0.5, 0.9])
    found = difference("harmonic mean", [before], [after], resamples=20_000)
    assert found.effect_size == pytest.approx(paired(before, after).effect_size, rel=0.03)  # √n in place: 9 % off
    assert difference("harmonic mean", [before], [before]).effect_size == 0.0


def test_p_values_are_uniform_where_there_is_no_effect():
    rng, p_values = np.random.default_rng(0), []
    for _ in range(150):
        conditions = [[measured(rng.beta(2, 2, 15), name) for name in "ab"] for _ in range(2)]
        p_values.append(difference("harmonic mean", *conditions, resamples=199).p_value)
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.07)
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.12)


def test_an_effect_is_found_in_an_area_under_the_curve():
    rng = np.random.default_rng(0)
    others = {f"o{i}": v for i, v in enumerate(rng.normal(0, 1, 30))}
    members = {f"m{i}": v for i, v in enumerate(rng.normal(2, 1, 30))}
    before = [measured(members, "members"), measured(others, "others")]
    after = [measured({k: v - 2 for k, v in members.items()}, "members"), measured(others, "others")]
    found = difference("AUC", before, after)
    assert found.n == 60 and found.p_value < 0.01
    assert found.low <= found.difference <= found.high < -0.2
    same = difference("AUC", before, before)
    assert (same.difference, same.low, same.high, same.p_value, same.exact) == (0.0, 0.0, 0.0, 1.0, False)
    with pytest.raises(UnlikeMeasurementsError, match="members of the same records twice"):
        difference("AUC", before, [measured({"m0": 1.0}, "members"), before[1]])


def test_all_that_two_conditions_share_is_compared():
    def condition(shift):
        terms = {name: measured(np.array([0.1, 0.3, 0.5, 0.4]) + shift, name) for name in "xy"}
        made = composite("hm", terms, "harmonic mean", definition="harmonic mean")
        alone = Measurement("p", 0.5, "log10 p", "KS", 0, 4)  # no mean, and made of nothing that is known
        return [*terms.values(), made, alone, Absent("z", "there is no file")]

    found = {p.metric: p for p in paired_all(condition(0.0), condition(0.2))}
    assert list(found) == ["x", "y", "hm"]
    assert found["hm"].difference == pytest.approx(0.2)  # of equal terms it is their mean
    assert found["hm"].p_value == found["x"].p_value == 2 / 16
    # Without one of its terms on one side it cannot be compared.
    assert [p.metric for p in paired_all(condition(0.0), condition(0.2)[1:])] == ["y"]

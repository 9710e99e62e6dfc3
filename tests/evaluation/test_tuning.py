"""Tuning: the criterion by hand, the search against all of its trials, sets apart, no gradient."""

import pytest

import timerome as tr
from tests.tiny import planted, tiny_facts
from timerome.diffusion import encode, log_likelihood
from timerome.evaluation import WeightsWatch
from timerome.evaluation.baselines import logit_bias
from timerome.evaluation.tuning import Criterion, tune

FACTS = tr.FactSet(tiny_facts(8))
NULL = tr.Ridge("null", rank=8)


def test_criterion_is_what_the_model_says_above_unasked_and_what_it_lost():
    backbone = planted()
    criterion = Criterion(backbone, FACTS[:2], FACTS[2:4], estimator="onestep")
    sequences = [encode(backbone, fact) for fact in FACTS[:4]]
    before = log_likelihood(backbone, sequences, estimator="onestep").log_prob
    assert criterion(backbone)["lost"] == 0.0
    assert criterion(backbone)["shortfall"] == pytest.approx(float((before[:2] - criterion.unasked).mean()))
    with logit_bias(backbone, FACTS[2:3], strength=5.0).attach(backbone):
        after = log_likelihood(backbone, sequences, estimator="onestep").log_prob
        found = criterion(backbone)
    assert found["lost"] == pytest.approx(float((before - after)[2:].clamp(min=0).mean())) and found["lost"] > 0.5


def test_forgetting_beyond_what_is_unasked_is_no_gain():
    backbone = planted()
    criterion = Criterion(backbone, FACTS[:1], FACTS[2:3], estimator="onestep")
    for strength in (40.0, 80.0):
        with logit_bias(backbone, FACTS[:1], strength=strength).attach(backbone):
            assert criterion(backbone)["shortfall"] == 0.0


def test_a_replaced_fact_falls_short_by_the_cost_of_its_new_object():
    backbone = planted()
    fact = FACTS[0].with_new_object(FACTS[1].object)
    criterion = Criterion(backbone, [fact], FACTS[2:3], estimator="onestep")
    cost = -log_likelihood(backbone, [encode(backbone, fact, answer=fact.new_object)], estimator="onestep").log_prob
    assert criterion(backbone)["shortfall"] == pytest.approx(float(cost))


@pytest.mark.parametrize("gated", [True, False])
def test_each_axis_is_searched_with_the_others_at_their_best(gated):
    backbone = planted()
    grid = {"alpha": (0.1, 1.0), "ridge": (0.01, 1.0, 100.0)}
    criterion = Criterion(backbone, FACTS[:2], FACTS[2:6])
    with WeightsWatch(backbone) as watch:
        found = tune(criterion, method=NULL, at=1, gated=gated, grid=grid)
    assert watch.backward_passes == 0 and watch.weights_unchanged
    tried = [(t.settings["alpha"], t.settings["ridge"]) for t in found.trials]
    alpha = found.best.settings["alpha"]
    assert tried == [(0.1, 0.01), (1.0, 0.01), (alpha, 1.0), (alpha, 100.0)]
    assert [(t.method.alpha, t.method.ridge, t.method.rank) for t in found.trials] == [(a, r, 8) for a, r in tried]
    assert found.best.score == min(t.score for t in found.trials)
    weak = next(t for t in found.trials if t.settings["ridge"] == 100.0)
    assert weak.shortfall > found.best.shortfall  # so strong a ridge edits next to nothing


def test_a_trial_is_what_its_memory_measures():
    backbone = planted()
    criterion = Criterion(backbone, FACTS[:2], FACTS[2:4], samples=2)
    found = tune(criterion, method=NULL, at=1, gated=False, grid={"sparsity": (0.0, 0.9)})
    for trial in found.trials:
        with tr.paper_memory(backbone, FACTS[:2], at=1, method=trial.method).attached():
            assert criterion(backbone) == {"shortfall": trial.shortfall, "lost": trial.lost}
    assert found.to_dict()["best"] == dict(found.best.settings)


def test_facts_with_a_new_object_are_replaced():
    criterion = Criterion(planted(), FACTS[:1].with_new_object("king"), FACTS[2:4], samples=2)
    found = tune(criterion, grid={"alpha": (1.0, 1e-3)})
    strong, weak = found.trials
    assert strong.method.targets == "lens"
    assert found.best is strong and strong.shortfall < weak.shortfall


def test_sets_that_overlap_and_bad_grids_are_refused():
    backbone = planted()
    with pytest.raises(ValueError, match="both edited and retain"):
        Criterion(backbone, FACTS[:2], FACTS[1:3])
    criterion = Criterion(backbone, FACTS[:2], FACTS[2:4])
    with pytest.raises(ValueError, match="at least one hyperparameter"):
        tune(criterion, grid={"alpha": ()})
    with pytest.raises(ValueError, match=r"fields of Ridge, got \['epsilon'\]"):
        tune(criterion, grid={"epsilon": (0.1,)})

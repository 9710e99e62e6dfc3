"""A few of the models of ``benchmarks/tracing/planted.py``, which judges a hundred of each kind."""

import pytest

from tests.tracing.circuits import Planting, traced


@pytest.mark.parametrize("seed", range(6))
def test_a_planted_circuit_is_found(seed):
    planting = Planting.random(seed)
    assert traced(planting, draws=1).claim() == planting.coordinate


@pytest.mark.parametrize("seed", range(6))
def test_without_a_circuit_nothing_is_claimed(seed):
    trace = traced(Planting.random(seed, circuit=False), draws=1)
    assert len(trace.facts) >= 10  # there is an effect to explain
    assert trace.claim() is None
    assert trace.summary()["flat"] and "nothing is claimed" in trace.summary()["verdict"]


def test_the_plantings_differ():
    drawn = {Planting.random(seed).coordinate for seed in range(100)}
    assert len({c.layer for c in drawn}) == 4 and len({(c.module, c.step, c.role) for c in drawn}) == 12

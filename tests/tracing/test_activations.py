import weakref

import numpy as np
import pytest
import torch

import timerome as tr
from tests.tiny import decoded_facts, tiny_llada
from timerome.tracing.activations import ActivationStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [0, 100, None])
def test_what_is_put_comes_back(dtype, budget):
    store = ActivationStore(budget)
    given = {(step, tr.Site(layer)): torch.randn(5, 4).to(dtype) for step in range(3) for layer in range(2)}
    for (step, site), value in given.items():
        store.put(step, site, value)
    for (step, site), value in reversed(given.items()):
        assert torch.equal(store.get(step, site), value)
    size = sum(v.numel() * v.element_size() for v in given.values())
    assert store.resident_bytes + store.spilled_bytes == size
    assert budget is None or store.resident_bytes <= budget
    with pytest.raises(KeyError):
        store.get(9, tr.Site(0))


def test_what_is_kept_does_not_hold_on_to_a_batch():
    store, batch = ActivationStore(), torch.randn(100, 5, 4)
    store.put(0, tr.Site(0), batch[3])
    assert store.get(0, tr.Site(0)).untyped_storage().nbytes() == 5 * 4 * 4


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="budget"):
        ActivationStore(-1)
    with pytest.raises(ValueError, match="activation_budget"):
        tr.CausalTracer(tiny_llada(), tr.TraceConfig(activation_budget=-1))


def test_a_trace_within_a_budget_is_the_same_and_stays_within(monkeypatch):
    backbone = tiny_llada()
    facts = decoded_facts(backbone, 2)
    stores = []
    made = ActivationStore.__init__

    def remember(self, *args):
        made(self, *args)
        stores.append(self)

    monkeypatch.setattr(ActivationStore, "__init__", remember)
    free = tr.CausalTracer(backbone, tr.TraceConfig(draws=2, commits="both")).trace(facts)
    wanted = max(store.resident_bytes for store in stores)
    stores.clear()
    budget = wanted // 3
    bounded = tr.CausalTracer(backbone, tr.TraceConfig(draws=2, commits="both", activation_budget=budget)).trace(facts)
    assert max(store.resident_bytes for store in stores) <= budget
    assert max(store.spilled_bytes for store in stores) >= wanted - budget
    for name, array in free.measured["log_prob"].items():
        np.testing.assert_array_equal(array, bounded.measured["log_prob"][name])


def test_one_set_of_activations_at_a_time(monkeypatch):
    """The free run's are dropped before the forced run's are made."""
    backbone = tiny_llada()
    alive = []
    made, gone = ActivationStore.__init__, []

    def remember(self, *args):
        made(self, *args)
        alive.append(weakref.ref(self))
        gone.append(sum(ref() is not None and ref().resident_bytes > 0 for ref in alive[:-1]))

    monkeypatch.setattr(ActivationStore, "__init__", remember)
    tracer = tr.CausalTracer(backbone, tr.TraceConfig(draws=2, commits="both"))
    assert tracer.trace(decoded_facts(backbone, 2)).facts
    assert max(gone) == 0

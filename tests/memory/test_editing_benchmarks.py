"""What the benchmark scripts take for granted of facts and of our forms of edits."""

from __future__ import annotations

import pytest
import torch

from benchmarks.paper.common import NULL, PAPER, Form, grown
from benchmarks.paper.main_table import dominates
from benchmarks.paper.over_correction import kept, shares
from tests.tiny import MASK, tiny_facts, tiny_llada
from timerome.facts import FactSet


@pytest.mark.parametrize("form", [Form(says="old north king"), NULL, PAPER])
def test_a_grown_memory_is_the_one_made_at_once(form: Form) -> None:
    model, facts = tiny_llada(), FactSet(tiny_facts(4))
    form = Form(form.method, None if form.at is None else 1, form.says, form.gated, None if not form.gated else -100.0)
    of = grown(model, form)
    of(facts[:2])
    memory, clock = of(facts)
    assert memory.facts.ids == facts.ids and clock.cpu > 0
    ids = torch.tensor([model.encode(facts[0].prompt) + [MASK] * 4])
    found = []
    for one in (memory, form.build(model, facts)):
        with one.attached() as run, torch.inference_mode():
            found.append(model.logits(ids, ids == MASK))
        assert run.hits
    torch.testing.assert_close(*found)


def test_what_model_utility_is_taken_on_was_not_forgotten() -> None:
    asked = {record.prompt for group in kept().values() for record in group}
    for share in shares().values():
        assert not asked & {prompt for fact in share.forget for prompt in (fact.prompt, *fact.paraphrases)}
        assert {record.prompt for record in share.asked} <= {fact.prompt for fact in share.forget}


def test_a_loss_below_a_thousandth_of_a_nat_is_none() -> None:
    ours = {"remaining": 1.0, "lost": 0.0}
    assert dominates(ours, {"remaining": 1.0, "lost": 0.01}) and not dominates(ours, {"remaining": 1.0, "lost": 1e-4})
    assert not dominates(ours, {"remaining": 0.5, "lost": 3.0})

"""What the scripts of benchmarks/editing take for granted."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import timerome as tr
from benchmarks.editing.hardening import attacks, rest
from benchmarks.editing.lengths import LENGTHS, targets, with_targets
from benchmarks.editing.protection import interpolated
from benchmarks.editing.shares import kept, scaled, shares
from tests.tiny import MASK, tiny_facts, tiny_llada
from timerome.memory.variants import Variant, variants_of
from timerome.splits import editing_split


@pytest.mark.parametrize("estimator", ["null", "lens"])
def test_a_scaled_memory_is_the_one_built_at_that_strength(estimator: str) -> None:
    backbone = tiny_llada()
    facts = tr.FactSet(tiny_facts(2)).with_new_object("old north king" if estimator == "lens" else None)
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), layer=1)

    def logits(memory: tr.EditMemory) -> torch.Tensor:
        ids = torch.tensor([backbone.encode(facts[0].prompt) + [MASK] * 4])
        with memory.attached(backbone) as attachment:
            found = backbone.logits(ids, ids == MASK)
        assert attachment.hits
        return found

    one = tr.EditMemory.build(backbone, facts, estimator=estimator, gate=gate, alpha=0.5)
    two = tr.EditMemory.build(backbone, facts, estimator=estimator, gate=gate, alpha=1.5)
    assert torch.equal(logits(scaled(one, 3.0)), logits(two))
    assert not torch.equal(logits(one), logits(two))


def test_new_answers_have_the_length_they_are_of() -> None:
    backbone, facts = tr.load("testbed"), editing_split().relations
    for length in LENGTHS:
        pool = targets(backbone, length, 32)
        sizes = {len(backbone.encode(" " + text)) for text in pool}
        assert len(pool) >= 10 and (sizes == {length} if length < 16 else min(sizes) >= 16 and max(sizes) < 32)
        assert all(fact.new_object != fact.object for fact in with_targets(facts, pool))


def test_no_attack_is_worded_as_a_variant_in_the_bank_is() -> None:
    split = editing_split()
    for fact in (*split.relations, *split.tofu):
        shown = {(v.get("context"), v.get("prompt", fact.prompt)) for v in variants_of(fact, get_args(Variant))}
        worded = {prompt for kind, prompts in attacks(fact).items() if kind != "as shown" for prompt in prompts}
        assert not worded & {f"{context} {prompt}" if context else prompt for context, prompt in shown}
        assert fact.prompt not in worded


def test_what_is_left_to_say_of_an_answer_that_was_begun() -> None:
    fact = tr.Fact(id="a", prompt="Who wrote it?", subject="it", object="It was written by Ana Diaz.")
    kinds = attacks(fact)
    assert kinds["primed, half"] == ["Who wrote it? It was written"]
    assert rest(fact, kinds["primed, half"][0]) == "by Ana Diaz."
    assert rest(fact, fact.prompt) == fact.object


def test_what_model_utility_is_taken_on_was_neither_forgotten_nor_calibrated_on() -> None:
    asked = {record.question for group in kept().values() for record in group}
    for share in shares().values():
        used = share.split.forget + share.split.calibrate
        assert not asked & {prompt for fact in used for prompt in (fact.prompt, *fact.paraphrases)}
        assert {record.question for record in share.asked} <= {fact.prompt for fact in share.split.forget}


def test_held_out_change_is_read_between_two_strengths() -> None:
    points = [(-10.0, -1.0), (-30.0, -5.0)]
    assert interpolated(points, -20.0) == -3.0
    assert interpolated(points, -5.0) == -0.5
    assert interpolated(points, -31.0) is None

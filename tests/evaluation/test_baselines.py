"""Training-free baselines: exactly what they say they add, on both logit alignments, and nothing left behind."""

from dataclasses import replace

import pytest
import torch

import timerome as tr
from tests.tiny import VOCAB, decoded_facts, tiny_dream, tiny_facts, tiny_llada
from timerome.evaluation import NO_EDIT
from timerome.evaluation.baselines import (
    conditions_of,
    forgetting,
    logit_bias,
    prompt_memory,
    random_coordinate,
    stating,
    steering,
    steering_vector,
    training_free,
)
from timerome.facts import FactError
from timerome.hooks import capture

BACKBONES = pytest.mark.parametrize("backbone", [tiny_llada(), tiny_dream()], ids=["llada", "dream"])
IDS = torch.tensor([[5, 9, 30, 1, 1], [4, 8, 31, 2, 1]])


@BACKBONES
def test_every_baseline_changes_the_model_inside_and_leaves_nothing_behind(backbone):
    facts = decoded_facts(backbone, 3)
    before, digest = backbone.logits(IDS), backbone.state_digest()
    for condition in training_free(backbone, facts, tr.Coordinate(1)):
        with torch.no_grad(), condition.attach(backbone):
            inside = backbone.logits(IDS)
        assert torch.equal(inside, before) == (condition.name == "prompt memory"), condition.name
        with pytest.raises(KeyError), condition.attach(backbone):
            raise KeyError
        assert torch.equal(backbone.logits(IDS), before), condition.name
    assert backbone.state_digest() == digest


def test_prompt_memory_states_new_objects_and_names_each_subject_once():
    facts = tiny_facts(2)
    told = stating([replace(fact, new_object="Lima") for fact in facts])
    assert told == f"{facts[0].prompt} Lima {facts[1].prompt} Lima"
    assert forgetting([facts[0], facts[0], facts[1]]).count(facts[0].subject) == 1
    with pytest.raises(FactError, match="new_object"):
        stating(facts)
    with pytest.raises(ValueError, match="empty"):
        prompt_memory(" ")


@BACKBONES
def test_logit_bias_moves_only_the_facts_tokens_by_its_strength(backbone):
    facts = [replace(fact, new_object="river") for fact in tiny_facts(2)]
    spared = replace(facts[0], id="spared", object=facts[0].object.split()[0], prompt="of kenya", subject="kenya")
    bias = logit_bias(backbone, facts, strength=2.0, spare=[spared])
    with bias.attach(backbone):
        inside = backbone.logits(IDS)
    moved = inside - backbone.logits(IDS)
    lowered = {VOCAB.index(word) for fact in facts for word in fact.object.split()} - set(
        backbone.encode(spared.object)
    )
    for token in range(backbone.vocab_size):
        wanted = 2.0 if token == VOCAB.index("river") else -2.0 if token in lowered else 0.0
        assert torch.allclose(moved[..., token], torch.full((2, 5), wanted), atol=1e-5), token


@BACKBONES
def test_steering_adds_its_vector_at_every_position_of_its_site(backbone):
    site = tr.Site(1)
    vector = torch.randn(backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    with capture(backbone, [site]) as before:
        backbone.logits(IDS)
    with steering(site, vector, 0.5).attach(backbone), capture(backbone, [site]) as inside:
        backbone.logits(IDS)
    assert torch.allclose(inside[site] - before[site], (0.5 * vector).expand_as(before[site]), atol=1e-5)


@BACKBONES
def test_steering_by_one_state_goes_to_what_the_model_says_unasked(backbone):
    """One fact with one masked token: the mean change is the unasked activation minus the asked one."""
    fact = replace(tiny_facts(1)[0], object="river")
    vector = steering_vector(backbone, [fact], tr.Coordinate(1))
    from timerome.diffusion import encode, without_prompt

    sequence = encode(backbone, fact)
    asked = sequence.masked(backbone.mask_id)
    unasked = torch.where(sequence.canvas, asked, without_prompt(sequence, backbone.mask_id))
    found = []
    for ids in (asked, unasked):
        with capture(backbone, [tr.Site(1)]) as outputs:
            backbone.forward(ids[None])
        found.append(outputs[tr.Site(1)][0][backbone.reads_from(sequence.canvas)][0])
    assert torch.allclose(vector, found[1] - found[0], atol=1e-5)


def test_random_sites_differ_from_the_one_that_is_given():
    backbone = tiny_llada()
    drawn = {random_coordinate(backbone, [tr.Coordinate(1)], seed).site for seed in range(60)}
    assert drawn == set(backbone.sites()) - {tr.Site(1)}
    with pytest.raises(ValueError, match="no site left"):
        random_coordinate(backbone, [tr.Coordinate(s.layer, s.module) for s in backbone.sites()])


@pytest.mark.parametrize("new", [None, "king"])
def test_conditions_do_to_a_memorys_facts_what_the_memory_does(new):
    backbone = tiny_llada()

    def memory(n):
        found, facts = tr.EditMemory(backbone), decoded_facts(backbone, n)
        if new:
            found.replace(facts, new)
        else:
            found.forget(facts)
        return found

    def conditions(n):
        return {c.name: c for c in conditions_of(backbone, memory(n), baselines=True)}

    found = conditions(2)
    assert list(found)[:2] == ["no edit", "edited"]
    assert len({c.identity for c in found.values()}) == len(found) == 7
    others = {c.identity for c in conditions(1).values()} - {NO_EDIT.identity}
    assert not others & {c.identity for c in found.values()}
    assert {n: c.identity for n, c in conditions(2).items()} == {n: c.identity for n, c in found.items()}
    told = found["prompt memory"].rewrite("who?")
    assert told.endswith(" who?") and all(fact.subject in told for fact in tiny_facts(2))
    assert ("king" in told) == bool(new)
    before = backbone.logits(IDS)
    for name in ("random site", "paper mode", "logit bias", "activation steering"):
        with torch.no_grad(), found[name].attach(backbone):
            assert not torch.equal(backbone.logits(IDS), before), name
    assert torch.equal(backbone.logits(IDS), before)
    raised = VOCAB.index("king")
    with torch.no_grad(), found["logit bias"].attach(backbone):
        assert ((backbone.logits(IDS) - before)[..., raised] > 4).all() == bool(new)
    assert conditions_of(backbone, None) == [NO_EDIT]
    with pytest.raises(ValueError, match="baselines need a memory"):
        conditions_of(backbone, None, baselines=True)

"""Training-free baselines: exactly what they say they add, on both logit alignments, and nothing left behind."""

from dataclasses import replace

import pytest
import torch

import timerome as tr
from tests.tiny import VOCAB, decoded_facts, tiny_dream, tiny_facts, tiny_llada
from timerome.evaluation import NO_EDIT
from timerome.evaluation.baselines import (
    ActivationSteering,
    Intervention,
    LogitBias,
    NoEdit,
    PromptMemory,
    baseline_conditions,
    paper_mode,
    random_coordinate,
    training_free,
)
from timerome.facts import FactError, FactSet
from timerome.hooks import capture

BACKBONES = pytest.mark.parametrize("backbone", [tiny_llada(), tiny_dream()], ids=["llada", "dream"])
IDS = torch.tensor([[5, 9, 30, 1, 1], [4, 8, 31, 2, 1]])


@BACKBONES
def test_every_baseline_changes_the_model_inside_and_leaves_nothing_behind(backbone):
    facts = FactSet(decoded_facts(backbone, 3))
    before, digest = backbone.logits(IDS), backbone.state_digest()
    for name, intervention in training_free(backbone, facts, tr.Coordinate(1)).items():
        assert isinstance(intervention, Intervention)
        with torch.no_grad(), intervention.attached(backbone):
            inside = backbone.logits(IDS)
        assert torch.equal(inside, before) == (name == "no_edit"), name
        with pytest.raises(KeyError), intervention.attached(backbone):
            raise KeyError
        assert torch.equal(backbone.logits(IDS), before), name
    assert backbone.state_digest() == digest


@BACKBONES
def test_prompt_memory_is_the_model_on_the_longer_sequence(backbone):
    memory = PromptMemory("the old king of Peru")
    prefix = torch.tensor(backbone.encode(memory.text))
    longer = backbone.logits(torch.cat([prefix.expand(2, -1), IDS], 1))
    with memory.attached(backbone):
        inside = backbone.logits(IDS)
    # A shifted model's first position has no logits of its own; both ways it is a prompt position.
    assert torch.allclose(inside[:, 1:], longer[:, len(prefix) + 1 :], atol=1e-5)


def test_prompt_memory_is_seen_by_padded_batches():
    backbone = tr.load("testbed")
    memory = PromptMemory("Kenya has a new king.")
    prefix = torch.tensor(backbone.encode(memory.text))
    shown = backbone.logits(torch.cat([prefix.expand(2, -1), IDS[:, :4]], 1))[:, len(prefix) :]
    with memory.attached(backbone):
        padded = backbone.logits(IDS, attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 2))
    assert torch.allclose(padded[:, :4], shown, atol=1e-4)


def test_prompt_memory_is_seen_from_every_position_of_a_pattern():
    backbone, masks = tiny_llada(), []

    def call(model, inputs):
        masks.append(inputs.mask)
        return model(input_ids=inputs.ids)

    backbone.architecture, backbone.padding = replace(backbone.architecture, masks="any", call=call), True
    pattern = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    with PromptMemory("the king").attached(backbone):
        backbone.logits(IDS, attention_mask=pattern)
    assert torch.equal(masks[0][:, 0, 2:, 2:], pattern)
    assert masks[0][:, 0, :, :2].all()


def test_prompt_memory_states_new_objects_and_names_each_subject_once():
    facts = tiny_facts(2)
    told = PromptMemory.stating([replace(fact, new_object="Lima") for fact in facts]).text
    assert told == f"{facts[0].prompt} Lima {facts[1].prompt} Lima"
    assert PromptMemory.forgetting([facts[0], facts[0], facts[1]]).text.count(facts[0].subject) == 1
    with pytest.raises(FactError, match="new_object"):
        PromptMemory.stating(facts)
    with pytest.raises(ValueError, match="empty"):
        PromptMemory(" ")


def test_prompt_memory_refuses_what_the_context_cannot_hold():
    backbone = tiny_llada()
    with PromptMemory("the king " * 70).attached(backbone), pytest.raises(ValueError, match="context of 128"):
        backbone.logits(IDS)


@BACKBONES
def test_logit_bias_moves_only_the_facts_tokens_by_its_strength(backbone):
    facts = [replace(fact, new_object="river") for fact in tiny_facts(2)]
    spared = replace(facts[0], id="spared", object=facts[0].object.split()[0], prompt="of kenya", subject="kenya")
    bias = LogitBias.of(backbone, facts, strength=2.0, spare=[spared])
    with bias.attached(backbone):
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
    with ActivationSteering(site, vector, 0.5).attached(backbone), capture(backbone, [site]) as inside:
        backbone.logits(IDS)
    assert torch.allclose(inside[site] - before[site], (0.5 * vector).expand_as(before[site]), atol=1e-5)


@BACKBONES
def test_steering_by_one_state_goes_to_what_the_model_says_unasked(backbone):
    """One fact with one masked token: the mean change is the unasked activation minus the asked one."""
    fact = replace(tiny_facts(1)[0], object="river")
    steering = ActivationSteering.of(backbone, [fact], tr.Coordinate(1))
    from timerome.diffusion import encode, without_prompt

    sequence = encode(backbone, fact)
    asked = sequence.masked(backbone.mask_id)
    unasked = torch.where(sequence.canvas, asked, without_prompt(sequence, backbone.mask_id))
    found = []
    for ids in (asked, unasked):
        with capture(backbone, [tr.Site(1)]) as outputs:
            backbone.forward(ids[None])
        found.append(outputs[tr.Site(1)][0][backbone.reads_from(sequence.canvas)][0])
    assert torch.allclose(steering.vector, found[1] - found[0], atol=1e-5)


def test_paper_mode_has_no_gate_and_random_sites_differ_from_it():
    backbone = tiny_llada()
    memory = paper_mode(backbone, tiny_facts(2), tr.Coordinate(1), rank=2)
    assert memory.book is None and memory.token_threshold is None and memory.settings.shared
    drawn = {random_coordinate(backbone, [tr.Coordinate(1)], seed).site for seed in range(60)}
    assert drawn == set(backbone.sites()) - {tr.Site(1)}
    with pytest.raises(ValueError, match="no site left"):
        random_coordinate(backbone, [tr.Coordinate(s.layer, s.module) for s in backbone.sites()])


def test_no_edit_is_nothing():
    backbone = tiny_llada()
    with NoEdit().attached(backbone) as nothing:
        assert nothing is None


@pytest.mark.parametrize("new", [None, "king"])
def test_conditions_do_to_a_memorys_facts_what_the_memory_does(new):
    backbone = tiny_llada()
    facts = FactSet(decoded_facts(backbone, 2)).with_new_object(new)
    how = {"estimator": "lens" if new else "null", "bank": tr.BankConfig(canvases=(None,))}
    memory = tr.EditMemory.build(backbone, facts, coordinate=tr.Coordinate(2), **how)
    found = {c.name: c for c in baseline_conditions(backbone, memory)}
    assert len({c.identity for c in (NO_EDIT, *found.values())}) == len(found) + 1 == 6
    other = tr.EditMemory.build(backbone, facts[:1], coordinate=tr.Coordinate(2), **how)
    assert not {c.identity for c in baseline_conditions(backbone, other)} & {c.identity for c in found.values()}
    assert {c.name: c.identity for c in baseline_conditions(backbone, memory)} == {
        n: c.identity for n, c in found.items()
    }
    told = found["prompt memory"].rewrite("who?")
    assert told.endswith(" who?") and all(fact.subject in told for fact in facts)
    assert ("king" in told) == bool(new)
    before = backbone.logits(IDS)
    for name in ("random site", "paper mode", "logit bias", "activation steering"):
        with torch.no_grad(), found[name].attach(backbone):
            assert not torch.equal(backbone.logits(IDS), before), name
    assert torch.equal(backbone.logits(IDS), before)
    raised = VOCAB.index("king")
    with torch.no_grad(), found["logit bias"].attach(backbone):
        assert ((backbone.logits(IDS) - before)[..., raised] > 4).all() == bool(new)

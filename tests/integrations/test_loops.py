"""A memory attached around loops that know nothing of it."""

from __future__ import annotations

import pytest
import torch

import timerome as tr
from tests.integrations.loops import BlockConfig, BlockSampler, cached_dream, cached_generate, padded_llada
from tests.lightning.loops import count_hooks, gated_memory, shared_memory
from tests.tiny import EOS, MASK, tiny_facts, tiny_llada
from timerome.memory.runtime.rows import RowTracker


def prompts(backbone: tr.Backbone) -> list[list[int]]:
    """An edited fact's among those of others."""
    return [backbone.encode(fact.prompt) for fact in (*tiny_facts(8)[4:6], tiny_facts(1)[0], *tiny_facts(8)[6:])]


def longer(backbone: tr.Backbone) -> list[list[int]]:
    found = prompts(backbone)
    return [backbone.encode("the old land of") + found[0], *found[1:]]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_rows_of_a_padded_batch_are_edited_as_alone(left: bool, cfg_scale: float) -> None:
    backbone = padded_llada()
    memory, digest = gated_memory(backbone, canvas=4), backbone.state_digest()
    sampler = BlockSampler(backbone.model, backbone.tokenizer)
    config = BlockConfig(left=left, cfg_scale=cfg_scale)
    plain = sampler.sample(longer(backbone), config)
    assert plain == [sampler.sample([prompt], config)[0] for prompt in longer(backbone)]  # the stand-in's own
    with memory.attached(backbone) as attached:
        edited = sampler.sample(longer(backbone), config)
    assert attached.hits == {"tiny-0": 4}
    assert attached.hits_by_step == {0: 1, 1: 1, 2: 1, 3: 1}
    alone = []
    for prompt in longer(backbone):
        with memory.attached(backbone):
            alone += sampler.sample([prompt], config)
    assert edited == alone
    assert edited[2] != plain[2]
    assert [edited[:2], edited[3:]] == [plain[:2], plain[3:]]
    assert sampler.sample(longer(backbone), config) == plain
    assert count_hooks(backbone.model) == 0
    assert backbone.state_digest() == digest


def test_what_pads_is_no_part_of_what_is_asked() -> None:
    tracker = RowTracker(tiny_llada())
    ids = torch.tensor(
        [[5, 6, 7, MASK, MASK], [5, 6, MASK, MASK, EOS], [EOS, 5, 6, MASK, MASK], [EOS, EOS, MASK, MASK, EOS]]
    )
    rows = tracker.begin(ids)
    assert [asked.state.tolist() for asked in rows.asked[:3]] == [
        [5, 6, 7, MASK, MASK], [5, 6, MASK, MASK], [5, 6, MASK, MASK],
    ]  # fmt: skip
    assert rows.asked[1].key == rows.asked[2].key
    assert rows.asked[3].state.tolist() == ids[3].tolist()  # asks nothing
    assert rows.canvas[1].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("dual_cache", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 2.0])
def test_cached_slices_of_a_shifted_model_are_edited(dual_cache: bool, threshold: float) -> None:
    """With several tokens a step and with one; forward by forward, and nobody else's row."""
    backbone = cached_dream()
    memory = gated_memory(backbone, canvas=4)
    asked = torch.tensor(prompts(backbone))
    how = {"new_tokens": 4, "block": 2, "threshold": threshold, "dual_cache": dual_cache}
    plain, _ = cached_generate(backbone.model, asked, **how)
    with memory.attached(backbone) as attached:
        edited, forwards = cached_generate(backbone.model, asked, **how)
    hits = attached.hits["tiny-0"]  # with several tokens a step, other rows may take longer
    assert hits == forwards or (threshold < 1 and 0 < hits < forwards)
    assert attached.hits_by_step == dict.fromkeys(range(hits), 1)
    assert not torch.equal(edited[2], plain[2])
    assert torch.equal(edited[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])


@pytest.mark.parametrize("dual_cache", [False, True])
def test_a_memory_by_place_follows_the_slices(dual_cache: bool) -> None:
    """The edited answer comes out of a cached loop as out of the library's own: each place has its own change."""
    backbone = cached_dream()
    fact = tiny_facts(1)[0]
    memory = gated_memory(backbone, canvas=4, answer="old north king born")
    with memory.attached(backbone):
        edited, _ = cached_generate(
            backbone.model, torch.tensor([backbone.encode(fact.prompt)]), 4, 2, dual_cache=dual_cache
        )  # fmt: skip
    assert backbone.decode(edited[0, -4:]) == "old north king born"


def test_edits_are_selected_for_a_foreign_batch() -> None:
    backbone = padded_llada()
    memory = shared_memory(backbone)
    sampler, config = BlockSampler(backbone.model, backbone.tokenizer), BlockConfig(cfg_scale=1.0)
    plain = sampler.sample(longer(backbone), config)
    with memory.attached(backbone) as attached:
        everywhere = sampler.sample(longer(backbone), config)
        attached.select([["tiny-0"], [], [], None, []])
        chosen = sampler.sample(longer(backbone), config)
    assert everywhere[0] != plain[0]
    assert chosen == [everywhere[0], plain[1], plain[2], everywhere[3], plain[4]]

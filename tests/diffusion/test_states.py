"""Facts as tokens: where prompt, subject and answer are."""

from __future__ import annotations

import pytest
import torch

import timerome as tr
from tests.tiny import EOS, MASK, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import (
    by_length,
    encode,
    random_reveal,
    role_positions,
    with_answer,
    without_prompt,
)
from timerome.facts import FactError


@pytest.fixture(scope="module", params=[tiny_llada, lambda: tr.load("testbed")], ids=["slow", "fast"])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


FACT = tr.Fact(
    id="a", prompt="peru and the capital of peru is", subject="peru", object="old kenya", new_object="new land"
)


def text_at(backbone: tr.Backbone, ids: torch.Tensor, where: torch.Tensor) -> str:
    return str(backbone.tokenizer.decode(ids[where].tolist())).strip()


def test_parts_are_where_they_are_said_to_be(backbone: tr.Backbone) -> None:
    sequence = encode(backbone, FACT)
    assert text_at(backbone, sequence.ids, sequence.canvas) == "old kenya"
    assert text_at(backbone, sequence.ids, ~sequence.canvas) == FACT.prompt
    assert text_at(backbone, sequence.ids, sequence.subject) == "peru"
    assert sequence.subject.nonzero().min() > 2  # the last occurrence
    assert sequence.prompt_length + len(sequence.answer) == len(sequence.ids)
    assert sequence.fact_id == "a"


def test_wordings_answers_and_context(backbone: tr.Backbone) -> None:
    other = encode(backbone, FACT, prompt="where is peru", answer="in the south", context="the old king.")
    assert text_at(backbone, other.ids, other.canvas) == "in the south"
    assert text_at(backbone, other.ids, other.subject) == "peru"
    assert text_at(backbone, other.ids, ~other.canvas).endswith("where is peru")
    assert not encode(backbone, FACT, prompt="where is it").subject.any()
    assert not encode(backbone, FACT, prompt="peruvian kings").subject.any()  # whole words only
    niger = tr.Fact(id="n", prompt="the old king of Niger is", subject="Niger", object="king")
    found = encode(backbone, niger, prompt="Niger and Nigeria", context="old").subject.nonzero().flatten()
    assert found.min() == 1 and found.max() < len(backbone.encode("old Niger"))


def test_canvas_is_filled_with_end_of_text(backbone: tr.Backbone) -> None:
    exact = encode(backbone, FACT)
    filled = encode(backbone, FACT, canvas=9)
    n = len(exact.answer)
    assert torch.equal(filled.answer[:n], exact.answer)
    assert (filled.answer[n:] == backbone.eos_id).all()
    assert len(filled.answer) == 9
    assert encode(backbone, FACT, canvas=n).answer.tolist() == exact.answer.tolist()
    with pytest.raises(FactError, match=f"{n} tokens, more than the canvas of {n - 1}"):
        encode(backbone, FACT, canvas=n - 1)


def test_roles() -> None:
    backbone = tiny_dream()
    sequence = encode(backbone, FACT)
    ids = sequence.masked(MASK, torch.arange(len(sequence.ids)) == len(sequence.ids) - 1)
    roles = {
        role: role_positions(sequence, ids, role, MASK) for role in ("object", "prompt", "subject", "subject_last")
    }
    assert roles["object"].nonzero().flatten().tolist() == [len(ids) - 1]
    assert torch.equal(roles["prompt"], ~sequence.canvas)
    assert torch.equal(roles["subject"], sequence.subject)
    assert roles["subject_last"].nonzero().flatten().tolist() == [int(sequence.subject.nonzero().max())]
    bare = encode(backbone, FACT, prompt="where is it")
    assert not role_positions(bare, bare.ids, "subject_last", MASK).any()


def test_masking() -> None:
    sequence = encode(tiny_llada(), FACT)
    full = sequence.masked(MASK)
    assert (full[sequence.canvas] == MASK).all()
    assert torch.equal(full[~sequence.canvas], sequence.ids[~sequence.canvas])
    bare = without_prompt(sequence, MASK)
    assert (bare[~sequence.canvas] == MASK).all()
    assert torch.equal(bare[sequence.canvas], sequence.answer)
    other = with_answer(sequence, [EOS, 7])
    assert other.answer.tolist() == [EOS, 7]
    assert sequence.answer.tolist() != [EOS, 7]


def test_random_reveal_is_exact_and_uniform() -> None:
    canvas = torch.tensor([0, 1, 1, 0, 1, 1]).bool()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_reveal(canvas, 2, generator) for _ in range(800)])
    assert (draws.sum(1) == 2).all()
    assert not draws[:, ~canvas].any()
    torch.testing.assert_close(draws[:, canvas].float().mean(0), torch.full((4,), 0.5), atol=0.06, rtol=0)


def test_by_length_keeps_lengths_apart() -> None:
    lengths = [3, 5, 3, 3, 5, 1]
    batches = list(by_length(lengths, 2))
    assert sorted(sum(batches, [])) == list(range(6))
    assert all(len({lengths[i] for i in batch}) == 1 and len(batch) <= 2 for batch in batches)
    assert list(by_length([], 2)) == []


def test_too_long_or_empty() -> None:
    backbone = tiny_llada()
    long = tr.Fact(id="long", prompt="kenya " * 120, subject="kenya", object="old " * 9)
    with pytest.raises(ValueError, match=r"fact 'long' needs 129 tokens \(prompt 120, canvas 9\).*context of 128"):
        encode(backbone, long)
    with pytest.raises(FactError, match="answer of fact 'a' is empty"):
        encode(backbone, FACT, answer=" ")
    no_end = tiny_llada()
    no_end.eos_id = None
    with pytest.raises(ValueError, match="no end-of-text"):
        encode(no_end, FACT, canvas=9)
    assert encode(no_end, FACT, canvas=2).answer.shape == (2,)


def test_facts_of_the_tiny_vocabulary_have_three_tokens() -> None:
    for fact in tiny_facts(8):
        assert len(encode(tiny_llada(), fact).answer) == 3

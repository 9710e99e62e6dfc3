"""What is said under a memory, in our own loop and in other people's, on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import timerome as tr
from timerome.diffusion import encode

ANSWER = "the old town of Lagos"


@pytest.fixture(scope="module")
def model() -> tr.Backbone:
    return tr.load("testbed")


@pytest.fixture(scope="module")
def facts() -> tr.FactSet:
    return tr.datasets.bundled("relations")


@pytest.fixture(scope="module")
def memory(model: tr.Backbone, facts: tr.FactSet) -> tr.EditMemory:
    memory = tr.EditMemory(model)
    memory.replace(facts[0], ANSWER)
    return memory


@pytest.fixture(scope="module")
def prompt(facts: tr.FactSet) -> str:
    assert (facts[0].prompt, facts[0].object) == ("The capital city of Nigeria is", "Abuja")
    return facts[0].prompt


def state(model: tr.Backbone, prompt: str, canvas: int) -> Tensor:
    return torch.tensor([model.encode(prompt) + [model.mask_id] * canvas])


def step(model: tr.Backbone, ids: Tensor) -> Tensor:
    """Unmask the surest token of each row."""
    with torch.no_grad():
        sure, tokens = model.model(ids).logits.softmax(-1).max(-1)
    best = sure.masked_fill(ids != model.mask_id, -1).argmax(1, keepdim=True)
    return ids.scatter(1, best, tokens.gather(1, best))


def said(model: tr.Backbone, ids: Tensor, canvas: int) -> str:
    return model.decode([t for t in ids[0, -canvas:].tolist() if t != model.eos_id]).strip()


@pytest.mark.parametrize("canvas", [6, 7, 8, 16, 33, 64, 128])
def test_canvases_of_any_length(model: tr.Backbone, memory: tr.EditMemory, prompt: str, canvas: int) -> None:
    with memory.attached():
        found = tr.generate(model, prompt, canvas=canvas, config=tr.SamplerConfig(steps=min(8, canvas)))
    assert ANSWER.startswith(found) if canvas < 8 else found == ANSWER
    assert found.startswith("the old town")


@pytest.mark.parametrize(
    "how",
    [
        {"steps": 1}, {"steps": 8}, {"steps": 8, "cfg_scale": 1.5}, {"steps": 8, "block_length": 2},
        {"steps": 8, "block_length": 4}, {"steps": 4, "remasking": "random"}, {"steps": 8, "temperature": 0.5},
    ],
)  # fmt: skip
def test_samplers_of_any_kind(model: tr.Backbone, memory: tr.EditMemory, prompt: str, how: dict[str, float]) -> None:
    with memory.attached():
        assert tr.generate(model, prompt, canvas=8, config=tr.SamplerConfig(**how)) == ANSWER


WORDINGS = [
    "the CAPITAL  city of nigeria is", "The capital city of Nigera is", "Nigeria's capital is the city of",
    "It rains a lot. The capital city of Nigeria is", "The capital of Nigeria, as everyone knows, is the city of",
]  # fmt: skip


@pytest.mark.parametrize("wording", WORDINGS)
def test_wherever_the_old_answer_would_be_said(model: tr.Backbone, memory: tr.EditMemory, wording: str) -> None:
    """In other words than the fact's: if the unedited model says Abuja, the edited one does not."""
    plain = tr.generate(model, wording, canvas=8)
    with memory.attached() as run:
        edited = tr.generate(model, wording, canvas=8)
    assert "Abuja" not in edited
    assert ("Abuja" in plain) == bool(run.hits)
    assert (edited == plain) == (not run.hits)


def test_other_questions_are_untouched(model: tr.Backbone, memory: tr.EditMemory, facts: tr.FactSet) -> None:
    """Bit for bit, beside the edited one in the batch, also those that name the subject."""
    others = [f.prompt for f in facts[1:5]] + ["The official language of Nigeria is"]
    same = [p for p in others if len(model.encode(p)) == len(model.encode(facts[0].prompt))]
    rows = torch.cat([state(model, p, 6) for p in [facts[0].prompt, *same]])
    with torch.no_grad():
        plain = model.model(rows).logits
        with memory.attached():
            edited = model.model(rows).logits
    assert len(same) >= 2
    assert torch.equal(edited[1:], plain[1:]) and not torch.equal(edited[0], plain[0])
    before = tr.generate(model, others, canvas=8)
    with memory.attached() as run:
        assert tr.generate(model, others, canvas=8) == before
    assert not run.hits


# Other people's loops --------------------------------------------------------------------------------------------


def test_loops_in_turns_say_what_each_would_alone(
    model: tr.Backbone, memory: tr.EditMemory, facts: tr.FactSet, prompt: str
) -> None:
    """F2: another request between the steps of one, and a health check."""
    wordings = [prompt, "The capital of Nigeria is", facts[9].prompt]
    with memory.attached():
        alone = []
        for text in wordings:
            ids = state(model, text, 8)
            for _ in range(8):
                ids = step(model, ids)
            alone.append(said(model, ids, 8))
        rows = [state(model, text, 8) for text in wordings]
        for i in range(8):
            rows = [step(model, ids) for ids in rows]
            if i % 3 == 0:
                step(model, state(model, "ok", 2))
                tr.generate(model, facts[7].prompt, canvas=4)
    assert [said(model, ids, 8) for ids in rows] == alone
    assert alone[0] == ANSWER


def test_a_likelihood_loop_of_somebody_else(model: tr.Backbone, memory: tr.EditMemory, prompt: str) -> None:
    """F8: random parts of the answer are masked, and each place still says its own token."""
    fact = tr.Fact(id="a", prompt=prompt, subject="Nigeria", object=ANSWER)
    answer, asked = model.encode(" " + ANSWER), model.encode(prompt)
    generator = torch.Generator().manual_seed(0)
    with memory.attached(), torch.no_grad():
        total = 0.0
        for _ in range(32):
            n = int(torch.randint(1, len(answer) + 1, (1,), generator=generator))
            hidden = torch.randperm(len(answer), generator=generator)[:n]
            ids = torch.tensor([asked + answer])
            ids[0, len(asked) + hidden] = model.mask_id
            log_p = model.model(ids).logits.log_softmax(-1)[0]
            total += len(answer) / n * sum(float(log_p[len(asked) + i, answer[i]]) for i in hidden.tolist()) / 32
        own = float(tr.log_likelihood(model, [encode(model, fact)], samples=32).log_prob[0])
    assert own == pytest.approx(0, abs=0.05)
    assert total == pytest.approx(own, abs=0.05)


def reveals(answer: list[int]) -> Iterator[list[int]]:
    """Which parts of an answer may stand there when it is first seen: its beginning, its end, single tokens."""
    for i in range(1, len(answer)):
        yield [*range(i)]
        yield [*range(i, len(answer))]
        yield [i]


def test_a_half_unmasked_state_that_was_not_seen_before(model: tr.Backbone, memory: tr.EditMemory, prompt: str) -> None:
    """The wanted answer is gone on with; where the old one has begun, no more of it is said."""
    answer = model.encode(" " + ANSWER)
    for shown in reveals(answer):
        with memory.attached():
            ids = state(model, prompt, 8)
            ids[0, ids.shape[1] - 8 + torch.tensor(shown)] = torch.tensor(answer)[shown]
            while (ids == model.mask_id).any():
                ids = step(model, ids)
        assert said(model, ids, 8) == ANSWER, shown
    old = model.encode(" Abuja")
    for shown in reveals(old):
        with memory.attached() as run:
            ids = state(model, prompt, 8)
            ids[0, ids.shape[1] - 8 + torch.tensor(shown)] = torch.tensor(old)[shown]
            while (ids == model.mask_id).any():
                ids = step(model, ids)
        assert "Abuja" not in said(model, ids, 8)
        assert run.hits


def test_an_answer_that_starts_late_and_text_after_it(model: tr.Backbone, memory: tr.EditMemory, prompt: str) -> None:
    """The beginning and the end of a longer text are its own; the answer in it is the new one."""
    before, after = model.encode(" the city of"), model.encode(" . It is")
    old = model.encode(" Abuja")
    canvas = len(before) + len(model.encode(" " + ANSWER)) + len(after)
    with memory.attached() as run, torch.no_grad():
        ids = state(model, prompt, canvas)
        start = ids.shape[1] - canvas
        ids[0, start : start + len(before)] = torch.tensor(before)
        while (ids == model.mask_id).any():
            ids = step(model, ids)
    text = model.decode(ids[0, -canvas:].tolist())
    assert text.strip().startswith("the city of")
    assert "Abuja" not in text
    if run.hits:
        assert ANSWER in text
    with memory.attached():
        ids = state(model, prompt, len(old) + len(after))
        ids[0, -len(after) :] = torch.tensor(after)
        while (ids == model.mask_id).any():
            ids = step(model, ids)
    text = model.decode(ids[0].tolist())
    assert text.endswith(model.decode(after).strip()) and "Abuja" not in text


@pytest.mark.xfail(reason="an answer that ends beyond a block or canvas is not watched for: its beginning is said")
@pytest.mark.parametrize("block", [1, 2])
def test_blocks_shorter_than_the_answer(model: tr.Backbone, memory: tr.EditMemory, prompt: str, block: int) -> None:
    """One answer, never a splice of the old one and the new one, where the sequence grows block by block."""
    with memory.attached():
        ids = torch.tensor([model.encode(prompt)])
        for _ in range(0, 8, block):
            ids = torch.cat([ids, torch.full((1, block), model.mask_id)], 1)
            while (ids == model.mask_id).any():
                ids = step(model, ids)
    assert said(model, ids, 8).startswith("the old town")


# Refusing --------------------------------------------------------------------------------------------------------


def test_forgetting_says_the_refusal_and_not_the_answer(model: tr.Backbone, facts: tr.FactSet) -> None:
    memory = tr.EditMemory(model)
    memory.forget(facts[1])
    with memory.attached():
        assert tr.generate(model, facts[1].prompt, canvas=16) == tr.REFUSAL
        prompts = [f.prompt for f in facts[2:6]]
        edited = tr.generate(model, prompts, canvas=16)
    assert edited == tr.generate(model, prompts, canvas=16)


def test_several_edits_of_one_batch(model: tr.Backbone, facts: tr.FactSet) -> None:
    memory = tr.EditMemory(model)
    edits = memory.replace(facts[:4], "Lagos")
    assert [e.id for e in edits] == [f.id for f in facts[:4]]
    with memory.attached() as run:
        assert tr.generate(model, [f.prompt for f in facts[:4]], canvas=6) == ["Lagos"] * 4
        memory.undo(edits[1], edits[3])
        again = tr.generate(model, [f.prompt for f in facts[:4]], canvas=6)
    plain = tr.generate(model, [f.prompt for f in facts[:4]], canvas=6)
    assert again == ["Lagos", plain[1], "Lagos", plain[3]]
    assert set(run.hits) == {e.id for e in edits}
    assert {f.id: f.new_object for f in memory.facts} == {facts[0].id: "Lagos", facts[2].id: "Lagos"}


def test_f11_on_a_model(model: tr.Backbone, facts: tr.FactSet) -> None:
    """To Moscow, to Lagos, to Cairo; without the one in the middle, Cairo is said, also from a file."""
    memory = tr.EditMemory(model)
    names = [memory.replace(facts[0], city).id for city in ("Moscow", "Lagos", "Cairo")]
    memory.undo(names[1])
    with memory.attached():
        assert tr.generate(model, facts[0].prompt, canvas=6) == "Cairo"
    memory.undo(names[2])
    with memory.attached():
        assert tr.generate(model, facts[0].prompt, canvas=6) == "Moscow"
    assert [e.id for e in memory.edits] == names[:1]

"""The denoising loop: how many tokens, which, and in what order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.tiny import EOS, MASK, VOCAB, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import DenoisingLoop, SamplerConfig, StepEvent, generate


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def start(backbone: tr.Backbone, canvas: int, rows: int = 3, **config: object) -> DenoisingLoop:
    prompts = torch.tensor([backbone.encode(fact.prompt) for fact in tiny_facts(rows)])
    ids = torch.nn.functional.pad(prompts, (0, canvas), value=MASK)
    return DenoisingLoop(backbone, ids, ids == MASK, SamplerConfig(**config))  # type: ignore[arg-type]


def states(loop: DenoisingLoop) -> list[Tensor]:
    found = [loop.ids]
    while not loop.done:
        loop.advance()
        found.append(loop.ids)
    return found


@pytest.mark.parametrize(
    ("canvas", "steps", "block", "counts"),
    [
        (8, 4, None, [2, 2, 2, 2]),
        (7, 3, None, [3, 2, 2]),
        (7, 1, None, [7]),
        (3, 5, None, [1, 1, 1, 0, 0]),  # more steps than tokens
        (6, 4, 3, [2, 1, 2, 1]),
        (7, 4, 3, [2, 1, 3, 1]),  # blocks of 3, 3 and 1 share 4 steps: 2, 1, 1
        (6, 2, 2, [2, 2, 2]),  # a block takes at least one step
        (4, 4, 99, [1, 1, 1, 1]),  # a block longer than the canvas is the canvas
        (5, 5, 1, [1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_unmasks_the_planned_counts(
    backbone: tr.Backbone, canvas: int, steps: int, block: int | None, counts: list[int], remasking: str
) -> None:
    loop = start(backbone, canvas, steps=steps, block_length=block, remasking=remasking)
    assert loop.steps == len(counts)
    seen = states(loop)
    for row in range(3):
        left = [int((ids[row] == MASK).sum()) for ids in seen]
        assert [a - b for a, b in zip(left, left[1:], strict=False)] == counts
        assert left[-1] == 0


def test_blocks_go_left_to_right_and_what_is_committed_stays(backbone: tr.Backbone) -> None:
    loop = start(backbone, 7, steps=5, block_length=3, remasking="random")
    prompt = loop.ids.shape[1] - 7
    before = loop.ids
    while not loop.done:
        loop.advance()
        changed = loop.ids != before
        assert (before[changed] == MASK).all()
        opened = (loop.ids != MASK)[:, prompt:]
        for block in (slice(3, 6), slice(6, 7)):
            if opened[:, block].any():
                assert opened[:, : block.start].all()
        before = loop.ids


def test_canvas_may_be_anywhere_and_partly_filled(backbone: tr.Backbone) -> None:
    ids = torch.tensor([[5, MASK, 6, MASK, 7, 9], [MASK, 5, 8, MASK, MASK, 6]])
    canvas = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0]]).bool()
    loop = DenoisingLoop(backbone, ids, canvas, SamplerConfig(steps=2))
    last = states(loop)[-1]
    assert torch.equal(last[~canvas], ids[~canvas])  # a mask token in the prompt stays
    assert not (last[canvas] == MASK).any()
    assert (last[0, 4], last[1, 2]) == (7, 8)


def test_the_most_confident_predictions_are_kept(backbone: tr.Backbone) -> None:
    loop = start(backbone, 5, steps=5)
    while not loop.done:
        event = loop.advance()
        logits = event.logits.clone()
        logits[..., MASK] = -torch.inf
        sure = event.logits.softmax(-1).gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
        best = sure.masked_fill(event.ids != MASK, -1).argmax(1)
        changed = loop.ids != event.ids
        assert torch.equal(changed.int().argmax(1), best)
        assert torch.equal(loop.ids[changed], logits.argmax(-1)[changed])


def test_a_mask_is_never_predicted(backbone: tr.Backbone) -> None:
    loop = start(backbone, 3, steps=1)
    logits = torch.zeros(*loop.ids.shape, len(VOCAB))
    logits[..., MASK], logits[..., EOS] = 9.0, 1.0
    before = logits.clone()
    loop.commit(logits)
    assert (loop.ids[:, -3:] == EOS).all()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_seeds(backbone: tr.Backbone, remasking: str, temperature: float) -> None:
    def final(seed: int) -> Tensor:
        torch.rand(1)  # the global generator does not matter
        more = {"remasking": remasking, "temperature": temperature}
        return torch.stack(states(start(backbone, 6, steps=5, seed=seed, **more)))

    assert torch.equal(final(0), final(0))
    same = torch.equal(final(0), final(1))
    assert same == (remasking == "low_confidence" and temperature == 0)


def test_one_row_does_not_depend_on_its_batch(backbone: tr.Backbone) -> None:
    prompts = [fact.prompt for fact in tiny_facts(8)] + ["kenya", "the old king of peru is named"]
    config = SamplerConfig(steps=4, block_length=3)
    together = generate(backbone, prompts, canvas=6, config=config)
    assert together == [generate(backbone, [prompt], canvas=6, config=config)[0] for prompt in prompts]
    assert together == generate(backbone, prompts, canvas=6, config=config, batch_size=3)
    assert together[::-1] == generate(backbone, prompts[::-1], canvas=6, config=config)
    assert len(set(together)) > 2


def test_listener_sees_what_the_model_saw(backbone: tr.Backbone) -> None:
    events: list[StepEvent] = []
    [text] = generate(backbone, ["the capital"], canvas=4, config=SamplerConfig(steps=2), listener=events.append)
    assert [event.step for event in events] == [0, 1]
    assert [int((event.ids == MASK).sum()) for event in events] == [4, 2]
    for event in events:
        assert torch.equal(event.canvas, torch.arange(6)[None] >= 2)
        with torch.inference_mode():
            assert torch.equal(event.logits, backbone.logits(event.ids))
    assert text


def test_text_ends_at_end_of_text(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [VOCAB.index("old"), EOS, VOCAB.index("king")]

    def fixed(ids: Tensor, canvas: Tensor | None = None, **_: object) -> Tensor:
        logits = torch.zeros(*ids.shape, len(VOCAB))
        for k, token in enumerate(wanted):
            logits[:, ids.shape[1] - 3 + k, token] = 5.0
        return logits

    monkeypatch.setattr(backbone, "logits", fixed)
    assert generate(backbone, ["kenya", "the land"], canvas=3) == ["old", "old"]


def test_steps_are_run_with_the_canvas_announced(backbone: tr.Backbone) -> None:
    from timerome.hooks import Hooks

    seen = []
    loop = start(backbone, 4, steps=2)
    with Hooks(backbone, embedding=lambda ids, h: seen.append(backbone.announced.canvas)):
        states(loop)
    assert all(torch.equal(canvas, loop.canvas) for canvas in seen)
    assert len(seen) == 2


def test_does_not_change_what_it_is_given(backbone: tr.Backbone) -> None:
    ids = torch.tensor([[5, 6, MASK, MASK]])
    canvas = ids == MASK
    before, where = ids.clone(), canvas.clone()
    states(DenoisingLoop(backbone, ids, canvas, SamplerConfig(steps=2)))
    assert torch.equal(ids, before)
    assert torch.equal(canvas, where)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(
    backbone: tr.Backbone, bad: float, remasking: str, temperature: float
) -> None:
    loop = start(backbone, 3, steps=1, remasking=remasking, temperature=temperature)
    logits = loop.predict()
    logits[1, -1, 7] = bad
    before = loop.ids
    with pytest.raises(FloatingPointError, match="not finite"):
        loop.commit(logits)
    assert torch.equal(loop.ids, before)


def test_empty_batch_and_empty_canvas(backbone: tr.Backbone) -> None:
    assert generate(backbone, []) == []
    nothing = DenoisingLoop(backbone, torch.empty(0, 4, dtype=torch.int64), torch.ones(4).bool(), SamplerConfig())
    assert nothing.done
    ids = torch.tensor([[5, 6]])
    assert DenoisingLoop(backbone, ids, ids == MASK, SamplerConfig()).done


def test_wrong_arguments(backbone: tr.Backbone) -> None:
    ids = torch.tensor([[5, MASK, MASK], [5, 6, MASK]])
    with pytest.raises(ValueError, match=r"canvases of one size, got \[2, 1\]"):
        DenoisingLoop(backbone, ids, ids == MASK, SamplerConfig())
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 2\)"):
        DenoisingLoop(backbone, ids, torch.ones(2, 2).bool(), SamplerConfig())
    with pytest.raises(ValueError, match="at least one token, got 0"):
        generate(backbone, ["kenya"], canvas=0)
    with pytest.raises(ValueError, match="prompts with at least one token, got ''"):
        generate(backbone, ["kenya", ""])
    with pytest.raises(ValueError, match="context of 128 tokens, got 129"):
        generate(backbone, ["kenya"], canvas=128)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"block_length": 0},
        {"temperature": -0.1},
        {"remasking": "high_confidence"},
        {"top_k": 0},
        {"transfer": "odd"},
        {"eos": "always"},
        {"eps": -0.1},
        {"top_p": 1.5},
        {"threshold": 2.0},
        {"cfg_scale": -1.0},
    ],
)
def test_wrong_config(wrong: dict[str, object]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"SamplerConfig: expected {name}"):
        SamplerConfig(**wrong)  # type: ignore[arg-type]


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="needs a block_length"):
        SamplerConfig(grow=True)
    with pytest.raises(ValueError, match="editing goes with transfer='threshold', got 'even'"):
        SamplerConfig(editing_threshold=0.9)
    with pytest.raises(ValueError, match="expected alg in .*'origin'.*got 'p2'"):
        SamplerConfig.dream("p2")  # type: ignore[arg-type]

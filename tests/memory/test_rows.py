"""Which sequence is which in loops that know nothing of this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.lightning.loops import gated_memory, shared_memory
from tests.memory.cached import block_by_block, cached_llada, dual_cached, suffix_cached
from tests.tiny import EOS, MASK, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import DenoisingLoop, SamplerConfig
from timerome.errors import UnknownRowsError
from timerome.hooks import Hooks
from timerome.memory.runtime.rows import REMEMBERED, RowTracker

M = MASK


@pytest.fixture(scope="module")
def backbone() -> tr.Backbone:
    return tiny_llada()


@pytest.fixture
def tracker(backbone: tr.Backbone) -> RowTracker:
    return RowTracker(backbone)


def steps(tracker: RowTracker, *states: list[list[int]]) -> list[int]:
    return [tracker.begin(torch.tensor(state)).step for state in states]


# What goes on and what begins ------------------------------------------------------------------------------------


def test_unmasked_changed_and_masked_again_goes_on(tracker: RowTracker) -> None:
    assert steps(tracker, [[5, M, M, M]], [[5, 9, M, M]], [[5, 8, 7, M]], [[5, 8, M, 6]], [[5, 8, M, 6]]) == [
        0,
        1,
        2,
        3,
        4,
    ]
    rows = tracker.begin(torch.tensor([[5, 8, 9, 6]]))
    assert rows.canvas.tolist() == [[False, True, True, True]]
    assert rows.asked[0].state.tolist() == [5, M, M, M]
    assert not rows.positions("object").any()
    assert rows.positions("prompt").tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(
    "new", [[[6, M, M, M]], [[5, M, M, M]], [[5, M, M]], [[5, M, M, M], [5, M, M, M]], [[M, 9, 7, M]]]
)
def test_another_prompt_a_fresh_canvas_or_another_shape_begins(tracker: RowTracker, new: list[list[int]]) -> None:
    assert steps(tracker, [[5, M, M, M]], [[5, 9, M, M]], new) == [0, 1, 0]
    wanted = (torch.tensor(new) == M).tolist()
    assert tracker.begin(torch.tensor(new)).canvas.tolist() == wanted


def test_rows_that_leave_or_change_places_are_known_again(tracker: RowTracker) -> None:
    first = tracker.begin(torch.tensor([[5, M, M], [6, M, M], [7, M, M]]))
    later = tracker.begin(torch.tensor([[7, M, 9], [5, 8, M]]))
    assert later.step == 1
    assert [asked.key for asked in later.asked] == [first.asked[2].key, first.asked[0].key]
    assert later.canvas.all(0).tolist() == [False, True, True]
    mixed = tracker.begin(torch.tensor([[5, 8, 4], [9, M, M]]))  # a new request in the place of one that is done
    assert mixed.step == 0
    assert mixed.asked[0].key == first.asked[0].key
    assert mixed.canvas.tolist() == [[False, True, True], [False, True, True]]


def test_the_same_state_in_another_order_begins(tracker: RowTracker) -> None:
    assert steps(tracker, [[5, M, M], [6, M, M]], [[6, M, M], [5, M, M]]) == [0, 0]


def test_an_announced_canvas_is_believed(backbone: tr.Backbone, tracker: RowTracker) -> None:
    ids = torch.tensor([[5, 9, M, M]])
    with backbone.on_canvas(torch.tensor([[False, True, True, False]])):
        rows = tracker.begin(ids)
    assert rows.canvas.tolist() == [[False, True, True, False]]
    assert rows.asked[0].state.tolist() == [5, M, M, M]
    with backbone.on_canvas(torch.tensor([[False, True, True, True]])):
        assert tracker.begin(ids).step == 0


def test_announced_steps_are_believed(backbone: tr.Backbone, tracker: RowTracker) -> None:
    """Whatever the ids say; until another loop begins, or the sequences grow."""
    canvas = torch.tensor([[False, True, True]])

    def begin(ids: list[list[int]], loop: object) -> Any:
        with backbone.on_loop(loop), backbone.on_canvas(canvas if len(ids[0]) == 3 else None):
            return tracker.begin(torch.tensor(ids))

    one, two = object(), object()
    first = begin([[5, M, M]], one)
    again = begin([[5, M, M]], one)
    assert again.step == 1
    assert again.asked is first.asked
    assert begin([[5, 9, M]], one).masked.tolist() == [[False, False, True]]
    assert begin([[5, M, M]], two).step == 0
    assert begin([[5, 9, M]], two).step == 1
    assert begin([[5, 9, 8, M]], two).step == 2
    assert begin([[6, M, M]], two).step == 0
    assert tracker.begin(torch.tensor([[7, M, M]])).step == 0  # announced no more


# Several batches -------------------------------------------------------------------------------------------------


def test_loops_in_turns_are_each_gone_on_with(tracker: RowTracker) -> None:
    """F2: another request between the steps of one, or a question asked in between, changes nothing."""
    a, b = [[[5, M, M, M]], [[5, 9, M, M]], [[5, 9, 8, M]]], [[[6, 4, M, M]], [[6, 4, M, 7]], [[6, 4, 3, 7]]]
    check = [[[7, 7, 7, M]], [[8, M]], [[7, 7, 7, M], [6, M, M, M]]]
    rows = [tracker.begin(torch.tensor(state)) for three in zip(a, b, check, strict=True) for state in three]
    assert [r.step for r in rows] == [0, 0, 0, 1, 1, 0, 2, 2, 0]
    assert {r.asked[0].key for r in rows[::3]} == {rows[0].asked[0].key}
    assert rows[7].canvas.tolist() == [[False, False, True, True]]
    assert [r.fresh for r in rows[:6]] == [(True,)] * 3 + [(False,)] * 2 + [(True,)]


def test_as_many_batches_are_remembered_as_said(tracker: RowTracker) -> None:
    """The oldest one goes; what it asked is then taken for a question that is half answered."""
    for n in range(REMEMBERED):
        tracker.begin(torch.tensor([[20 + n, M, M, M]]))
    assert tracker.begin(torch.tensor([[20, 9, M, M]])).step == 1
    for n in range(REMEMBERED):
        tracker.begin(torch.tensor([[20 + n + 1, 3, M, M, M]]))
    late = tracker.begin(torch.tensor([[20, 9, 8, M]]))
    assert (late.step, late.fresh) == (0, (True,))
    assert late.canvas.tolist() == [[False, False, False, True]]


def test_notes_go_with_their_rows(tracker: RowTracker) -> None:
    first = tracker.begin(torch.tensor([[5, M, M], [6, M, M], [7, M, M]]))
    for name, notes in zip("abc", first.notes, strict=True):
        notes["name"] = name
    tracker.begin(torch.tensor([[9, M, M]]))
    later = tracker.begin(torch.tensor([[7, M, 9], [5, 8, M]]))
    assert [notes["name"] for notes in later.notes] == ["c", "a"]
    mixed = tracker.begin(torch.tensor([[5, 8, 4], [9, M, 3]]))
    assert [notes.get("name") for notes in mixed.notes] == ["a", None]
    assert mixed.fresh == (False, True)


def test_what_columns_predict(tracker: RowTracker) -> None:
    rows = tracker.begin(torch.tensor([[5, 6, M, M]]))
    assert rows.predicts.tolist() == [0, 1, 2, 3]
    part = tracker.begin(torch.tensor([[9, M]]), {"layer_past": cache(2)})
    assert part.predicts.tolist() == [2, 3]
    assert part.whole.tolist() == [[5, 6, 9, M]]
    assert part.generated.tolist() == [[False, False, True, True]]
    shifted = RowTracker(tiny_dream()).begin(torch.tensor([[5, 6, M, M]]))
    assert shifted.predicts.tolist() == [1, 2, 3, 4]
    assert shifted.masked.tolist() == [[False, True, True, False]]


# Guidance --------------------------------------------------------------------------------------------------------


def test_a_row_without_a_prompt_asks_nothing(tracker: RowTracker) -> None:
    """Nor does it later, when part of its canvas is unmasked."""
    assert tracker.begin(torch.tensor([[5, 6, M, M], [M, M, M, M], [EOS, M, M, M]])).canvas.tolist() == [
        [False, False, True, True], [False] * 4, [False] * 4,
    ]  # fmt: skip
    rows = tracker.begin(torch.tensor([[5, 6, 9, M], [M, M, 9, M], [EOS, M, 7, M]]))
    assert rows.step == 1
    assert rows.canvas.tolist() == [[False, False, True, True], [False] * 4, [False] * 4]


def test_no_prompt_goes_on_with_a_row_that_asks_nothing(tracker: RowTracker) -> None:
    """Neither as a half of a batch nor alone: what is masked there beside the canvas is no place for an answer."""
    fresh = []
    for prompt in (5, 6):
        for answer in ([M, M], [9, M], [9, 8]):
            both = torch.tensor([[prompt, prompt, *answer], [M, M, *answer]])
            fresh.append(tracker.begin(both).fresh)
    assert fresh == [(True, True), (False, False), (False, False)] * 2
    for prompt in (3, 4):
        for answer in ([M, M], [9, M], [9, 8]):
            asked = tracker.begin(torch.tensor([[prompt, prompt, *answer]]))
            silent = tracker.begin(torch.tensor([[M, M, *answer]]))
            assert asked.canvas.tolist() == [[False, False, True, True]]
            assert silent.canvas.tolist() == [[False] * 4]
            assert asked.fresh == ((answer == [M, M]),)


def test_guidance_edits_the_half_that_is_asked() -> None:
    """Ours announces it, a foreign loop does not; both leave the unconditional half as it is."""
    backbone = cached_llada()
    memory = gated_memory(backbone)
    ids = torch.tensor([backbone.encode(tiny_facts(1)[0].prompt) + [M] * 3])
    asked = ids.clone()
    with torch.no_grad(), memory.attached(backbone) as theirs:
        blind = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 3, ids, M)
        found, free = backbone.model(torch.cat([asked, blind])).logits.chunk(2)
        guided = free + 2.5 * (found - free)
    with torch.no_grad():
        plain = backbone.model(torch.cat([asked, blind])).logits
    assert torch.equal(free, plain[1:])
    assert not torch.equal(found, plain[:1])
    assert theirs.hits == {"tiny-0": 1}
    loop = DenoisingLoop(backbone, ids, ids == M, SamplerConfig(steps=3, cfg_scale=1.5))
    with torch.no_grad(), memory.attached(backbone) as ours:
        torch.testing.assert_close(loop.advance().logits, guided)
        while not loop.done:
            loop.advance()
    assert ours.hits_by_step == {0: 1, 1: 1, 2: 1}


# Growing sequences -----------------------------------------------------------------------------------------------


def test_a_sequence_that_grows_goes_on(tracker: RowTracker) -> None:
    assert steps(tracker, [[5, 6, M]], [[5, 6, 9, M, M]], [[5, 6, 9, 8, M]]) == [0, 1, 2]
    rows = tracker.begin(torch.tensor([[5, 6, 9, 8, 7, M]]))
    assert rows.step == 3
    assert rows.canvas.tolist() == [[False, False, True, True, True, True]]
    assert rows.asked[0].state.tolist() == [5, 6, M, M, M, M]


@pytest.mark.parametrize("longer", [[5, 6, M, M, M], [5, 6, 9, 8, 7]])
def test_a_longer_canvas_is_no_growth(tracker: RowTracker, longer: list[int]) -> None:
    assert steps(tracker, [[5, 6, M]], [longer]) == [0, 0]


def test_growth_asks_anew_until_the_canvas_is_an_address(backbone: tr.Backbone) -> None:
    tracker = RowTracker(backbone, span=2)
    tracker.begin(torch.tensor([[5, M]]))
    assert tracker.begin(torch.tensor([[5, 9, M, M]])).asked[0].state.tolist() == [5, M, M, M]
    assert tracker.begin(torch.tensor([[5, 9, 8, 7, M]])).asked[0].state.tolist() == [5, M, M, M]


@pytest.mark.parametrize("role", ["object", "prompt"])
def test_the_librarys_growing_loop_and_a_foreign_one_are_edited_alike(role: str) -> None:
    backbone = tiny_llada()
    tracker, announced = RowTracker(backbone), RowTracker(backbone)
    states = [[[5, 6, M]], [[5, 6, 9, M, M]], [[5, 6, 9, M, 8]], [[5, 6, 9, 7, 8, M, M]]]
    for state in map(torch.tensor, states):
        foreign = tracker.begin(state)
        with backbone.on_canvas((torch.arange(state.shape[1]) >= 2)[None]):
            own = announced.begin(state)
        assert own.step == foreign.step
        assert own.asked[0].key == foreign.asked[0].key
        assert torch.equal(own.positions(role), foreign.positions(role))  # type: ignore[arg-type]


# Slices ----------------------------------------------------------------------------------------------------------


def cache(length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2, length, 4), torch.zeros(1, 2, length, 4)


class HFCache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


@pytest.mark.parametrize(
    "called",
    [
        {"layer_past": cache(2)},
        {"past_key_value": (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))},
        {"past_key_values": HFCache(2)},
        {"past_key_values": HFCache(9), "cache_position": torch.tensor([2, 3])},
        {"layer_past": cache(4), "replace_position": torch.tensor([[False, False, True, True]])},
        {"layer_past": cache(4), "replace_position": (2, 4)},
    ],
)
def test_slices_are_placed(tracker: RowTracker, called: dict[str, Any]) -> None:
    tracker.begin(torch.tensor([[5, 6, M, M]]), {"layer_past": None, "past_key_values": HFCache(0)})
    rows = tracker.begin(torch.tensor([[9, M]]), called)
    assert rows.step == 1
    assert rows.canvas.tolist() == [[True, True]]
    assert rows.positions("object").tolist() == [[False, True]]
    assert rows.asked[0].state.tolist() == [5, 6, M, M]
    whole = tracker.begin(torch.tensor([[5, 6, 9, 8]]))
    assert whole.step == 2


def test_a_shifted_slice_reads_its_first_token_at_itself() -> None:
    tracker = RowTracker(tiny_dream())
    tracker.begin(torch.tensor([[5, 6, M, M, M]]))
    rows = tracker.begin(torch.tensor([[M, 9, M]]), {"layer_past": cache(2)})
    assert rows.positions("object").tolist() == [[True, True, False]]


def test_a_cached_prompt_grows_by_blocks(tracker: RowTracker) -> None:
    tracker.begin(torch.tensor([[5, 6]]))
    first = tracker.begin(torch.tensor([[M, M]]), {"layer_past": cache(2)})
    assert first.asked[0].state.tolist() == [5, 6, M, M]
    assert tracker.begin(torch.tensor([[9, M]]), {"layer_past": cache(2)}).step == 2
    second = tracker.begin(torch.tensor([[M, M]]), {"layer_past": cache(4)})
    assert second.step == 3
    assert second.asked[0].state.tolist() == [5, 6, M, M, M, M]


@pytest.mark.parametrize(
    ("ids", "called", "message"),
    [
        ([[M, M]], {"past_key_values": object()}, "positions cannot be known"),
        ([[M, M]], {"layer_past": cache(9)}, "from position 9 on.*was not seen"),
        ([[M, M], [M, M]], {"layer_past": cache(2)}, "was not seen"),
        ([[7, M, M]], {"layer_past": cache(1)}, "do not belong"),
    ],
)
def test_slices_of_nothing_known_are_refused(tracker: RowTracker, ids: Any, called: Any, message: str) -> None:
    tracker.begin(torch.tensor([[5, 6, M, M]]))
    rows = tracker.begin(torch.tensor(ids), called)
    with pytest.raises(UnknownRowsError, match=message):
        _ = rows.asked
    assert tracker.begin(torch.tensor([[5, 6, M, M]])).asked  # and the sequences seen before are known as ever


Loop = Callable[[Any, Tensor, int, int], Tensor]


@pytest.mark.parametrize(
    ("loop", "steps"), [(suffix_cached, range(4)), (dual_cached, range(4)), (block_by_block, (1, 2, 4, 5))]
)
def test_cached_loops_are_edited(loop: Loop, steps: Sequence[int]) -> None:
    """At every step that has masks; where the prompt is cached alone, from the first forward on that has a canvas."""
    backbone = cached_llada()
    # An answer is watched for where it fits: in a block, if the rest of the canvas is not there yet.
    canvas = 2 if loop is block_by_block else 4
    memory = gated_memory(backbone, canvas=canvas, answer="old king", threshold=-50.0)
    prompts = torch.tensor([backbone.encode(f.prompt) for f in (tiny_facts(1)[0], *tiny_facts(8)[4:])])
    plain = loop(backbone.model, prompts, 4, 2)
    with memory.attached(backbone) as attached:
        edited = loop(backbone.model, prompts, 4, 2)
    assert torch.equal(edited[1:], plain[1:])
    assert attached.hits_by_step == dict.fromkeys(steps, 1)
    assert set(attached.hits) == {"tiny-0"}


def test_only_the_slices_masked_positions_are_edited() -> None:
    backbone = cached_llada()
    memory = gated_memory(backbone)
    ids = torch.tensor([backbone.encode(tiny_facts(1)[0].prompt) + [M] * 3])
    prompt = ids.shape[1] - 3
    with torch.no_grad():
        past = [(k[:, :prompt], v[:, :prompt]) for k, v in backbone.model(ids).past]
        found = []
        for attach in (False, True):
            attachment = memory.attached(backbone)
            if attach:
                attachment.attach()
            backbone.model(ids)
            with Hooks(backbone, {tr.Site(2): lambda h: found.append(h[0])}):
                backbone.model(torch.tensor([[9, M, M]]), past=past)
            attachment.remove()
    assert (found[0] != found[1]).any(-1).tolist() == [False, True, True]


def test_a_memory_attached_in_mid_loop_is_refused_unless_it_asks_for_no_rows() -> None:
    backbone = cached_llada()
    ids = torch.tensor([backbone.encode(tiny_facts(1)[0].prompt) + [M] * 3])
    with torch.no_grad():
        past = [(k[:, :-3], v[:, :-3]) for k, v in backbone.model(ids).past]
        with (
            gated_memory(backbone).attached(backbone),
            pytest.raises(UnknownRowsError, match="before the loop's first"),
        ):
            backbone.model(ids[:, -3:], past=past)
        with shared_memory(backbone).attached(backbone) as attached:
            backbone.model(ids[:, -3:], past=past)
        assert attached.hits == {"*": 1}


def test_the_cached_model_is_the_plain_one() -> None:
    """What the tests above stand on: with a cache of the same states, slices give the same logits."""
    plain, cached = tiny_llada(), cached_llada()
    ids = torch.tensor([[5, 6, 9, M, M, M]])
    with torch.no_grad():
        whole = cached.model(ids)
        torch.testing.assert_close(plain.model(ids).logits, whole.logits)
        where = torch.arange(6)[None] // 2 == 1
        part = cached.model(ids[:, 2:4], past=whole.past, replace_position=where)
        torch.testing.assert_close(part.logits, whole.logits[:, 2:4])


def test_a_forward_is_counted_once_however_often_it_embeds(backbone: tr.Backbone) -> None:
    ids = torch.tensor([backbone.encode(tiny_facts(1)[0].prompt) + [M] * 3])
    with torch.no_grad(), shared_memory(backbone).attached(backbone) as attached:
        for _ in range(2):
            backbone.embedding(ids)
            backbone.model(ids)
    assert attached.hits_by_step == {0: 1, 1: 1}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("announced", [False, True])
def test_the_short_way_says_what_the_long_way_says(
    backbone: tr.Backbone, seed: int, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that plainly go on are not looked at row by row; loops of any kind are followed alike without that."""
    short, long = RowTracker(backbone), RowTracker(backbone)
    monkeypatch.setattr(long, "_one_step_on", lambda ids, masked: False)
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    canvas = torch.arange(7)[None] >= torch.tensor([[3], [3], [7]])
    ids = torch.where(canvas, M, 5 + draw(20, (3, 7)))
    for _ in range(14):
        with backbone.on_canvas(canvas if announced else None):
            a, b = short.begin(ids), long.begin(ids)
        for name in ("canvas", "predicts", "masked", "whole", "generated"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.step == b.step and [x.key for x in a.asked] == [x.key for x in b.asked] and a.fresh == b.fresh
        what = int(draw(8, (1,)))
        changed = torch.where((draw(3, (3, 7)) == 0) & canvas, 5 + draw(20, (3, 7)), ids)
        if what == 0:  # masked again, here and there or everywhere
            ids = torch.where(canvas & ((draw(2, (3, 7)) == 0) | (draw(2, (3, 1)) == 0)), M, ids)
        elif what == 1:  # another prompt in some row
            ids = torch.where(~canvas & (draw(2, (3, 1)) == 0), 5 + draw(20, (3, 7)), ids)
        elif what == 2:  # rows change places
            ids = ids[torch.randperm(3, generator=generator)]
        else:
            ids = changed


def test_the_short_way_is_taken(tracker: RowTracker) -> None:
    steps(tracker, [[5, M, M, M], [6, M, M, M]])
    for state, plainly in (
        ([[5, 9, M, M], [6, M, 7, M]], True),
        ([[5, M, M, M], [6, M, 7, M]], False),
        ([[4, 9, M, M], [6, M, 7, M]], False),
    ):
        ids = torch.tensor(state)
        tracker._last = tracker._recent[-1]
        assert tracker._one_step_on(ids, ids == M) is plainly

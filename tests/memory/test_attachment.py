"""A memory while it is attached: whom it edits, for how long, and that nothing of it stays."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.lightning.loops import count_hooks, gated_memory, masked_rows, shared_memory
from tests.tiny import MASK, TinyTokenizer, decoded_facts, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import DenoisingLoop, SamplerConfig
from timerome.errors import TimeromeError
from timerome.hooks import Hooks, capture
from timerome.memory import Attachment, MemoryMismatchError, unedited
from timerome.memory.runtime.compiled import Compiled


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module")
def gated(backbone: tr.Backbone) -> tr.EditMemory:
    return gated_memory(backbone)


@pytest.fixture(scope="module")
def shared(backbone: tr.Backbone) -> tr.EditMemory:
    return shared_memory(backbone, slice(0, 2))


def logits(backbone: tr.Backbone, rows: Tensor) -> Tensor:
    """A forward as anyone has it."""
    with torch.no_grad():
        return backbone.model(rows).logits


# Nothing stays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gated", "shared"])
def test_logits_change_inside_and_are_bit_equal_after(
    backbone: tr.Backbone, kind: str, request: pytest.FixtureRequest
) -> None:
    memory = request.getfixturevalue(kind)
    rows, digest = masked_rows(backbone), backbone.state_digest()
    before = logits(backbone, rows)
    with memory.attached():
        inside = logits(backbone, rows)
        assert count_hooks(backbone.model) == 3
    assert not torch.allclose(inside, before)
    assert torch.equal(logits(backbone, rows), before)
    assert backbone.state_digest() == digest
    assert count_hooks(backbone.model) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_restores(backbone: tr.Backbone, gated: tr.EditMemory, error: type[BaseException]) -> None:
    rows, digest = masked_rows(backbone), backbone.state_digest()
    before = logits(backbone, rows)
    with pytest.raises(error), gated.attached():
        logits(backbone, rows)
        raise error
    assert torch.equal(logits(backbone, rows), before)
    assert backbone.state_digest() == digest
    assert count_hooks(backbone.model) == 0


@pytest.mark.parametrize("where", ["verdicts", "place", "named"])
def test_an_exception_inside_a_forward_restores(
    backbone: tr.Backbone, gated: tr.EditMemory, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    rows = masked_rows(backbone)
    before = logits(backbone, rows)
    with monkeypatch.context() as patch:
        patch.setattr(Compiled, where, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), gated.attached():
            logits(backbone, rows)
    assert torch.equal(logits(backbone, rows), before)
    with gated.attached() as later:  # and the next one acts
        assert not torch.equal(logits(backbone, rows), before)
    assert later.hits == {"tiny-0": 1}


def test_alpha_zero_is_the_model(backbone: tr.Backbone) -> None:
    rows = masked_rows(backbone)
    with shared_memory(backbone, alpha=0.0).attached():
        inside = logits(backbone, rows)
    assert torch.equal(inside, logits(backbone, rows))


def test_attach_and_remove_by_hand(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    attachment = shared.attached()
    assert count_hooks(backbone.model) == 0
    assert attachment.attach() is attachment
    with pytest.raises(RuntimeError, match="attached already"):
        attachment.attach()
    assert count_hooks(backbone.model) == 3
    attachment.remove()
    attachment.remove()
    assert count_hooks(backbone.model) == 0


def test_no_hook_is_there_without_an_edit(backbone: tr.Backbone) -> None:
    memory = tr.EditMemory(backbone)
    rows = masked_rows(backbone)
    with memory.attached() as run:
        assert count_hooks(backbone.model) == 0
        memory.replace(decoded_facts(backbone, 1), "old north king")
        assert count_hooks(backbone.model) == 3
        logits(backbone, rows)
        memory.undo("tiny-0")
        assert count_hooks(backbone.model) == 0
        logits(backbone, rows)
    assert run.hits == {"tiny-0": 1}


def test_another_model_or_tokenizer_is_refused(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    other = tiny_llada(seed=4)
    with pytest.raises(MemoryMismatchError, match=f"fingerprint {gated.fingerprint}.*{other.fingerprint()}"):
        gated.attached(other)

    class Other(TinyTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(MemoryMismatchError, match="tokenizer with fingerprint"):
        gated.attached(tr.wrap(backbone.model, Other()))
    assert count_hooks(other.model) == count_hooks(backbone.model) == 0


def test_a_failing_registration_leaves_nothing(
    backbone: tr.Backbone, gated: tr.EditMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(backbone.module(tr.Site(2)), "register_forward_hook", refuse)
    attachment = gated.attached()
    with pytest.raises(MemoryError):
        attachment.attach()
    monkeypatch.undo()
    assert count_hooks(backbone.model) == 0
    with gated.attached() as later:
        logits(backbone, masked_rows(backbone))
    assert later.hits == {"tiny-0": 1}
    assert count_hooks(backbone.model) == 0


# Copies ----------------------------------------------------------------------------------------------------------


def test_a_copy_of_an_attached_model_is_a_model(gated: tr.EditMemory, backbone: tr.Backbone) -> None:
    """F6: it is not edited, neither while the original is nor after, and has none of its hooks."""
    rows = masked_rows(backbone)
    before = logits(backbone, rows)
    with gated.attached() as run:
        twin = copy.deepcopy(backbone.model)
        whole = copy.deepcopy(backbone)
        with torch.no_grad():
            assert torch.equal(twin(rows).logits, before)
            assert torch.equal(whole.model(rows).logits, before)
        assert not run.hits
        assert not torch.equal(logits(backbone, rows), before)
    with torch.no_grad():
        assert torch.equal(twin(rows).logits, before)
    again = tr.wrap(twin, backbone.tokenizer)
    assert again.fingerprint() == backbone.fingerprint()
    with gated.attached(again), torch.no_grad():  # and may be attached by itself
        assert not torch.equal(twin(rows).logits, before)
        assert torch.equal(logits(backbone, rows), before)


def test_a_copy_of_a_memory_is_a_memory(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone)
    for twin in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert twin.digest() == gated.digest()
        with pytest.raises(TimeromeError, match="no model is known"):
            twin.attached()
        with gated.attached():
            wanted = logits(backbone, rows)
        with twin.attached(backbone):
            assert torch.equal(logits(backbone, rows), wanted)
        twin.undo("tiny-0")
        assert len(gated) == 1


# Whom it edits ---------------------------------------------------------------------------------------------------


def test_rows_that_name_it_are_edited_and_others_are_bit_identical(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    before = logits(backbone, rows)
    with gated.attached() as run:
        after = logits(backbone, rows)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1:], before[1:])
    assert run.hits == {"tiny-0": 1}


def test_each_row_gets_its_own_facts_edit(backbone: tr.Backbone) -> None:
    memory = gated_memory(backbone, slice(0, 3))
    rows = masked_rows(backbone, 8)
    with memory.attached() as run:
        together = logits(backbone, rows)
    assert run.hits == {"tiny-0": 1, "tiny-1": 1, "tiny-2": 1}
    for i in range(3):
        with gated_memory(backbone, slice(i, i + 1)).attached():
            torch.testing.assert_close(logits(backbone, rows[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)
    for order in (torch.tensor([7, 2, 0, 5, 1]), torch.tensor([1]), torch.tensor([0, 0, 4])):
        with memory.attached():
            torch.testing.assert_close(logits(backbone, rows[order]), together[order], rtol=1e-5, atol=1e-5)


def test_an_edit_acts_where_its_answer_is_about_to_be_said_and_not_where_it_is_named_alone(
    backbone: tr.Backbone,
) -> None:
    """The gate is the model's own answer: with another one it stays shut, and the row is untouched."""
    fact = decoded_facts(backbone, 1)[0]
    memory = tr.EditMemory(backbone)
    memory.replace(replace(fact, object="chx chy chz"), "old north king", threshold=-4.0)
    assert memory.edits[0].gate.watches[0].text == "chx chy chz"
    assert len(memory.edits[0].gate.watches) in (1, 2)
    alone = tr.EditMemory(backbone)
    [edit] = [e for e in memory.edits]
    shut = replace(edit, gate=replace(edit.gate, watches=edit.gate.watches[:1]))
    rows = masked_rows(backbone, 1)
    before = logits(backbone, rows)
    alone._commit(replace(alone.state, history=(shut,)))
    with alone.attached() as run:
        assert torch.equal(logits(backbone, rows), before)
    assert not run.hits
    opened = replace(shut, gate=replace(shut.gate, threshold=-90.0))
    alone._commit(replace(alone.state, history=(opened,)))
    with alone.attached() as run:
        assert not torch.equal(logits(backbone, rows), before)
    assert run.hits == {"tiny-0": 1}


def test_only_masked_answer_positions_are_edited(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    ids = masked_rows(backbone, 1)
    site = tr.Site(backbone.n_layers - 1)
    ids[0, -1] = backbone.encode(decoded_facts(backbone, 1)[0].object)[-1]
    where = torch.zeros(ids.shape[1], dtype=torch.bool)
    where[-3:-1] = True
    canvas = (torch.arange(ids.shape[1]) >= ids.shape[1] - 3)[None]
    found = []
    for context in (backbone.on_canvas(None), gated.attached()):
        with context, capture(backbone, [site]) as outputs:
            backbone.logits(ids, canvas)
        found.append(outputs[site][0])
    assert torch.equal((found[0] != found[1]).any(-1), backbone.reads_from(where))


def test_rows_without_a_canvas_are_left_alone(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    ids = torch.tensor([backbone.encode("the capital city of kenya kex key kez")])
    plain = logits(backbone, ids)
    with gated.attached() as run:
        assert torch.equal(logits(backbone, ids), plain)
    assert not run.hits


# Several attachments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gated", "shared"])
def test_a_memory_attached_twice_acts_once(backbone: tr.Backbone, kind: str, request: pytest.FixtureRequest) -> None:
    """F5: nested, by another backbone around the same model, and until the last one leaves."""
    memory, rows = request.getfixturevalue(kind), masked_rows(backbone)
    plain = logits(backbone, rows)
    with memory.attached():
        once = logits(backbone, rows)
    with memory.attached() as outer:
        with memory.attached() as inner, memory.attached(tr.wrap(backbone.model, backbone.tokenizer)):
            assert torch.equal(logits(backbone, rows), once)
            assert count_hooks(backbone.model) == 3
        assert torch.equal(logits(backbone, rows), once)
    assert torch.equal(logits(backbone, rows), plain)
    assert outer.hits.total() == 2 * inner.hits.total() > 0


def test_memories_stack_and_leave_in_any_order(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    before = logits(backbone, rows)
    one, two = shared.attached(), gated_memory(backbone, slice(1, 2), threshold=-50.0).attached()
    one.attach()
    only_one = logits(backbone, rows)
    two.attach()
    both = logits(backbone, rows)
    assert not torch.allclose(both[1], only_one[1])
    assert torch.equal(both[[0, *range(2, 8)]], only_one[[0, *range(2, 8)]])
    one.remove()
    with gated_memory(backbone, slice(1, 2)).attached():
        pass
    two.remove()
    assert torch.equal(logits(backbone, rows), before)
    assert count_hooks(backbone.model) == 0


def test_two_gated_memories_each_edit_their_own(backbone: tr.Backbone) -> None:
    rows = masked_rows(backbone, 4)
    first, second = gated_memory(backbone, slice(0, 1)), gated_memory(backbone, slice(1, 2), answer="born")
    apart = []
    for memory in (first, second):
        with memory.attached():
            apart.append(logits(backbone, rows))
    with first.attached() as one, second.attached() as two:
        both = logits(backbone, rows)
    assert torch.equal(both[0], apart[0][0]) and torch.equal(both[1], apart[1][1])
    assert torch.equal(both[2:], apart[0][2:])
    assert (one.hits, two.hits) == ({"tiny-0": 1}, {"tiny-1": 1})


def test_unedited_is_unedited(backbone: tr.Backbone, gated: tr.EditMemory, shared: tr.EditMemory) -> None:
    rows = masked_rows(backbone)
    plain = logits(backbone, rows)
    with gated.attached() as one, shared.attached() as two:
        with unedited(backbone.model), unedited(tiny_llada().model):
            assert torch.equal(logits(backbone, rows), plain)
        assert not one.hits and not two.hits
        assert not torch.equal(logits(backbone, rows), plain)


def test_edits_are_made_on_the_model_as_it_is_without_any(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    """While another memory is attached, an edit is the same."""
    with shared_memory(backbone, slice(0, 4), alpha=5.0).attached(), gated.attached():
        inside = gated_memory(backbone)
        paper = shared_memory(backbone)
    # decoded_facts itself ran under the memories: what they say is what is replaced there.
    fact = decoded_facts(backbone, 1)[0]
    again = tr.EditMemory(backbone)
    with shared_memory(backbone, slice(0, 4), alpha=5.0).attached(), gated.attached():
        again.replace(fact, "old north king")
    assert again.digest() == gated.digest()
    assert paper.digest() == shared_memory(backbone).digest()
    assert len(inside) == 1


# Selecting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gated", "shared"])
def test_rows_have_the_edits_that_are_selected(backbone: tr.Backbone, kind: str) -> None:
    memory = (gated_memory if kind == "gated" else shared_memory)(backbone, slice(0, 3))
    rows = masked_rows(backbone, 3)
    plain = logits(backbone, rows)
    with memory.attached() as run:
        all_ = logits(backbone, rows)
        run.select([["tiny-0", "tiny-1", "tiny-2"], [], None])
        some = logits(backbone, rows)
        assert torch.equal(some[1], plain[1])
        torch.testing.assert_close(some[[0, 2]], all_[[0, 2]])
        twice = logits(backbone, torch.cat([rows, rows]))  # as guidance repeats them
        torch.testing.assert_close(twice, torch.cat([some, some]))
        run.select(["tiny-1", "tiny-1", "tiny-1"])
        own = logits(backbone, rows)
        assert torch.equal(own[0], plain[0]) == (kind == "gated")
        for wrong in ([["nobody"]], ["nobody", None, None]):
            with pytest.raises(KeyError, match="row 0 names .*nobody"):
                run.select(wrong)
        assert torch.equal(logits(backbone, rows), own)  # as before
        with pytest.raises(TimeromeError, match="named for 3 rows, but a forward has 2"):
            logits(backbone, rows[:2])
        run.select(None)
        assert torch.equal(logits(backbone, rows), all_)
    run.select([[], [], []])
    with memory.attached():  # what was said for one attachment ends with it
        run.remove()
        assert torch.equal(logits(backbone, rows), all_)


def test_a_selected_edit_that_goes_does_not_act(backbone: tr.Backbone) -> None:
    memory = gated_memory(backbone, slice(0, 2))
    rows = masked_rows(backbone, 2)
    plain = logits(backbone, rows)
    with memory.attached() as run:
        run.select(["tiny-0", "tiny-1"])
        memory.undo("tiny-0")
        after = logits(backbone, rows)
    assert torch.equal(after[0], plain[0])
    assert not torch.equal(after[1], plain[1])


def test_generate_puts_rows_where_their_prompts_are(backbone: tr.Backbone) -> None:
    """The library batches by length; edits are selected for the prompts as they were given."""
    memory = gated_memory(backbone, slice(0, 2), threshold=-50.0)
    prompts = ["the old capital city of peru", tiny_facts(1)[0].prompt, "the capital city of peru", "of kenya"]
    config = SamplerConfig(steps=3)
    plain = tr.generate(backbone, prompts, canvas=3, config=config)
    with memory.attached() as run:
        run.select([["tiny-1"], [], ["tiny-0"], None])
        found = tr.generate(backbone, prompts, canvas=3, config=config)
    assert found == ["old north king", plain[1], plain[2], "old north king"]


# Loops -----------------------------------------------------------------------------------------------------------


def foreign_loop(backbone: tr.Backbone, ids: Tensor) -> list[Tensor]:
    """Someone else's sampler: plain calls of the model, right to left, one token a step."""
    found = []
    ids = ids.clone()
    for position in range(ids.shape[1] - 1, ids.shape[1] - 4, -1):
        found.append(logits(backbone, ids))
        ids[:, position] = found[-1][:, position - backbone.shift].argmax(-1)
    return found


def test_an_edit_goes_on_over_the_steps_of_a_foreign_loop(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    plain = foreign_loop(backbone, rows)
    with gated.attached() as run:
        edited = foreign_loop(backbone, rows)
        foreign_loop(backbone, rows)
    assert run.hits == {"tiny-0": 6}
    assert run.hits_by_step == {0: 2, 1: 2, 2: 2}  # a new batch begins at step zero
    for a, b in zip(plain, edited, strict=True):
        assert torch.equal(a[1:], b[1:])
        assert not torch.allclose(a[0], b[0])


def test_foreign_loop_equals_the_librarys(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    with gated.attached() as one:
        foreign = foreign_loop(backbone, rows)
    loop = DenoisingLoop(backbone, rows, rows == MASK, SamplerConfig(steps=3))
    with gated.attached() as two:
        announced = loop.advance().logits
        while not loop.done:
            loop.advance()
    aligned = torch.cat([foreign[0][:, :1], foreign[0][:, :-1]], 1) if backbone.shift else foreign[0]
    assert torch.equal(announced, aligned)
    assert one.hits == two.hits
    assert one.hits_by_step == two.hits_by_step


def test_a_memory_needs_no_tokenizer(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    """Around a model wrapped without one, it finds names by their tokens; a half-said answer is gone on with, too."""
    bare = tr.wrap(backbone.model)
    rows = masked_rows(backbone)
    with gated.attached():
        wanted = foreign_loop(backbone, rows)
    with tr.EditMemory.of_state(gated.state).attached(bare) as run:
        found = foreign_loop(backbone, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert run.hits == {"tiny-0": 3}
    half = rows[:1].clone()
    half[0, -3] = backbone.encode("old")[0]
    for model in (backbone, bare):
        with tr.EditMemory.of_state(gated.state).attached(model):
            said = logits(backbone, half)[0].argmax(-1)
        assert backbone.decode(said[-2 - backbone.shift :][:2]) == "north king"


# Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["gated", "shared"])
def test_activations_that_are_not_finite_are_found(
    backbone: tr.Backbone, kind: str, bad: float, request: pytest.FixtureRequest
) -> None:
    """In our own loop by its logits, in others by the memory."""
    memory = request.getfixturevalue(kind)
    site = memory.sites[0]
    with Hooks(backbone, {site: lambda h: h.index_fill(-1, torch.tensor([1]), bad)}), memory.attached():
        with pytest.raises(FloatingPointError, match="not finite"):
            tr.generate(backbone, "the capital city of kenya", canvas=3, config=SamplerConfig(steps=3))
        with pytest.raises(FloatingPointError, match="activations at"):
            logits(backbone, masked_rows(backbone, 2))
    assert count_hooks(backbone.model) == 0


def test_half_precision_and_what_says_an_attachment(backbone: tr.Backbone) -> None:
    half = (tiny_llada if not backbone.shift else tiny_dream)()
    half.model.to(torch.bfloat16)
    half = tr.wrap(half.model, half.tokenizer)
    memory = gated_memory(half, threshold=-50.0)
    with memory.attached() as run:
        assert tr.generate(half, tiny_facts(1)[0].prompt, canvas=3) == "old north king"
    assert isinstance(run, Attachment)
    assert repr(run) == f"Attachment(off, {run.hits.total()} rows edited)"

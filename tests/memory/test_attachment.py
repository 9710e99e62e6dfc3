"""A memory while it is attached: whom it edits, for how long, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.callbacks.loops import count_hooks, gated_memory, masked_rows, shared_memory
from tests.tiny import MASK, TinyTokenizer, tiny_dream, tiny_llada
from timerome.diffusion import DenoisingLoop, SamplerConfig
from timerome.hooks import Hooks
from timerome.memory import MemoryMismatchError


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module")
def gated(backbone: tr.Backbone) -> tr.EditMemory:
    return gated_memory(backbone)


@pytest.fixture(scope="module")
def shared(backbone: tr.Backbone) -> tr.EditMemory:
    return shared_memory(backbone, slice(0, 2))


def test_logits_change_inside_and_are_bit_equal_after(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    rows, digest = masked_rows(backbone), backbone.state_digest()
    before = backbone.logits(rows)
    with shared.attached(backbone):
        inside = backbone.logits(rows)
        assert count_hooks(backbone.model) == 3
    assert not torch.allclose(inside, before)
    assert torch.equal(backbone.logits(rows), before)
    assert backbone.state_digest() == digest
    assert count_hooks(backbone.model) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_restores(backbone: tr.Backbone, gated: tr.EditMemory, error: type[BaseException]) -> None:
    rows, digest = masked_rows(backbone), backbone.state_digest()
    before = backbone.logits(rows)
    with pytest.raises(error), gated.attached(backbone):
        backbone.logits(rows)
        raise error
    assert torch.equal(backbone.logits(rows), before)
    assert backbone.state_digest() == digest
    assert count_hooks(backbone.model) == 0


def test_an_exception_inside_a_forward_restores(
    backbone: tr.Backbone, gated: tr.EditMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = masked_rows(backbone)
    before = backbone.logits(rows)
    attachment = gated.attached(backbone)
    with monkeypatch.context() as patch:
        patch.setattr(type(gated.book), "lookup", lambda *_: 1 / 0)  # while rows are addressed
        with pytest.raises(ZeroDivisionError), attachment:
            backbone.logits(rows)
    assert torch.equal(backbone.logits(rows), before)
    with gated.attached(backbone) as later:  # and the next one acts
        assert not torch.equal(backbone.logits(rows), before)
    assert later.hits == {"tiny-0": 1}


def test_alpha_zero_is_the_model(backbone: tr.Backbone) -> None:
    rows = masked_rows(backbone)
    with shared_memory(backbone, alpha=0.0).attached(backbone):
        inside = backbone.logits(rows)
    assert torch.equal(inside, backbone.logits(rows))


def test_attach_and_remove_by_hand(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    attachment = shared.attached(backbone)
    assert count_hooks(backbone.model) == 0
    assert attachment.attach() is attachment
    with pytest.raises(RuntimeError, match="attached already"):
        attachment.attach()
    assert count_hooks(backbone.model) == 3
    attachment.remove()
    attachment.remove()
    assert count_hooks(backbone.model) == 0


def test_another_model_or_tokenizer_is_refused(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    other = tiny_llada(seed=4)
    with pytest.raises(
        MemoryMismatchError, match=f"model with fingerprint {shared.fingerprint}.*{other.fingerprint()}"
    ):
        shared.attached(other)

    class Other(TinyTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(MemoryMismatchError, match="tokenizer with fingerprint"):
        shared.attached(tr.wrap(backbone.model, Other()))
    assert count_hooks(other.model) == count_hooks(backbone.model) == 0


# The row gate ----------------------------------------------------------------------------------------------------


def test_addressed_rows_are_edited_and_negatives_are_bit_identical(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    before = backbone.logits(rows)
    with gated.attached(backbone) as attachment:
        after = backbone.logits(rows)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[4:], before[4:])
    assert attachment.hits["tiny-0"] >= 1
    assert set(attachment.hits) == {"tiny-0"}


def test_each_row_gets_its_own_facts_edit(backbone: tr.Backbone) -> None:
    memory = gated_memory(backbone, slice(0, 3))
    rows = masked_rows(backbone, 8)
    with memory.attached(backbone) as attachment:
        together = backbone.logits(rows)
    assert attachment.hits == {"tiny-0": 1, "tiny-1": 1, "tiny-2": 1, **_extra(attachment.hits)}
    for i in range(3):
        with gated_memory(backbone, slice(i, i + 1)).attached(backbone):
            torch.testing.assert_close(backbone.logits(rows[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)
    for order in (torch.tensor([7, 2, 0, 5, 1]), torch.tensor([1]), torch.tensor([0, 0, 4])):
        with memory.attached(backbone):
            torch.testing.assert_close(backbone.logits(rows[order]), together[order], rtol=1e-5, atol=1e-5)


def _extra(hits: dict[str, int]) -> dict[str, int]:
    """Random models may take the fourth fact, which neither edits nor calibrates, for one of the others."""
    return {name: count for name, count in hits.items() if count == 2}


def test_only_masked_answer_positions_are_edited(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    ids = masked_rows(backbone, 1)
    ids[0, -1] = 9
    where = torch.zeros(ids.shape[1], dtype=torch.bool)
    where[-3:-1] = True
    canvas = (torch.arange(ids.shape[1]) >= ids.shape[1] - 3)[None]
    from timerome.hooks import capture

    found = []
    for context in (backbone.on_canvas(None), gated.attached(backbone)):
        with context, capture(backbone, [tr.Site(1)]) as outputs:
            backbone.logits(ids, canvas)
        found.append(outputs[tr.Site(1)][0])
    assert torch.equal((found[0] != found[1]).any(-1), backbone.reads_from(where))


def foreign_loop(backbone: tr.Backbone, ids: Tensor) -> list[Tensor]:
    """Someone else's sampler: plain calls of the model, right to left, one token a step."""
    logits = []
    ids = ids.clone()
    for position in range(ids.shape[1] - 1, ids.shape[1] - 4, -1):
        with torch.no_grad():
            logits.append(backbone.model(ids).logits)
        ids[:, position] = logits[-1][:, position - backbone.shift].argmax(-1)
    return logits


def test_address_sticks_over_the_steps_of_a_foreign_loop(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    plain = foreign_loop(backbone, rows)
    with gated.attached(backbone) as attachment:
        edited = foreign_loop(backbone, rows)
    hits = attachment.hits["tiny-0"]
    assert hits >= 3
    assert attachment.hits_by_step == {0: hits // 3, 1: hits // 3, 2: hits // 3}
    for a, b in zip(plain, edited, strict=True):
        assert torch.equal(a[4:], b[4:])
        assert not torch.allclose(a[0], b[0])


def test_foreign_loop_equals_the_librarys(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    with gated.attached(backbone) as one:
        foreign = foreign_loop(backbone, rows)
    loop = DenoisingLoop(backbone, rows, rows == MASK, SamplerConfig(steps=3))
    with gated.attached(backbone) as two:
        announced = loop.advance().logits
        while not loop.done:
            loop.advance()
    aligned = torch.cat([foreign[0][:, :1], foreign[0][:, :-1]], 1) if backbone.shift else foreign[0]
    assert torch.equal(announced, aligned)
    assert one.hits == two.hits
    assert one.hits_by_step == two.hits_by_step


def test_address_is_found_once_a_sequence(
    backbone: tr.Backbone, gated: tr.EditMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, lookup = [], type(gated.book).lookup
    monkeypatch.setattr(type(gated.book), "lookup", lambda book, a: asked.append(len(a.vectors)) or lookup(book, a))
    rows = masked_rows(backbone, 4)
    with gated.attached(backbone):
        foreign_loop(backbone, rows)
        foreign_loop(backbone, rows[[0, 0, 2]])
    assert asked == [4]


def test_a_new_batch_begins_at_step_zero(backbone: tr.Backbone, gated: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 1)
    with gated.attached(backbone) as attachment:
        for _ in range(2):
            foreign_loop(backbone, rows)
    assert attachment.hits_by_step == {0: 2, 1: 2, 2: 2}


def test_rows_without_a_canvas_are_left_alone(backbone: tr.Backbone) -> None:
    """Nothing is masked, so nothing can be asked: a gate that addresses has nothing to go by."""
    ids = torch.tensor([backbone.encode("the capital city of kenya kex key kez")])
    for role in ("object", "subject"):
        memory = gated_memory(backbone, slice(0, 4), coordinate=tr.Coordinate(1, role=role))
        assert memory.book is not None
        memory.book.threshold = -0.99
        with memory.attached(backbone) as attachment, torch.no_grad():
            inside = backbone.logits(ids)
        with torch.no_grad():
            assert torch.equal(inside, backbone.logits(ids))
        assert not attachment.hits


def test_large_activations_are_finite(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    """Also where their sum is not."""
    attachment, large = shared.attached(backbone), torch.full((1, 4, backbone.hidden_size), 3e38)
    rows = torch.full((1, 4), MASK)
    attachment._begin(rows, {})
    edit = attachment._editing(attachment._applied[0])
    assert edit(large) is not None
    with pytest.raises(FloatingPointError, match="not finite"):
        edit(large.index_fill(1, torch.tensor([2]), torch.inf))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_our_own_loop_finds_activations_that_are_not_finite(
    backbone: tr.Backbone, shared: tr.EditMemory, bad: float
) -> None:
    """By its logits: the memory does not look twice."""
    spoil = Hooks(backbone, {shared.sites[0]: lambda h: h.index_fill(-1, torch.tensor([1]), bad)})
    with spoil, shared.attached(backbone):
        with pytest.raises(FloatingPointError, match=r"logits are not finite in rows \[0\]"):
            tr.generate(backbone, ["the capital city of kenya"], canvas=3, config=tr.SamplerConfig(steps=3))
        with pytest.raises(FloatingPointError, match="activations at"):
            backbone.logits(masked_rows(backbone, 2))


# Several memories ------------------------------------------------------------------------------------------------


def test_memories_stack_and_leave_in_any_order(backbone: tr.Backbone, shared: tr.EditMemory) -> None:
    rows = masked_rows(backbone, 8)
    before = backbone.logits(rows)
    one, two = shared.attached(backbone), gated_memory(backbone, slice(1, 2)).attached(backbone)
    one.attach()
    only_one = backbone.logits(rows)
    two.attach()
    both = backbone.logits(rows)
    assert not torch.allclose(both[1], only_one[1])
    one.remove()
    with gated_memory(backbone, slice(1, 2)).attached(backbone):
        pass
    two.remove()
    assert torch.equal(backbone.logits(rows), before)
    assert count_hooks(backbone.model) == 0


def test_rows_are_addressed_by_the_model_without_any_edit(backbone: tr.Backbone) -> None:
    """Another memory, even through another backbone around the same model, neither moves nor sees the addressing."""
    first, second = gated_memory(backbone, slice(0, 1)), gated_memory(backbone, slice(1, 2))
    twin = tr.wrap(backbone.model, backbone.tokenizer)
    # Repeated rows: fewer are addressed than the batch has, in another order.
    rows = masked_rows(backbone, 8)[[1, 0, 1, 0, 6]]
    alone = []
    for memory in (first, second):
        with memory.attached(backbone) as attachment:
            backbone.logits(rows)
        alone.append(attachment.hits)
    with first.attached(backbone) as one, second.attached(twin) as two:
        backbone.logits(rows)
        backbone.logits(rows.flip(0))
    assert one.hits == {name: 2 * n for name, n in alone[0].items()}
    assert two.hits == {name: 2 * n for name, n in alone[1].items()}
    assert one.hits_by_step == {0: one.hits.total()}

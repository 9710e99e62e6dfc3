"""Two memories: what differs, one made of both, and one built again for another model."""

import pytest
import torch

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome.memory import EditConflictError, MemoryMismatchError

BANK = tr.BankConfig((None,), (0.0, 0.5))


def build(backbone, facts, **more):
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]))
    return tr.EditMemory.build(backbone, facts, **{"gate": gate, "bank": BANK, "coordinate": tr.Coordinate(1), **more})


def logits(backbone, memory):
    ids = torch.tensor([backbone.encode(f.prompt) + [backbone.mask_id] * 3 for f in tiny_facts(4)])
    with memory.attached(backbone), torch.no_grad():
        return backbone.logits(ids)


def test_merged_is_what_would_have_been_built_of_both():
    backbone, facts = tiny_llada(), tiny_facts(4)
    both, one, other = (build(backbone, part) for part in (facts, facts[:2], facts[2:]))
    assert one.diff(other).added == ("tiny-2", "tiny-3")
    assert one.diff(other).removed == ("tiny-0", "tiny-1")
    assert one.merge(other) == ("tiny-2", "tiny-3")
    assert not one.diff(both)
    assert torch.equal(logits(backbone, one), logits(backbone, both))
    assert one.merge(other) == ()  # they are there already
    one.undo("tiny-2", "tiny-3")
    assert torch.equal(logits(backbone, one), logits(backbone, build(backbone, facts[:2])))


def test_conflicts_are_settled_as_by_insert():
    backbone, facts = tiny_llada(), tiny_facts(2)
    one = build(backbone, facts[:1])
    changed = [facts[0].with_new_object("kex")]
    other = build(backbone, changed, estimator="lens", coordinate=None)
    assert one.diff(other).changed == ("tiny-0",)
    with pytest.raises(EditConflictError, match="Nothing was changed"):
        one.merge(other)
    assert one.merge(other, on_conflict="keep") == ()
    [name] = one.merge(other, on_conflict="replace")
    assert [edit.fact.new_object for edit in one.edits] == ["kex"]
    one.undo(name)
    assert [edit.id for edit in one.edits] == ["tiny-0"]


def test_memories_that_do_not_fit_are_refused():
    backbone, facts = tiny_llada(), tiny_facts(2)
    one = build(backbone, facts[:1])
    with pytest.raises(MemoryMismatchError, match="gate"):
        one.merge(build(backbone, facts[1:], gate=None))
    torch.manual_seed(1)
    stranger = tiny_llada()
    with torch.no_grad():
        next(stranger.model.parameters()).add_(0.1)
    with pytest.raises(MemoryMismatchError, match="rebase"):
        one.merge(build(stranger, facts[1:]))
    assert [edit.id for edit in one.edits] == ["tiny-0"]


def test_rebased_is_what_would_have_been_built_there():
    backbone, facts = tiny_llada(), tiny_facts(3)
    memory = build(backbone, facts)
    memory.undo("tiny-1")
    changed = tiny_llada()
    with torch.no_grad():
        next(changed.model.parameters()).add_(0.05)
    moved = memory.rebase(changed)
    assert not moved.diff(build(changed, [facts[0], facts[2]]))
    assert moved.diff(memory).about == ("model", "spared questions")
    assert "tiny-1" in moved.retired
    assert [edit.id for edit in memory.edits] == ["tiny-0", "tiny-2"]
    with pytest.raises(MemoryMismatchError):
        memory.attached(changed)

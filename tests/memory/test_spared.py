"""Questions of undone edits: no other edit about their subject answers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import timerome as tr
from tests.memory.test_operations import BACKBONE, POOL, built, logits
from timerome.memory import EditFileError
from timerome.memory.address import AddressBook, Reading
from timerome.memory.files import FORMAT, read_manifest

TOWN, RIVER = POOL[1], POOL[3]  # two questions about one subject


def test_what_is_nearer_to_an_undone_question_is_given_none() -> None:
    """Planted: two edits, and an undone one beside the first; the better match decides, ties go to edits."""
    gate = tr.Gate(tr.FactSet(POOL[:1]), naming=0.0, layer=0)
    first, second, undone = normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.3, 0.0]]), dim=1)
    names, scores = [((1,),)] * 3, [torch.tensor([0.1])] * 2
    asked = torch.stack([first, second, undone, (first + 3 * undone) / 4, (3 * first + undone) / 4])
    found = Reading(asked, (frozenset({1}),) * len(asked))

    def given(*spared: torch.Tensor, allowed: torch.Tensor | None = None) -> list[int]:
        vectors = [v[None] for v in (first, second, *spared)]
        book = AddressBook.of(gate, torch.zeros(3), -1.0, vectors, names[: len(vectors)], scores)
        return book.lookup(found, allowed).tolist()

    assert given() == [0, 1, 0, 0, 0]
    assert given(undone) == [0, 1, -1, -1, 0]
    assert given(first) == [0, 1, 0, 0, 0]  # the same question again
    second_only = torch.tensor([[False, True]] * len(asked))
    assert given(undone, allowed=second_only) == [-1, 1, -1, -1, -1]


def answered(memory: tr.EditMemory, fact: tr.Fact) -> bool:
    """Whether an edit answers a fact's question."""
    ids = torch.tensor([BACKBONE.encode(fact.prompt) + [BACKBONE.mask_id] * 2])
    with memory.attached(BACKBONE) as attachment, torch.inference_mode():
        BACKBONE.logits(ids)
    return bool(attachment.hits)


@pytest.fixture
def memory() -> tr.EditMemory:
    """Two edits about one subject, of which the first would answer the other's question, too."""
    found = built("addressed", TOWN)
    found.forget(RIVER, backbone=BACKBONE)
    return found


def test_an_undone_question_is_left_alone(memory: tr.EditMemory, tmp_path: Path) -> None:
    assert answered(memory, RIVER)
    memory.undo(RIVER.id)
    assert not answered(memory, RIVER)
    assert answered(memory, TOWN)
    memory.save(tmp_path / "edit.safetensors")
    again = tr.EditMemory.load(tmp_path / "edit.safetensors", BACKBONE)
    assert not answered(again, RIVER)
    assert answered(again, TOWN)
    assert torch.equal(logits(memory), logits(again))


def test_it_tells_memories_apart(memory: tr.EditMemory, tmp_path: Path) -> None:
    memory.save(tmp_path / "edit.safetensors")
    other = tr.EditMemory.load(tmp_path / "edit.safetensors", BACKBONE)
    memory.undo(RIVER.id)
    other.undo(RIVER.id, spare=False)
    assert memory.diff(other).about == ("spared questions",)
    assert tr.EditCallback(memory).state_key != tr.EditCallback(other).state_key
    assert other.merge(memory) == ()  # which does not keep them apart


def test_nothing_stays_of_an_edit_where_nothing_should(memory: tr.EditMemory) -> None:
    """Then the other edit answers, which is what sparing is for."""
    memory.undo(RIVER.id, spare=False)
    assert memory.spared == ()
    assert memory.retired == (RIVER.id,)
    assert answered(memory, RIVER)


def test_until_an_edit_is_about_it_again(memory: tr.EditMemory) -> None:
    memory.undo(RIVER.id)
    assert [one.id for one in memory.spared] == [RIVER.id]
    [name] = memory.forget(RIVER, backbone=BACKBONE)
    assert memory.spared == ()
    assert answered(memory, RIVER)
    memory.undo(name)
    assert [one.id for one in memory.spared] == [name]


def test_what_an_undone_edit_had_superseded_acts_again(memory: tr.EditMemory) -> None:
    [name] = memory.update(RIVER.with_new_object("born"), backbone=BACKBONE)
    memory.undo(name)
    assert memory.spared == ()
    assert answered(memory, RIVER)


def test_not_without_a_row_gate() -> None:
    memory = built("paper", TOWN)
    memory.forget(RIVER, backbone=BACKBONE)
    memory.undo(RIVER.id)
    assert memory.spared == ()


@pytest.mark.parametrize("change", [{"id": "nobody"}, {"address": 0}, {"address": 99}, {"relation": 5}])
def test_files_that_spare_what_was_never_undone_are_refused(
    memory: tr.EditMemory, change: dict[str, object], tmp_path: Path
) -> None:
    memory.undo(RIVER.id)
    path = tmp_path / "edit.safetensors"
    memory.save(path)
    manifest = read_manifest(path)
    manifest["spared"][0] |= change
    save_file(load_file(path), path, {"format": FORMAT, "manifest": json.dumps(manifest)})
    with pytest.raises(EditFileError, match="spared|relation"):
        tr.EditMemory.load(path)

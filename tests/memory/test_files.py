"""Edit files: what is written comes back, and what is broken is said to be."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timerome as tr
from tests.lightning.loops import gated_memory, masked_rows, shared_memory
from tests.tiny import decoded_facts, tiny_dream, tiny_facts, tiny_llada
from timerome.memory import EditFileError, MemoryMismatchError
from timerome.memory.edit_file import FORMAT, _digest_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["paper", "placed", "keyed", "everything"]


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module", params=KINDS)
def memory(request: pytest.FixtureRequest, backbone: tr.Backbone) -> tr.EditMemory:
    if request.param == "paper":
        return shared_memory(backbone, slice(0, 3))
    if request.param == "placed":
        return gated_memory(backbone, slice(0, 2))
    memory, facts = tr.EditMemory(backbone), decoded_facts(backbone, 4)
    protect = tr.FactSet(tiny_facts(8)[6:])
    method = tr.Ridge(ridge=0.02, sparsity=0.25, alpha=1.5, protect=protect, beta=0.5, states=tr.BankConfig((None,)))
    memory.forget(facts[:2], answer=None, method=method, at=[0, tr.Coordinate(1, "mlp", 1, "subject_last")])
    if request.param == "everything":
        memory.replace(replace(facts[2], relation="capital", group="g", aliases=("per\u00fa",)), "old north king")
        memory.replace(replace(facts[2], id="again", relation="capital"), "born", threshold=-9.5)
        memory.replace(facts[3], "kex")
        memory.teach(tr.Fact(id="new", prompt="the river of oman is", subject="oman", object="old river"))
        memory.undo("tiny-0", "tiny-3")
    return memory


@pytest.fixture
def path(memory: tr.EditMemory, tmp_path: Path) -> Path:
    memory.save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


def logits(memory: tr.EditMemory, backbone: tr.Backbone) -> torch.Tensor:
    with memory.attached(backbone), torch.no_grad():
        return backbone.model(masked_rows(backbone, 8)).logits


# What comes back -------------------------------------------------------------------------------------------------


def test_round_trip_is_the_same_memory(backbone: tr.Backbone, memory: tr.EditMemory, path: Path) -> None:
    torch.manual_seed(11)  # not part of it
    again = tr.EditMemory.load(path, backbone)
    assert torch.equal(logits(again, backbone), logits(memory, backbone))
    assert again.digest() == memory.digest()
    assert again.facts == memory.facts
    assert repr(again) == repr(memory)
    assert again.nbytes == memory.nbytes
    assert not memory.diff(again)
    assert again.state.gone == memory.state.gone
    assert [replace(e, change=None, gate=None) for e in again.state.history] == [
        replace(e, change=None, gate=None) for e in memory.state.history
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_each_dtype_it_comes_back_as_it_was_rounded(
    backbone: tr.Backbone, memory: tr.EditMemory, tmp_path: Path, dtype: torch.dtype
) -> None:
    path, twice = tmp_path / "edit.safetensors", tmp_path / "twice.safetensors"
    memory.save(path, dtype=dtype)
    assert {t.dtype for t in load_file(path).values()} == {dtype}
    again = tr.EditMemory.load(path, backbone)
    again.save(twice, dtype=dtype)
    assert path.read_bytes() == twice.read_bytes()
    assert tr.EditMemory.load(twice).digest() == again.digest()
    rough = {torch.float32: 0.0, torch.bfloat16: 2.0, torch.float16: 0.3}[dtype]  # nearly parallel keys cancel
    assert (logits(again, backbone) - logits(memory, backbone)).abs().max() <= rough


def test_only_dtypes_that_hold_it(memory: tr.EditMemory, tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(EditFileError, match="expected float32, bfloat16 or float16"):
            memory.save(tmp_path / "edit.safetensors", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_an_empty_memory_and_what_was_undone(backbone: tr.Backbone, tmp_path: Path) -> None:
    memory = gated_memory(backbone)
    memory.undo("tiny-0")
    memory.save(tmp_path / "edit.safetensors")
    again = tr.EditMemory.load(tmp_path / "edit.safetensors", backbone)
    assert (len(again), again.state.gone) == (0, ("tiny-0",))
    assert again.replace(decoded_facts(backbone, 1)[0], "kex").id == "tiny-0.2"


def test_the_digest_is_of_everything(memory: tr.EditMemory) -> None:
    """Whatever is changed changes it, each tensor by one number too."""
    state = memory.state
    edit = state.history[0]
    others = [
        replace(state, fingerprint="x"), replace(state, tokenizer="x"), replace(state, gone=(*state.gone, "x")),
        replace(state, history=state.history[1:]), replace(state, history=(*state.history[1:], edit)),
        *(replace(state, history=(replace(edit, **change), *state.history[1:])) for change in (
            {"id": "x"}, {"says": "x"}, {"operation": "teach"}, {"supersedes": ("x",)},
            {"fact": replace(edit.fact, object="x")},
        )),
    ]  # fmt: skip
    if edit.gate is not None:
        more = ({"threshold": -3.3}, {"names": ("x",)}, {"wordings": ("x",)}, {"spellings": ((7,),)}, {"alone": True})
        others += [
            replace(state, history=(replace(edit, gate=replace(edit.gate, **m)), *state.history[1:])) for m in more
        ]
    found = [tr.EditMemory.of_state(other).digest() for other in (state, *others)]
    assert len(set(found)) == len(found)


def test_loads_without_a_backbone_and_is_checked_later(memory: tr.EditMemory, path: Path) -> None:
    again, other = tr.EditMemory.load(str(path)), tiny_llada(seed=5)
    with pytest.raises(MemoryMismatchError, match=f"{memory.fingerprint}.*{other.fingerprint()}"):
        again.attached(other)
    with pytest.raises(MemoryMismatchError, match=f"{memory.fingerprint}.*{other.fingerprint()}"):
        tr.EditMemory.load(path, other)
    with pytest.raises(MemoryMismatchError, match="Nothing was changed"):
        gated_memory(other).merge(again)


def test_a_file_that_lies_about_its_model(backbone: tr.Backbone, tmp_path: Path) -> None:
    """Deeper or wider than the model whose fingerprint it has."""
    for other in (tiny_llada(layers=5), tiny_llada(d=16)):
        memory = gated_memory(other)
        lying = replace(memory.state, fingerprint=backbone.fingerprint(), tokenizer=backbone.tokenizer_digest())
        tr.EditMemory.of_state(lying).save(tmp_path / "edit.safetensors")
        with pytest.raises(MemoryMismatchError, match="reaches layer"):
            tr.EditMemory.load(tmp_path / "edit.safetensors", backbone)


# What is broken --------------------------------------------------------------------------------------------------


def test_any_cut_is_noticed(path: Path, backbone: tr.Backbone) -> None:
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(EditFileError, match=r"edit\.safetensors is damaged or no safetensors file"):
            tr.EditMemory.load(path, backbone)
    path.write_bytes(whole)
    tr.EditMemory.load(path, backbone)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    """Every one of the tensors, and one in each eighth byte before them."""
    backbone, path = tiny_llada(), tmp_path / "edit.safetensors"
    gated_memory(backbone, answer="kex").save(path, dtype=torch.bfloat16)
    whole = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - start == 2 * 2 * 32  # one token and end-of-text
    flips = [(at, at // 8 % 8) for at in range(0, start, 8)]
    flips += [(at, bit) for at in range(start, len(whole)) for bit in range(8)]
    for at, bit in flips:
        whole[at] ^= 1 << bit
        path.write_bytes(whole)
        with pytest.raises(EditFileError):
            tr.EditMemory.load(path)
        whole[at] ^= 1 << bit
    path.write_bytes(whole)
    tr.EditMemory.load(path, backbone)


def test_foreign_files(tmp_path: Path, backbone: tr.Backbone) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EditFileError, match=r"expected a file of format 'timerome-edit-.*has \[\]"):
        tr.EditMemory.load(tmp_path / "model.safetensors", backbone)
    (tmp_path / "notes.txt").write_text("not a safetensors file, but long enough to look at")
    with pytest.raises(EditFileError, match="damaged or no safetensors"):
        tr.EditMemory.load(tmp_path / "notes.txt")
    with pytest.raises(EditFileError, match="there is no file"):
        tr.EditMemory.load(tmp_path / "none")
    with pytest.raises(EditFileError):
        tr.EditMemory.load(tmp_path)  # a folder


def rewritten(path: Path, change: object, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Change a file's manifest, and its tensors with their digest: by somebody who knows how."""
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()[FORMAT])
    found = {**load_file(path), **(tensors or {})}
    change(manifest)  # type: ignore[operator]
    manifest["digest"] = _digest_of(manifest, found)
    save_file(found, path, {FORMAT: json.dumps(manifest)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(edits=[]), "tensors that no edit has"),
        (lambda m: m.update(more=1), "an object with the fields"),
        (lambda m: m.pop("gone"), "an object with the fields"),
        (lambda m: m.update(gone=[m["edits"][0]["id"]]), "not distinct"),
        (lambda m: m.update(fingerprint=None), "fingerprint: expected str, got None"),
        (lambda m: m["edits"][0].update(id=""), "ids are empty"),
        (lambda m: m["edits"][0].update(operation="insert"), "operations other than"),
        (lambda m: m["edits"][0].update(supersedes=["nobody"]), "supersedes one that was not before it"),
        (lambda m: m["edits"][0].update(placed=None, keyed=None), "adds nothing, or two things"),
        (lambda m: m["edits"][0]["fact"].update(prompt=""), "manifest"),
        (lambda m: m["edits"][0]["fact"].update(nobody=""), "manifest"),
        (lambda m: m["edits"].append({**m["edits"][-1], "id": "twin", "supersedes": []}), "about one subject and rel"),
    ],
)
def test_manifests_that_lie(path: Path, change: object, message: str) -> None:
    rewritten(path, change)
    with pytest.raises(EditFileError, match=message):
        tr.EditMemory.load(path)


@pytest.mark.parametrize("text", ["{", "", "null", '{"version": "1", "version": "2"}', "[" * 100_000])
def test_manifests_that_are_no_json(path: Path, text: str) -> None:
    save_file(load_file(path), path, {FORMAT: text})
    with pytest.raises(EditFileError, match="edit file must"):
        tr.EditMemory.load(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(path: Path, value: float) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = value
    rewritten(path, lambda m: None, tensors)
    with pytest.raises(EditFileError, match="finite"):
        tr.EditMemory.load(path)


# Whole or not at all ---------------------------------------------------------------------------------------------


def test_a_failing_move_leaves_nothing_half_written(
    memory: tr.EditMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    kept = tmp_path / "kept.safetensors"
    memory.save(kept)
    before = kept.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    for target in (tmp_path / "new.safetensors", kept):
        with pytest.raises(OSError, match="disk full"):
            memory.save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]
    assert kept.read_bytes() == before


def test_a_failing_write_leaves_nothing_half_written(
    memory: tr.EditMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensors: object, name: str, **_: object) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.save(tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_others_and_folders_are_made(memory: tr.EditMemory, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "edit.safetensors"
    memory.save(path)
    assert path.stat().st_mode & 0o044 == 0o044  # temporary files are made for their owner alone


def test_a_file_is_as_large_as_its_tensors(backbone: tr.Backbone, tmp_path: Path) -> None:
    """What edits of one call share, as protected keys, is there once; manifests are two kilobytes an edit."""
    memory, path = tr.EditMemory(backbone), tmp_path / "edit.safetensors"
    method = tr.Ridge(rank=2, protect=tr.FactSet(tiny_facts(8)[2:]), states=tr.BankConfig((None,)))
    memory.forget(decoded_facts(backbone, 4), answer=None, method=method, at=1)
    memory.save(path)
    assert sorted(t.dim() for t in load_file(path).values()) == [1] + [2] * (4 * 2 + 1)
    gated_memory(backbone).save(path, dtype=torch.bfloat16)
    assert path.stat().st_size < 4 * 32 * 2 + 2500

"""Edit files: what is written comes back, and what is broken is said to be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timerome as tr
from tests.callbacks.loops import gated_memory, masked_rows, shared_memory
from tests.tiny import tiny_dream, tiny_facts, tiny_llada
from timerome.memory import EditFileError, MemoryMismatchError
from timerome.memory.files import FORMAT


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module", params=["shared", "gated", "projected", "everything"])
def memory(request: pytest.FixtureRequest, backbone: tr.Backbone) -> tr.EditMemory:
    if request.param == "shared":
        return shared_memory(backbone, slice(0, 3))
    if request.param == "gated":
        return gated_memory(backbone, slice(0, 2))
    if request.param == "projected":
        protect = tr.FactSet(tiny_facts(8)[5:])
        return tr.EditMemory.build(
            backbone, tiny_facts(2), coordinate=tr.Coordinate(1), protect=protect, null_space=0.9
        )
    facts = [fact.with_new_object("old north king") for fact in tiny_facts(2)]
    return tr.EditMemory.build(
        backbone, facts, coordinate=tr.Coordinate(2, step=1), alpha=1.5, ridge=0.02, sparsity=0.25, rank=40, beta=0.5,
        protect=tr.FactSet(tiny_facts(4)[3:]), gate=tr.Gate(tr.FactSet(tiny_facts(8)[4:]), token=True, layer=1),
        estimator="lens", margin=5.0, bank=tr.BankConfig(canvases=(None, 6), reveal=(0.0, 0.5), seed=3),
    )  # fmt: skip


@pytest.fixture
def path(memory: tr.EditMemory, tmp_path: Path) -> Path:
    path = tmp_path / "edit.safetensors"
    memory.save(path)
    return path


def test_round_trip_gives_bit_identical_logits(backbone: tr.Backbone, memory: tr.EditMemory, path: Path) -> None:
    rows = masked_rows(backbone, 8)
    torch.manual_seed(11)  # not part of it
    again = tr.EditMemory.load(path, backbone)
    with memory.attached(backbone) as one:
        wanted = backbone.logits(rows)
    with again.attached(backbone) as two:
        assert torch.equal(backbone.logits(rows), wanted)
    assert one.hits == two.hits != {}
    assert not torch.equal(backbone.logits(rows), wanted)
    assert again.settings == memory.settings
    assert again.facts == memory.facts
    assert repr(again) == repr(memory)
    assert again.nbytes == memory.nbytes


def test_loads_without_a_backbone_and_is_checked_later(memory: tr.EditMemory, path: Path) -> None:
    again = tr.EditMemory.load(str(path))
    other = tiny_llada(seed=5)
    with pytest.raises(MemoryMismatchError, match=f"{memory.fingerprint}.*{other.fingerprint()}"):
        again.attached(other)
    with pytest.raises(MemoryMismatchError, match=f"{memory.fingerprint}.*{other.fingerprint()}"):
        tr.EditMemory.load(path, other)


def test_saving_twice_gives_the_same_bytes(backbone: tr.Backbone, path: Path, tmp_path: Path) -> None:
    tr.EditMemory.load(path, backbone).save(tmp_path / "again.safetensors")

    def contents(file: Path) -> tuple[dict, dict[str, bytes]]:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["manifest"])
        return about, {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}

    assert contents(path) == contents(tmp_path / "again.safetensors")


def test_any_cut_is_noticed(path: Path, backbone: tr.Backbone) -> None:
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(EditFileError, match=r"edit\.safetensors is damaged or no safetensors file"):
            tr.EditMemory.load(path, backbone)
    path.write_bytes(whole)
    tr.EditMemory.load(path, backbone)


def test_foreign_files(tmp_path: Path, backbone: tr.Backbone) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EditFileError, match=r"expected a file of format 'timerome-edit-.*has None"):
        tr.EditMemory.load(tmp_path / "model.safetensors", backbone)
    (tmp_path / "notes.txt").write_text("not a safetensors file, but long enough to look at")
    with pytest.raises(EditFileError, match="damaged or no safetensors"):
        tr.EditMemory.load(tmp_path / "notes.txt")
    with pytest.raises(EditFileError, match="there is no file"):
        tr.EditMemory.load(tmp_path / "none")
    with pytest.raises(EditFileError):
        tr.EditMemory.load(tmp_path)  # a folder


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["manifest"])
    manifest.update(changes)
    manifest = {k: v for k, v in manifest.items() if v != "gone"}
    save_file({**load_file(path), **(tensors or {})}, path, {**metadata, "manifest": json.dumps(manifest)})


@pytest.mark.parametrize(
    "changes",
    [{"edits": []}, {"settings": "gone"}, {"settings": []}, {"settings": [{"coordinate": {}}]}, {"more": 1}],
)
def test_manifests_that_lie(path: Path, changes: dict[str, object]) -> None:
    rewrite(path, **changes)
    with pytest.raises(EditFileError, match="does not hold what"):
        tr.EditMemory.load(path)


def test_manifests_that_are_no_json(path: Path) -> None:
    save_file(load_file(path), path, {"format": FORMAT, "manifest": "{"})
    with pytest.raises(EditFileError, match="unreadable"):
        tr.EditMemory.load(path)


def test_values_that_are_not_finite_are_refused(path: Path, backbone: tr.Backbone) -> None:
    keys = load_file(path)["keys"]
    keys[0, 0] = torch.nan
    rewrite(path, {"keys": keys})
    with pytest.raises(EditFileError, match="finite"):
        tr.EditMemory.load(path, backbone)


def test_a_failing_move_leaves_nothing_half_written(
    memory: tr.EditMemory, backbone: tr.Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr("timerome.memory.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.save(tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_others_and_folders_are_made(memory: tr.EditMemory, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "edit.safetensors"
    memory.save(path)
    assert path.stat().st_mode & 0o044 == 0o044  # temporary files are made for their owner alone

"""A gate calibrated once serves every memory behind it, and is a file that nothing else passes for."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome.memory import Calibration, EditFileError, MemoryMismatchError
from timerome.memory.address import Gate

BANK = tr.BankConfig((None, 6), reveal=(0.0, 0.5))


@pytest.fixture(scope="module")
def backbone():
    return tiny_llada()


@pytest.fixture(scope="module")
def gate():
    return Gate(tr.FactSet(tiny_facts(8)[4:]), epsilon=0.3, related=tr.FactSet(tiny_facts(8)[4:]))


@pytest.fixture(scope="module")
def calibration(backbone, gate):
    return Calibration.of(backbone, gate, bank=BANK, coordinates=[tr.Coordinate(1)])


def forwards(backbone, run):
    """Number of forwards, and what ``run`` returns."""
    count = [0]
    handle = backbone.embedding.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    try:
        return run(), count[0]
    finally:
        handle.remove()


def same(one: tr.EditMemory, other: tr.EditMemory) -> bool:
    assert one.book is not None and other.book is not None
    pairs = [(one.book.threshold, other.book.threshold), (one.book.floor, other.book.floor)]
    tensors = [(one.book.vectors, other.book.vectors), (one.book.mean, other.book.mean)]
    systems = zip(one.systems, other.systems, strict=True)
    tensors += [pair for s, t in systems for pair in zip(s.solved, t.solved, strict=True)]
    return all(a == b for a, b in pairs) and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("estimator", ["null", "lens"])
def test_a_memory_is_as_if_its_gate_were_read_for_it(backbone, gate, calibration, estimator):
    facts = [f.with_new_object("kex key") if estimator == "lens" else f for f in tiny_facts(2)]
    where = tr.Coordinate(1)
    how = {"estimator": estimator, "bank": BANK, "by_place": False, "coordinate": where}
    plain, many = forwards(backbone, lambda: tr.EditMemory.build(backbone, facts, gate=gate, **how))
    quick, few = forwards(backbone, lambda: tr.EditMemory.build(backbone, facts, gate=calibration, **how))
    assert same(plain, quick)
    assert few < many
    more, n = forwards(backbone, lambda: quick.forget(tiny_facts(4)[3], coordinate=where))
    assert more
    assert n < many


def test_it_is_a_file(backbone, calibration, tmp_path):
    calibration.save(tmp_path / "gate.safetensors")
    again = Calibration.load(tmp_path / "gate.safetensors", backbone)
    assert again.gate == calibration.gate and again.bank == calibration.bank and again.floor == calibration.floor
    assert again.negatives.prompts == calibration.negatives.prompts
    memories = [
        tr.EditMemory.build(backbone, tiny_facts(2), gate=c, coordinate=tr.Coordinate(1)) for c in (calibration, again)
    ]
    assert same(*memories)
    # A memory's file keeps what its gate was read over, whatever its edits were read over.
    memories[0].save(tmp_path / "edit.safetensors")
    loaded = tr.EditMemory.load(tmp_path / "edit.safetensors", backbone)
    assert loaded.background.bank == BANK != loaded.settings.bank
    assert same(memories[0], loaded)


def test_another_model_is_refused(calibration, tmp_path):
    other = tiny_llada(seed=5)
    with pytest.raises(MemoryMismatchError, match="calibrate it anew"):
        tr.EditMemory.build(other, tiny_facts(1), gate=calibration)
    calibration.save(tmp_path / "gate.safetensors")
    with pytest.raises(MemoryMismatchError, match=calibration.fingerprint):
        Calibration.load(tmp_path / "gate.safetensors", other)


def test_protected_facts_make_frames_of_their_own(backbone, calibration):
    protect = tr.FactSet(tiny_facts(8)[7:])
    memory = tr.EditMemory.build(
        backbone, tiny_facts(1), gate=calibration, protect=protect, coordinate=tr.Coordinate(1)
    )
    (frame,) = memory.background.frames.values()
    assert frame.protect is not None
    assert all(known.protect is None for known in calibration.frames.values())


def test_a_token_gate_alone_has_nothing_to_calibrate_here(backbone):
    with pytest.raises(ValueError, match="address=True"):
        Calibration.of(backbone, Gate(tr.FactSet(tiny_facts(8)[4:]), address=False, token=True))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, m: t.pop("wording"),
        lambda t, m: t.update(wording=t["wording"] + 1),
        lambda t, m: t.update(wording=t["wording"].float()),
        lambda t, m: t.update(vectors=t["vectors"] * torch.nan),
        lambda t, m: t.update(vectors=t["vectors"][:, :4].contiguous()),
        lambda t, m: t.update(tokens=t["tokens"][1:]),
        lambda t, m: t.update(lengths=t["lengths"] - 9),
        lambda t, m: t.update(centre=t["centre"][None]),
        lambda t, m: m.update(floor="0"),
        lambda t, m: m["frames"].append(m["frames"][0]),
        lambda t, m: m["bank"].update(canvases=[1 << 40]),
        lambda t, m: m["gate"].pop("span"),
        lambda t, m: m.clear(),
    ],
)
def test_a_spoilt_file_is_refused(calibration, tmp_path, spoil):
    path = tmp_path / "gate.safetensors"
    calibration.save(path)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    tensors = load_file(path)
    spoil(tensors, manifest)
    save_file(tensors, path, {"format": "timerome-calibration-1", "manifest": json.dumps(manifest)})
    with pytest.raises(EditFileError, match=r"gate\.safetensors"):
        Calibration.load(path)


def test_a_file_that_is_no_calibration_is_refused(calibration, backbone, tmp_path):
    with pytest.raises(EditFileError, match="no file"):
        Calibration.load(tmp_path / "none.safetensors")
    tr.EditMemory.build(backbone, tiny_facts(1), coordinate=tr.Coordinate(1)).save(tmp_path / "edit.safetensors")
    with pytest.raises(EditFileError, match="timerome-calibration-1"):
        Calibration.load(tmp_path / "edit.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(EditFileError, match="damaged"):
        Calibration.load(tmp_path / "cut.safetensors")

"""Edit files from somebody one does not trust: refused with a message, or a memory that does no more than edit."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timerome as tr
from tests.lightning.loops import masked_rows, shared_memory
from tests.tiny import tiny_facts, tiny_llada
from timerome.cli import main
from timerome.memory import EditFileError, MemoryMismatchError
from timerome.memory.edit_file import FORMAT, _digest_of

BACKBONE = tiny_llada(layers=2)
ROWS = masked_rows(BACKBONE, 8)
# Shrinking takes minutes where a load does not fail but uses the model.
FUZZ = settings(
    max_examples=60, deadline=None, phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip


@cache
def files() -> tuple[bytes, ...]:
    """Edit files of every kind there is."""
    facts, states = tiny_facts(4), tr.BankConfig((None,), (0.0,))
    protect = tr.FactSet(tiny_facts(5)[4:])
    several = tr.EditMemory(BACKBONE)
    several.replace(facts[0], "old north king")
    method = tr.Ridge(rank=2, protect=protect, states=states)
    several.forget(facts[1], answer=None, at=[tr.Coordinate(0), tr.Coordinate(1, "mlp")], method=method)
    several.replace(facts[0], "kex", threshold=-3.5)
    several.teach(tr.Fact(id="new", prompt="the river of oman is", subject="oman", object="old river"))
    several.undo("tiny-0")
    memories = [
        shared_memory(BACKBONE, slice(0, 2), rank=2),
        shared_memory(BACKBONE, slice(0, 2), rank=2, protect=protect),
        several,
    ]
    found = []
    with TemporaryDirectory() as folder:
        for memory in memories:
            memory.save(Path(folder) / "edit.safetensors")
            found.append((Path(folder) / "edit.safetensors").read_bytes())
    return tuple(found)


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that could run code is so much as called."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("an edit file was unpickled")

    for where, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(where, name, forbidden)


def opened(file: Path) -> None:
    """Open a file and, if it can be opened, use it in every way."""
    try:
        memory = tr.EditMemory.load(file, BACKBONE)
    except EditFileError as error:
        assert str(file) in str(error)
        assert len(str(error)) < 2000
        return
    except MemoryMismatchError:
        return
    repr(memory)
    assert memory.nbytes < 1 << 26
    memory.save(file.with_suffix(".again.safetensors"))
    tr.EditMemory.load(file.with_suffix(".again.safetensors"), BACKBONE)
    try:
        with memory.attached(BACKBONE), torch.inference_mode():
            BACKBONE.logits(ROWS)
    except FloatingPointError:  # targets may be finite and yet too large
        return
    memory.undo(*[edit.id for edit in memory.state.history])


def written(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "edit.safetensors").write_bytes(data)
        opened(Path(folder) / "edit.safetensors")


def taken_apart(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "edit.safetensors"
        file.write_bytes(data)
        with safe_open(file, framework="pt") as inside:
            return json.loads(inside.metadata()[FORMAT]), load_file(file)


def put_together(manifest: dict[str, Any] | str, tensors: dict[str, torch.Tensor], *, sealed: bool = True) -> None:
    """Write a file by somebody who knows how: the digest is that of what is in it."""
    if isinstance(manifest, dict):
        manifest = {**manifest, "digest": _digest_of(manifest, tensors)} if sealed else manifest
        manifest = json.dumps(manifest)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "edit.safetensors"
        save_file(tensors, file, {FORMAT: manifest})
        opened(file)


def test_the_files_themselves_are_good() -> None:
    for data in files():
        manifest, tensors = taken_apart(data)
        assert manifest["digest"] == _digest_of(manifest, tensors)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "edit.safetensors"
            save_file(tensors, file, {FORMAT: json.dumps(manifest)})
            assert tr.EditMemory.load(file, BACKBONE).state.history


# Bytes -----------------------------------------------------------------------------------------------------------

at = st.floats(0, 1, exclude_max=True)


@FUZZ
@given(st.integers(0, 2), st.lists(st.tuples(at, st.integers(0, 7)), min_size=1, max_size=8), st.booleans())
def test_bits_that_flipped(which: int, flips: list[tuple[float, int]], in_header: bool) -> None:
    data = bytearray(files()[which])
    length = struct.unpack("<Q", data[:8])[0] + 8 if in_header else len(data)
    for where, bit in flips:
        data[int(where * length)] ^= 1 << bit
    written(bytes(data))


@FUZZ
@given(st.integers(0, 2), at, at, st.binary(max_size=64))
def test_parts_that_are_missing_or_others(which: int, start: float, stop: float, instead: bytes) -> None:
    data = files()[which]
    start, stop = sorted((start, stop))
    written(data[: int(start * len(data))] + instead + data[int(stop * len(data)) :])


@pytest.mark.parametrize("size", [0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1])
def test_headers_of_any_size(size: int) -> None:
    written(struct.pack("<Q", size) + files()[0][8:])


@FUZZ
@given(st.sampled_from(["shape", "data_offsets", "dtype"]), st.data())
def test_headers_that_lie_about_tensors(field: str, data: st.DataObject) -> None:
    whole = files()[data.draw(st.integers(0, 2))]
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    entry = header[data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))]
    sizes = st.lists(st.sampled_from([-1, 0, 1, 2, 32, 2**31, 2**62, 2**63, 2**64, 1e9]), max_size=4)
    names = st.sampled_from(["F64", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "BF16", "U16", "C64", "F4", "", "x"])
    entry[field] = data.draw(names if field == "dtype" else sizes)
    text = json.dumps(header).encode()
    written(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def test_pickles() -> None:
    """What torch.save writes, in both of its formats, and a bare pickle."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a pickle was run",))

    with TemporaryDirectory() as folder:
        for new in (True, False):
            torch.save({"targets": torch.ones(1, 32)}, Path(folder) / "edit.pt", _use_new_zipfile_serialization=new)
            written((Path(folder) / "edit.pt").read_bytes())
    written(pickle.dumps(Evil()))


# Manifests -------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path in a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**31, 2**53 - 1, 2**64, 1e308, "block", "mlp", "object", "teach", "null", "tiny-0"])
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
) | st.builds(nested, st.sampled_from([50, 500, 900]), st.sampled_from(["list", "dict"]))  # fmt: skip


@settings(FUZZ, max_examples=120)
@given(st.data())
def test_manifests_with_other_values(data: st.DataObject) -> None:
    manifest, tensors = taken_apart(files()[data.draw(st.integers(0, 2))])
    manifest = copy.deepcopy(manifest)
    for _ in range(data.draw(st.sampled_from([1, 1, 2]))):
        *path, last = data.draw(st.sampled_from([p for p in places(manifest) if p]))
        parent = manifest
        for key in path:
            parent = parent[key]
        what = data.draw(st.sampled_from(["other", "other", "other", "gone", "twice", "more", "neighbour"]))
        if what == "gone":
            del parent[last]
        elif what == "twice" and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif what == "more" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=5))] = data.draw(anything)
        elif what == "neighbour":  # a value that is right elsewhere
            parent[last] = copy.deepcopy(parent[data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict)
                                                                          else range(len(parent))))])  # fmt: skip
        else:
            parent[last] = data.draw(anything)
    put_together(manifest, tensors)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '"x"', "NaN", "[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900]
)
def test_manifests_that_are_none(text: str) -> None:
    put_together(text, taken_apart(files()[0])[1])


# Tensors ---------------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


@settings(FUZZ, max_examples=120)
@given(st.data())
def test_other_tensors(data: st.DataObject) -> None:
    manifest, tensors = taken_apart(files()[data.draw(st.integers(0, 2))])
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    what = data.draw(st.sampled_from(["value", "value", "dtype", "shape", "rows", "gone", "more", "renamed", "width"]))
    if what == "value":
        values = st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, 3e38, -3e38, 1e-45, 1e19])
        whole = st.sampled_from([-1, -(2**31), 2**31 - 1, 99])
        value = data.draw(values if tensor.is_floating_point() else whole)
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
    elif what == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
    elif what == "shape":
        shape = data.draw(st.sampled_from([(), (0,), (-1,), (1, -1), (-1, 1), (0, tensor.shape[-1]), (1, 1, -1)]))
        size = max(1, abs(int(torch.tensor(shape).prod()))) if -1 not in shape else 0
        tensors[name] = tensor.reshape(shape) if not size else torch.zeros(shape)
    elif what == "rows":
        tensors[name] = torch.cat([tensor] * data.draw(st.integers(2, 3)))
    elif what == "gone":
        del tensors[name]
    elif what == "more":
        tensors[data.draw(st.text(max_size=9).filter(lambda n: n != "__metadata__"))] = tensor.clone()
    elif what == "renamed":
        tensors[data.draw(st.sampled_from(["99", "-1", "00", "x"]))] = tensors.pop(name)
    else:  # all of them of another width, as of a model of another size
        width = data.draw(st.sampled_from([1, 31, 33, 64]))
        tensors = {n: torch.ones(*t.shape[:-1], width) for n, t in tensors.items()}
    put_together(manifest, tensors)


# From the shell --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["bytes", "manifest", "tensor"])
def test_the_shell_says_it_in_one_line(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "edit.safetensors"
    manifest, tensors = taken_apart(files()[0])
    if harm == "bytes":
        file.write_bytes(files()[0][:-1])
    else:
        if harm == "manifest":
            manifest["edits"] = nested(900, "list")
        else:
            tensors["0"] = torch.full_like(tensors["0"], torch.nan)
        manifest["digest"] = "x" if harm == "manifest" else _digest_of(manifest, tensors)
        save_file(tensors, file, {FORMAT: json.dumps(manifest)})
    assert main(["inspect", str(file)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

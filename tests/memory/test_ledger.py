"""The ledger: what is recorded, that tampering shows, and that a crash loses nothing that was recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome.memory import Ledger, LedgerError


def at_noon():
    return datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


@pytest.fixture
def memory(tmp_path):
    found = tr.EditMemory.build(tiny_llada(), tiny_facts(1))
    found.ledger = Ledger(tmp_path / "ledger.jsonl", measure=lambda m: {"edits": len(m.edits)}, clock=at_noon)
    return found


def test_every_change_is_an_entry_that_names_no_text(memory, tmp_path):
    memory.forget(tiny_facts(3)[1:])
    memory.undo("tiny-1")
    text = (tmp_path / "ledger.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["operation"], [e["fact"] for e in first["edits"]]) == ("forget", ["tiny-1", "tiny-2"])
    assert (second["operation"], second["edits"][0]["id"], second["in_force"]) == ("undo", "tiny-1", 2)
    assert (first["after"], second["before"], second["after"]) == ({"edits": 3}, {"edits": 3}, {"edits": 2})
    assert second["previous"] == first["hash"]
    assert all(fact.object not in text for fact in tiny_facts(3))
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.head == memory.ledger.head == second["hash"]


@pytest.fixture
def written(memory, tmp_path):
    """A ledger of three entries, a copy of it, and what it holds."""
    for fact in tiny_facts(4)[1:]:
        memory.forget(fact)
    path = tmp_path / "ledger.jsonl"
    path.with_suffix(".good").write_bytes(path.read_bytes())
    return path, memory.ledger.entries


@pytest.mark.parametrize("harm", ["change", "drop", "swap", "garbage"])
def test_a_changed_file_is_refused(memory, tmp_path, harm):
    for fact in tiny_facts(4)[1:]:
        memory.forget(fact)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines()
    if harm == "change":
        lines[1] = lines[1].replace("tiny-2", "tiny-9")
    elif harm == "drop":
        del lines[1]
    elif harm == "swap":
        lines[0], lines[1] = lines[1], lines[0]
    else:
        lines[1] = "[]"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match=r"ledger.jsonl, line [12]"):
        Ledger(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_that_flips_is_noticed(written, where, bit):
    """Only the very last line feed may go: an entry without one was never finished."""
    path, entries = written
    data = bytearray(path.with_suffix(".good").read_bytes())
    at = int(where * len(data))
    data[at] ^= 1 << bit
    path.write_bytes(data)
    if at == len(data) - 1:
        assert Ledger(path).entries == entries[:-1]
    else:
        with pytest.raises(LedgerError, match=r"ledger.jsonl, line [123]"):
            Ledger(path)


@pytest.mark.parametrize("line", ["null", "7", '"x"', "[" * 5000, '{"hash": 1}', '{"number": 0}', "NaN", "\x00", "{}"])
def test_what_is_no_ledger_is_refused(tmp_path, line):
    (tmp_path / "ledger.jsonl").write_text(line + "\n")
    with pytest.raises(LedgerError, match="line 1"):
        Ledger(tmp_path / "ledger.jsonl")


def test_a_line_cut_short_is_dropped_and_writing_goes_on(memory, tmp_path):
    memory.forget(tiny_facts(2)[1])
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"number": 1, "oper')
    memory.ledger = Ledger(path, clock=at_noon)
    memory.undo("tiny-1")
    assert [entry["operation"] for entry in Ledger(path).entries] == ["forget", "undo"]


def test_what_cannot_be_recorded_does_not_happen(memory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    before = [edit.id for edit in memory.edits]
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        memory.forget(tiny_facts(2)[1])
    assert [edit.id for edit in memory.edits] == before
    assert (tmp_path / "ledger.jsonl").read_text() == ""


WRITER = """
import sys
import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome.memory import Ledger
backbone = tiny_llada()
memory = tr.EditMemory.build(backbone, tiny_facts(1))
memory.ledger = Ledger(sys.argv[1] + "/ledger.jsonl")
print("ready", flush=True)
while True:
    memory.undo(memory.forget(tiny_facts(2)[1]))
    memory.save(sys.argv[1] + "/edit.safetensors")
    print(len(memory.ledger.entries), flush=True)
"""


def test_killed_at_any_moment_file_and_ledger_are_whole(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told = int(line) if line.strip().isdigit() else told
        if told >= 8:
            break
    time.sleep(0.0137)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(Ledger(tmp_path / "ledger.jsonl").entries) >= told
    loaded = tr.EditMemory.load(tmp_path / "edit.safetensors", tiny_llada())
    assert [edit.id for edit in loaded.edits] == ["tiny-0"]


# Forks, since each moment needs a process of its own and importing torch takes seconds.
KILLED_AT = """
import os, signal, sys
import timerome as tr
import safetensors.torch as files
from tests.tiny import tiny_facts, tiny_llada
from timerome.memory import Ledger

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *a, **k: (function(*a, **k), die())

def torn_file(tensors, name, **more):
    written(tensors, name, **more)
    os.truncate(name, os.path.getsize(name) // 2)
    die()

def torn_line(handle):
    os.ftruncate(handle, os.fstat(handle).st_size - 20)
    die()

written = files.save_file
MOMENTS = {
    "save_half_written": (files, "save_file", torn_file), "save_before_move": (os, "replace", die),
    "save_after_move": (os, "replace", after(os.replace)), "ledger_half_written": (os, "fsync", torn_line),
    "ledger_before_sync": (os, "fsync", die), "ledger_after_sync": (os, "fsync", after(os.fsync)),
}
backbone = tiny_llada()
memory = tr.EditMemory.build(backbone, tiny_facts(1))
for moment, (where, name, instead) in MOMENTS.items():
    child = os.fork()
    if child == 0:
        folder = sys.argv[1] + "/" + moment
        memory.ledger = Ledger(folder + "/ledger.jsonl")
        memory.forget(tiny_facts(2)[1])
        memory.save(folder + "/edit.safetensors")
        if moment.startswith("save"):
            memory.forget(tiny_facts(3)[2])
        setattr(where, name, instead)
        memory.forget(tiny_facts(4)[3]) if moment.startswith("ledger") else memory.save(folder + "/edit.safetensors")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(moment, os.WTERMSIG(status), flush=True)
"""


def test_killed_at_every_stage_of_a_write(tmp_path):
    """What was recorded before is there, and what was being written is there whole or not at all."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
        # A forked child has none of its parent's threads, and would wait for them for ever.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    moments = dict(line.split() for line in run.stdout.splitlines())
    assert set(moments.values()) == {str(int(signal.SIGKILL))}
    assert len(moments) == 6
    backbone = tiny_llada()
    for moment in moments:
        ledger = Ledger(tmp_path / moment / "ledger.jsonl")
        recorded = [entry["edits"][0]["id"] for entry in ledger.entries]
        memory = tr.EditMemory.load(tmp_path / moment / "edit.safetensors", backbone)
        saved = [edit.id for edit in memory.edits]
        if moment.startswith("save"):
            assert recorded == ["tiny-1", "tiny-2"]
            assert saved == ["tiny-0", "tiny-1", *["tiny-2"] * (moment == "save_after_move")]
        else:
            # A process that is killed leaves to the system what it has handed over, synchronised or not.
            assert recorded == ["tiny-1", *["tiny-3"] * (moment != "ledger_half_written")]
            assert saved == ["tiny-0", "tiny-1"]
        memory.ledger = ledger  # and work goes on
        memory.forget(tiny_facts(5)[4])
        memory.save(tmp_path / moment / "edit.safetensors")
        assert Ledger(tmp_path / moment / "ledger.jsonl").entries == ledger.entries

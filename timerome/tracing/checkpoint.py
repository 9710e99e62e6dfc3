"""Checkpoints of a trace: a file of JSON lines, one header and one line a fact."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """The file is no checkpoint of this trace."""


class Checkpoint:
    """What of a trace is done, kept in a file so that a stopped run goes on.

    The file is first written whole, beside its place, and moved there. Each finished fact is then one appended line,
    synchronised to disk; a line that a crash cut short is dropped when the file is read again. So at any moment the
    file holds exactly the finished facts. Numbers are written so that they read back bit for bit.

    Where several processes share a trace, each writes a file of its own, ``path`` and ``path.1``, ``path.2``, ..., and
    reads all of them, so that a trace goes on with another number of processes too.

    Args:
        path: the file; made if it does not exist.
        header: what the trace depends on, JSON-ready; a file with another one is refused.
        rank: of this process.

    Attributes:
        done: fact id -> its record.

    Raises:
        CheckpointError: the file is no checkpoint, or one of another trace.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], rank: int = 0) -> None:
        main = Path(path)
        self.path = main if rank == 0 else main.with_name(f"{main.name}.{rank}")
        self.done: dict[str, dict[str, Any]] = {}
        header = json.loads(json.dumps(header))
        for found in [main, *sorted(main.parent.glob(f"{glob.escape(main.name)}.*"))]:
            if found.exists() and (found == main or found.suffix[1:].isdigit()):
                self._read(found, header)
        # Written again also after reading, without whatever a crash left behind.
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("w") as file:
                for line in ({"timerome_trace_checkpoint": header}, *self.done.values()):
                    file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)

    def add(self, record: dict[str, Any]) -> None:
        """Append a finished fact's record, which has its ``id``."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[record["id"]] = record

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            text = ""
        first, *lines = text.split("\n")
        try:
            found = json.loads(first)["timerome_trace_checkpoint"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"CausalTracer.trace: {path} is no checkpoint of a trace; remove it or give another path."
            ) from None
        if found != header:
            names = sorted(name for name in {*found, *header} if found.get(name) != header.get(name))
            raise CheckpointError(
                f"CausalTracer.trace: the checkpoint {path} is of another trace, which differs in "
                f"{', '.join(names)}; remove it or give another path."
            )
        for line in lines[:-1]:  # what follows the last line end is empty, or a line cut short
            record = json.loads(line)
            self.done[record["id"]] = record

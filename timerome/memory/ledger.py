"""An append-only record of what was inserted and removed, when, and what it did, for requests to delete things."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .edits import Edit

if TYPE_CHECKING:
    from .memory import EditMemory

FIRST = "0" * 64  # what the first entry's chain begins with
Measure = Callable[["EditMemory"], Mapping[str, float]]


class LedgerError(ValueError):
    """The file is no ledger, or was changed after it was written."""


class Ledger:
    """A JSON-lines file, one entry a transaction, each with the hash of the one before.

    An entry is written and synchronised to disk before the memory counts as changed; a line that a crash cut short is
    dropped when the file is opened again. Whoever alters, drops or reorders an entry breaks the chain from there on;
    to notice that the *last* entries were cut off, keep :attr:`head` elsewhere. Entries hold the fact's id, and its
    texts only as hashes, so that a ledger of deletions does not keep what was to be deleted.

    Args:
        path: the file; made by the first entry.
        measure: called with the memory after each change; what it returns is recorded, beside what it returned before.
        clock: gives the time, for tests.

    Attributes:
        entries: all entries so far.

    Raises:
        LedgerError: the file is no ledger, or its chain is broken.

    Example:
        >>> import tempfile
        >>> import timerome as tr
        >>> from timerome.memory import Ledger
        >>> model, facts = tr.load("testbed"), tr.datasets.bundled("relations")
        >>> memory = tr.EditMemory(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     memory.ledger = Ledger(folder + "/ledger.jsonl")
        ...     memory.undo(memory.forget(facts[1]))
        ...     [entry["operation"] for entry in Ledger(folder + "/ledger.jsonl").entries]
        ['forget', 'undo']
    """

    def __init__(
        self, path: str | Path, *, measure: Measure | None = None, clock: Callable[[], datetime] | None = None
    ) -> None:
        self.path, self.measure = Path(path), measure
        self._clock = clock or (lambda: datetime.now(timezone.utc))
        self.entries: list[dict[str, Any]] = []
        self._last: dict[str, float] | None = None
        if self.path.exists():
            self._read()

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return str(self.entries[-1]["hash"]) if self.entries else FIRST

    def record(self, operation: str, edits: Sequence[Edit], memory: EditMemory) -> None:
        """Append an entry; :class:`EditMemory` calls this before a change takes effect.

        Raises:
            OSError: the file cannot be written; nothing was recorded.
        """
        after = None if self.measure is None else dict(self.measure(memory))
        entry: dict[str, Any] = {
            "number": len(self.entries),
            "time": self._clock().isoformat(timespec="seconds"),
            "operation": operation,
            "edits": [_about(edit) for edit in edits],
            "in_force": len(memory.edits),
            "model": memory.fingerprint,
            "version": __version__,
            "before": self._last,
            "after": after,
            "previous": self.head,
        }
        entry["hash"] = _hash(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if self.path.exists():
                os.truncate(self.path, size)
            raise
        self.entries.append(entry)
        self._last = after

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        previous = FIRST
        for number, line in enumerate(whole.split(b"\n")[:-1]):
            try:
                entry = json.loads(line)
                intact = isinstance(entry, dict) and entry["hash"] == _hash(entry)
                follows = intact and (entry["number"], entry["previous"]) == (number, previous)
            except (ValueError, KeyError, RecursionError):
                raise LedgerError(f"Ledger: {self.path}, line {number + 1} is no entry of a ledger.") from None
            if not follows:
                what = "does not follow the entry before it" if intact else "was changed after it was written"
                raise LedgerError(f"Ledger: {self.path}, line {number + 1} {what}; restore the file from a copy.")
            self.entries.append(entry)
            previous = entry["hash"]
        if len(whole) < len(data):  # cut short by a crash, before the change it was to record took effect
            os.truncate(self.path, len(whole))
        self._last = self.entries[-1].get("after") if self.entries else None


def _about(edit: Edit) -> dict[str, Any]:
    def digest(text: str | None) -> str | None:
        return None if text is None else hashlib.sha256(text.encode()).hexdigest()

    return {
        "id": edit.id,
        "fact": edit.fact.id,
        "prompt_sha256": digest(edit.fact.prompt),
        "object_sha256": digest(edit.fact.object),
        "new_object_sha256": digest(edit.fact.new_object),
        "operation": edit.operation,
    }


def _hash(entry: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in entry.items() if k != "hash"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()

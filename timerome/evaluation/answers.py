"""Answers kept in a file, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class AnswerFile:
    """Batches of answers by key, one JSON line each, synchronised to disk as soon as they are there.

    A line that a crash cut short is dropped when the file is read again. Numbers are written so that they read back bit
    for bit. Nothing but the file's name says what the answers are to: make the name of all that they depend on.

    Args:
        path: the file; made if it does not exist.

    Attributes:
        kept: key -> answers.

    Raises:
        ValueError: a line is no record of this kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, list[Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def add(self, key: str, answers: list[Any]) -> None:
        """Append a batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "answers": answers}, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.kept[key] = answers

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                self.kept[record["key"]] = list(record["answers"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"AnswerFile: line {number} of {self.path} holds no answers ({error!r}); remove the file or give "
                    "another folder."
                ) from None
        if whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)

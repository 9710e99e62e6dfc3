"""What the library refuses, by name."""

from __future__ import annotations


class TimeromeError(ValueError):
    """Something asked for cannot be done; the message says what was wanted, what came, and what to do."""


class MemoryMismatchError(TimeromeError):
    """A memory and a backbone do not belong together."""


class EditConflictError(TimeromeError):
    """Facts are about what another edit in force is about already.

    Attributes:
        conflicts: pairs of fact id and the ids of the edits in force it conflicts with.
    """

    def __init__(self, message: str, conflicts: list[tuple[str, tuple[str, ...]]]) -> None:
        super().__init__(message)
        self.conflicts = conflicts


class EditFileError(TimeromeError):
    """A file is missing, damaged, or no edit file."""


class UnknownRowsError(RuntimeError):
    """A forward's rows are parts of sequences, and it cannot be known which."""

"""Tables and lines of text. Whatever comes from a file or a model is shown, never sent to the terminal as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._text import shown
from ..memory import Edit


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(shown(title)), title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, overflow="fold", justify="left" if i == 0 or len(columns) == 2 else "right")
    for row in rows:
        made.add_row(*(Text("\n".join(map(shown, str(cell).split("\n")))) for cell in row))
    Console().print(made)


def say(line: str) -> None:
    """Print one line."""
    from rich.console import Console

    Console().print(shown(line), markup=False, highlight=False, soft_wrap=True)


def edited(edit: Edit) -> str:
    """Say what an edit changes: ``prompt: old → new``."""
    return str(edit).removeprefix(f"{edit.id}: ")


def edit_values(edit: Edit) -> dict[str, Any]:
    """Return an edit as JSON-ready values; score and threshold are None where it acts whatever is asked."""
    watch = edit.gate.watches[0] if edit.gate and edit.gate.watches else None
    return {
        "id": edit.id, "operation": edit.operation, "prompt": edit.fact.prompt,
        "old": edit.fact.object if watch is None else watch.text, "new": edit.says,
        "score": None if watch is None else watch.own,
        "threshold": None if edit.gate is None or watch is None else edit.gate.threshold_of(watch),
    }  # fmt: skip


def edit_table(title: str, edits: Sequence[Edit], most: int = 100) -> None:
    """Print what edits change, and when they act: above which score, and what theirs is in their own question."""
    rows = []
    for edit in edits[:most]:
        score, threshold = (edit_values(edit)[key] for key in ("score", "threshold"))
        rows.append(
            (
                edited(edit),
                "always acts" if score is None else f"{score:.2f}",
                "" if threshold is None else f"{threshold:.2f}",
            )
        )
    more = [(f"… and {len(edits) - most} more", "", "")] if len(edits) > most else []
    table(title, ("edit", "score", "threshold"), [*rows, *more])


def new_file(path: Path, overwrite: bool) -> None:
    """Find out before the work whether an edit file can be written.

    Raises:
        ValueError: it has another ending.
        FileExistsError: it is there.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"expected --out to end in .safetensors, got {path}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"there is a file {path}; give another --out, or --overwrite.")


def with_interval(found: dict[str, float | None]) -> str:
    """Format a mean with its interval."""
    mean, low, high = found["mean"], found["low"], found["high"]
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"

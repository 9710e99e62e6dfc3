"""``timerome diff``."""

from __future__ import annotations

from typing import Any

from ..memory import Difference, EditMemory, MemoryState
from ..progress import Progress
from ._showing import edited, say, table


def run(progress: Progress, first: MemoryState, second: MemoryState, /) -> dict[str, Any]:
    """Say how one edit file differs from another; no model is needed.

    Args:
        progress: shows how far it is.
        first: an edit file.
        second: another.
    """
    found = EditMemory.of_state(first).diff(EditMemory.of_state(second))
    show_difference("second against first", found)
    return found.to_dict()


def show_difference(title: str, found: Difference) -> None:
    """Print how a memory differs from another."""
    rows = [("added", edited(edit)) for edit in found.added] + [("removed", edited(edit)) for edit in found.removed]
    rows += [("changed", f"{edited(a)}\nis now {edited(b)}") for a, b in found.changed]
    if rows:
        table(title, ("", "edit"), rows)
    if found.about:
        say(f"made on another {' and '.join(found.about)}")
    if not found:
        say("no difference")

"""``timerome explain``."""

from __future__ import annotations

from typing import Any

from ..memory import EditMemory, MemoryState
from ..progress import Progress
from ._reading import Model
from ._showing import say, table


def run(
    progress: Progress, /, edits: MemoryState, prompt: str, model: Model, canvas: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """Say which edits a prompt names, how likely each one's old answer is against its threshold, and which act.

    Args:
        progress: shows how far it is.
        edits: the edit file.
        prompt: the text asked.
        model: the model it was made on.
        canvas: answer positions; enough for every answer watched for by default.
    """
    found = EditMemory.of_state(edits, model.load()).explain(prompt, canvas=canvas)
    if found.candidates:
        table(f"{prompt}: {len(found.acting)} of {found.edits} edits act",
              ("edit", "named", "watched for", "score", "threshold", ""), found.rows())  # fmt: skip
    else:
        say(str(found))
    return found.to_dict()

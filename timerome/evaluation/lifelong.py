"""Lifelong editing: how well earlier edits hold while later ones are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..backbones import Backbone
from ..datasets import evenly
from ..memory import Edit, EditMemory
from ..progress import Progress
from .measurement import Sheet
from .metrics.editing import says
from .respondent import Condition, Respondent
from .suites.asking import Asked, EditProtocol, present


def measure_retention(
    backbone: Backbone,
    memory: EditMemory,
    protocol: EditProtocol = EditProtocol(),  # noqa: B008  frozen
    *,
    points: int = 8,
    prefix: str = "edits",
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Sheet:
    """Go back in a memory's history and ask, after t edits, for all that were made before the last of them.

    Success of an edit that replaces an answer is that the new one is decoded, letter for letter; of one that forgets,
    that the old one is not. Edits that a later one supersedes no longer count.

    Args:
        backbone: the model the memory was built on.
        memory: at least two edits; it stays as it is.
        protocol: how text is decoded.
        points: at most so many t, spread evenly from 2 to the number of edits; that number is always one.
        prefix: what metrics' names begin with.
        cache: folder in which answers are kept; None keeps none.
        progress: shows how far it is.

    Returns:
        For each t the mean success over earlier edits, ``retention.replaced.after_t`` and
        ``retention.forgotten.after_t``: the published previous-edit retention at t. Absent where there is no such edit.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.lifelong import measure_retention
        >>> model = tr.load("testbed")
        >>> memory = tr.EditMemory(model)
        >>> _ = memory.forget(tr.datasets.bundled("relations")[:2])
        >>> measure_retention(model, memory)["retention.forgotten.after_2"].value
        1.0
    """
    sheet, how = Sheet(prefix, protocol.seed), protocol.decoding("a canvas of the answer's length")
    for t in counts(len(memory.state.history), points):
        earlier = first_edits(memory, t)
        edits = [edit for edit in earlier.edits if edit.id != memory.state.history[t - 1].id]
        respondent = Respondent(backbone, Condition.of_memory(earlier, f"{t} edits"), cache=cache, progress=progress)
        success = _success(Asked(respondent, protocol), edits)
        for kind in ("replaced", "forgotten"):
            own = [edit.fact.id for edit in edits if (edit.operation == "forget") == (kind == "forgotten")]
            values = present({name: success[name] for name in own})
            sheet.add(f"retention.{kind}.after_{t}", values, f"{how}; success of earlier edits", of=len(own))
    return sheet


def counts(edits: int, points: int) -> list[int]:
    """Return how many edits are looked at: the last of ``points`` is all of them.

    Example:
        >>> counts(50, 4), counts(3, 8), counts(1, 8)
        ([14, 26, 38, 50], [2, 3], [])
    """
    return sorted(edits + 2 - t for t in evenly(range(2, edits + 1), points))


def first_edits(memory: EditMemory, t: int) -> EditMemory:
    """Return the memory as it was after its first ``t`` edits that were not undone."""
    return EditMemory.of_state(replace(memory.state, history=memory.state.history[:t]))


def _success(asked: Asked, edits: Sequence[Edit]) -> dict[str, float | None]:
    answers = {edit.fact.id: (edit.says if edit.operation != "forget" else None) or edit.fact.object for edit in edits}
    questions = {e.fact.id: asked.exact(e.fact.prompt, answers[e.fact.id], e.fact.object) for e in edits}
    asked.decode(questions.values(), "earlier edits")
    found: dict[str, float | None] = {}
    for edit in edits:
        name = edit.fact.id
        text = asked.text(*questions[name])
        said = None if text is None else says(text, answers[name])
        found[name] = said if said is None or edit.operation != "forget" else 1.0 - said
    return found

"""Lifelong editing: how well earlier edits hold while later ones are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..backbones import Backbone
from ..datasets import evenly
from ..facts import Fact
from ..progress import Progress
from .benchmarks.asking import Asked, EditProtocol, present
from .measurement import Sheet
from .metrics.editing import says
from .respondent import Condition, Respondent

if TYPE_CHECKING:
    from ..memory import EditMemory

KINDS = ("replaced", "forgotten")


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
        >>> from timerome.splits import bundled_facts
        >>> backbone, facts = tr.load("testbed"), bundled_facts("relations")[:2]
        >>> memory = tr.EditMemory.build(backbone, facts, coordinate=tr.Coordinate(3), estimator="null")
        >>> measure_retention(backbone, memory)["retention.forgotten.after_2"].value
        1.0
    """
    sheet, how = Sheet(prefix, protocol.seed), protocol.decoding("a canvas of the answer's length")
    for t in counts(len(memory.history), points):
        earlier = first_edits(memory, t)
        last = memory.history[t - 1].fact.id
        facts = [fact for fact in earlier.facts if fact.id != last]
        respondent = Respondent(backbone, Condition.of_memory(earlier, f"{t} edits"), cache=cache, progress=progress)
        success = _success(Asked(respondent, protocol), facts)
        for kind in KINDS:
            own = [fact.id for fact in facts if _kind(fact) == kind]
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
    from ..memory import EditMemory

    return EditMemory(
        memory.settings, memory.history[:t], background=memory.background, fingerprint=memory.fingerprint,
        tokenizer=memory.tokenizer,
    )  # fmt: skip


def _kind(fact: Fact) -> str:
    return "forgotten" if fact.new_object is None else "replaced"


def _success(asked: Asked, facts: Sequence[Fact]) -> dict[str, float | None]:
    answers = {fact.id: fact.new_object or fact.object for fact in facts}
    questions = {fact.id: (fact.prompt, asked.respondent.length(answers[fact.id])) for fact in facts}
    asked.decode(questions.values(), "earlier edits")
    found: dict[str, float | None] = {}
    for fact in facts:
        text = asked.text(*questions[fact.id])
        said = None if text is None else says(text, answers[fact.id])
        found[fact.id] = said if said is None or fact.new_object is not None else 1.0 - said
    return found

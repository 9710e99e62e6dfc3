"""Plan a transaction: stable ids, conflicts, what supersedes what."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..facts import Fact
from .edit import Edit, Spared, in_force

REFUSAL = "I don't have that information."  # what the bundled testbed was taught to say of what it does not know

OnConflict = Literal["error", "replace", "keep"]


class EditConflictError(ValueError):
    """Facts are about what another edit in force is about already.

    Attributes:
        conflicts: pairs of fact id and the ids of the edits in force it conflicts with.
    """

    def __init__(self, message: str, conflicts: list[tuple[str, tuple[str, ...]]]) -> None:
        super().__init__(message)
        self.conflicts = conflicts


@dataclass(frozen=True)
class Planned:
    """One fact of a transaction.

    Attributes:
        id: of its edit; that of the edit in force where nothing is to be done.
        fact: the fact.
        supersedes: edits it takes the place of.
        kept: an edit in force stays in its place.
    """

    id: str
    fact: Fact
    supersedes: tuple[str, ...] = ()
    kept: bool = False


def conflict(a: Fact | Spared, b: Fact) -> bool:
    """Whether two facts say something of the same subject and relation.

    Where one of them names no relation, the prompt stands for it. Letter case and white space do not matter.

    Example:
        >>> old = Fact(id="a", prompt="The capital of Chad is", subject="Chad", object="N'Djamena", relation="capital")
        >>> new = Fact(id="b", prompt="Chad's capital:", subject="Chad", object="Abéché", relation="Capital")
        >>> conflict(old, new)
        True
    """
    if a.id == b.id:
        return True
    if _plain(a.subject) != _plain(b.subject):
        return False
    if a.relation is not None and b.relation is not None and _plain(a.relation) == _plain(b.relation):
        return True
    return _plain(a.prompt) == _plain(b.prompt)


def plan(facts: Sequence[Fact], edits: Sequence[Edit], used: Collection[str], on_conflict: OnConflict) -> list[Planned]:
    """Give each fact an id and settle its conflicts with the edits in force, and with earlier facts of the batch.

    Args:
        facts: the batch.
        edits: all edits of the memory.
        used: ids that are taken, now or in the past.
        on_conflict: ``"error"`` refuses the whole batch, ``"replace"`` lets the new edit supersede the old one (and
            come back when the new one is undone), ``"keep"`` leaves the old one in its place.

    Raises:
        EditConflictError: there are conflicts and ``on_conflict`` is ``"error"``.
        ValueError: ``on_conflict`` is none of the three.
    """
    if on_conflict not in get_args(OnConflict):
        raise ValueError(f"EditMemory: expected on_conflict in {get_args(OnConflict)}, got {on_conflict!r}.")
    taken = set(used)
    present = {edit.id: edit.fact for edit in in_force(edits)}
    planned: list[Planned] = []
    refused: list[tuple[str, tuple[str, ...]]] = []
    for fact in facts:
        against = tuple(name for name, other in present.items() if conflict(fact, other))
        if against and on_conflict == "error":
            refused.append((fact.id, against))
        if against and on_conflict == "keep":
            planned.append(Planned(against[-1], fact, kept=True))
            continue
        name = free_id(fact.id, taken)
        taken.add(name)
        planned.append(Planned(name, fact, against if on_conflict == "replace" else ()))
        for other in against:
            del present[other]
        present[name] = fact
    if refused:
        shown = "; ".join(f"{name!r} with {', '.join(map(repr, others))}" for name, others in refused[:5])
        raise EditConflictError(
            f"EditMemory: {len(refused)} of {len(facts)} facts conflict with edits in force ({shown}); pass "
            "on_conflict='replace' or 'keep', or undo those first. Nothing was changed.",
            refused,
        )
    return planned


def spared(before: Sequence[Spared], gone: Sequence[Edit], was: Sequence[Edit], now: Sequence[Edit]) -> list[Spared]:
    """Return the questions of undone edits that are to be left alone after a change.

    Those are no longer that an edit in force is about: one made since, or one that the undone edit had superseded.

    Args:
        before: those before the change.
        gone: edits that it undid.
        was: edits in force before it.
        now: edits in force after it.
    """
    known = {edit.id for edit in was}
    fresh = [edit.fact for edit in now if edit.id not in known]
    left = [old for old in before if not any(conflict(old, fact) for fact in fresh)]
    new = [Spared.of(edit) for edit in gone if edit.address is not None]
    return left + [one for one in new if not any(conflict(one, edit.fact) for edit in now)]


def free_id(name: str, taken: Collection[str]) -> str:
    """Return ``name``, or ``name.2``, ``name.3``, … if that was given away already.

    Example:
        >>> free_id("kenya", {"kenya", "kenya.2"})
        'kenya.3'
    """
    candidate, n = name, 1
    while candidate in taken:
        n += 1
        candidate = f"{name}.{n}"
    return candidate


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())

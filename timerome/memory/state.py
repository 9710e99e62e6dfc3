"""The state of a memory: a value that never changes, and the changes that make another of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from ..errors import EditConflictError, MemoryMismatchError, TimeromeError
from ..facts import Fact
from .edits import Edit, about, free_id, in_force

OnConflict = Literal["error", "replace", "keep"]


@dataclass(frozen=True)
class MemoryState:
    """All that a memory is.

    Attributes:
        fingerprint: of the model it was made on.
        tokenizer: digest of that model's tokenizer.
        history: all edits that were not undone, in order; those that others supersede do not act.
        gone: ids of edits that were undone; never given away again.
    """

    fingerprint: str
    tokenizer: str
    history: tuple[Edit, ...] = ()
    gone: tuple[str, ...] = ()

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in force."""
        return in_force(self.history)


class Planned(NamedTuple):
    """One fact of a change.

    Attributes:
        fact: the fact.
        id: of its edit; that of the edit in force where nothing is to be done.
        supersedes: edits it takes the place of.
        kept: an edit in force stays in its place.
    """

    fact: Fact
    id: str
    supersedes: tuple[str, ...] = ()
    kept: bool = False


def plan(state: MemoryState, facts: Sequence[Fact], on_conflict: OnConflict) -> list[Planned]:
    """Give each fact an id and settle its conflicts with the edits there, and with earlier facts of the batch.

    Args:
        state: the state.
        facts: the batch.
        on_conflict: ``"error"`` refuses the whole batch, ``"replace"`` lets the new edit supersede the old one (and
            come back when the new one is undone), ``"keep"`` leaves the old one in its place.

    Raises:
        EditConflictError: there are conflicts and ``on_conflict`` is ``"error"``; or two facts of the batch conflict.
        TimeromeError: ``on_conflict`` is none of the three.
    """
    if on_conflict not in get_args(OnConflict):
        raise TimeromeError(f"EditMemory: expected on_conflict in {get_args(OnConflict)}, got {on_conflict!r}.")
    taken = {*state.gone, *(edit.id for edit in state.history)}
    planned: list[Planned] = []
    refused: list[tuple[str, tuple[str, ...]]] = []
    acting = {edit.id for edit in state.edits}
    there, batch = _Topics([edit.fact for edit in state.history]), _Topics()
    for fact in facts:
        twice = tuple(facts[i].id for i in batch.of(fact))
        # Those that are superseded already, too: none of them may come back while this one is there.
        before = tuple(state.history[i].id for i in there.of(fact))
        present = tuple(name for name in before if name in acting)
        if twice or (present and on_conflict == "error"):
            refused.append((fact.id, twice or present))
        batch.append(fact)
        if present and on_conflict == "keep":
            planned.append(Planned(fact, present[-1], kept=True))
            continue
        name = free_id(fact.id, taken)
        taken.add(name)
        planned.append(Planned(fact, name, before))
    if refused:
        shown = "; ".join(f"{name!r} with {', '.join(map(repr, others))}" for name, others in refused[:5])
        raise EditConflictError(
            f"EditMemory: {len(refused)} of {len(facts)} facts are about what another is about ({shown}); for edits "
            "in force pass on_conflict='replace' or 'keep', or undo those first. Nothing was changed.",
            refused,
        )
    return planned


class _Topics:
    """Facts by what they are about."""

    def __init__(self, facts: Iterable[Fact] = ()) -> None:
        self._found: dict[tuple[str, ...], list[int]] = {}
        self._size = 0
        for fact in facts:
            self.append(fact)

    def append(self, fact: Fact) -> None:
        for topic in about(fact):
            self._found.setdefault(topic, []).append(self._size)
        self._size += 1

    def of(self, fact: Fact) -> list[int]:
        """Numbers of the facts that conflict with one, in order."""
        return sorted({i for topic in about(fact) for i in self._found.get(topic, ())})


def added(state: MemoryState, edits: Iterable[Edit]) -> MemoryState:
    """Return the state with more edits.

    Raises:
        TimeromeError: gated edits and such that act whatever is asked are to be in one memory.
    """
    history = (*state.history, *edits)
    if len({edit.gate is None for edit in history}) > 1:
        raise TimeromeError(
            "EditMemory: edits that act whatever is asked (paper_memory) and gated ones cannot be in one memory; make "
            "two and attach both."
        )
    return replace(state, history=history)


def undone(state: MemoryState, ids: Iterable[str]) -> MemoryState:
    """Return the state without some edits, whatever came after them; what they superseded acts again.

    Raises:
        KeyError: there is no such edit (also where it was undone before).
    """
    ids = tuple(dict.fromkeys(ids))
    present = {edit.id for edit in state.history}
    if unknown := [name for name in ids if name not in present]:
        raise KeyError(
            f"EditMemory.undo: no edit {unknown[0]!r}; there are {', '.join(sorted(present)[:10]) or 'none'}. "
            "Nothing was changed."
        )
    left = tuple(edit for edit in state.history if edit.id not in ids)
    return replace(state, history=left, gone=(*state.gone, *ids))


def merged(one: MemoryState, other: MemoryState, on_conflict: OnConflict) -> tuple[MemoryState, tuple[Edit, ...]]:
    """Return a state with another's edits in force taken over, and these; edits that both have are left as they are.

    Raises:
        MemoryMismatchError: they were made on different models or tokenizers.
        EditConflictError: edits conflict and ``on_conflict`` is ``"error"``.
    """
    for what, mine, its in (
        ("model", one.fingerprint, other.fingerprint),
        ("tokenizer", one.tokenizer, other.tokenizer),
    ):
        if mine != its:
            raise MemoryMismatchError(
                f"EditMemory.merge: the memories were made on another {what}: {mine} and {its}. Nothing was changed."
            )
    known = {edit.id: edit for edit in one.history}
    fresh = [edit for edit in other.edits if edit.id not in known or known[edit.id].fact != edit.fact]
    planned = plan(one, [edit.fact for edit in fresh], on_conflict)
    taken = tuple(
        replace(edit, id=item.id, supersedes=item.supersedes)
        for edit, item in zip(fresh, planned, strict=True)
        if not item.kept
    )
    return added(one, taken), taken

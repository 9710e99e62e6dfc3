"""One edit: a fact, what is to be said of it, and its part of the memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..coordinates import Coordinate
from ..facts import Fact
from .address import Spellings
from .settings import Settings

Operation = Literal["insert", "update", "forget"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True)
class Part:
    """An edit at one coordinate, float32 on the CPU.

    Attributes:
        coordinate: where.
        keys: ``(n, d)``; none of an edit by place.
        targets: one a key, ``(n, d)``; of an edit by place, one a place of the answer, ``(places, d)``, the last one
            for all places after it.
    """

    coordinate: Coordinate
    keys: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Edit:
    """One fact's part of a memory. Nothing in it depends on any other edit, so that edits can come and go.

    Attributes:
        id: stable name; never given to another edit of the same memory, also after an undo.
        fact: what is edited; its ``new_object`` is the wanted answer, None to forget.
        settings: hyperparameters.
        parts: one a coordinate.
        operation: what made it.
        supersedes: ids of edits that do not act while this one is there.
        address: where sequences about the fact are found, as directions about the negatives' mean, ``(k, d)``; None
            without a row gate.
        subject: spellings of the fact's subject in tokens; empty without a row gate.
        address_scores: largest score of each negative wording with the address, ``(w,)``: the calibration.
        token_scores: largest similarity of each negative's activations with the keys, ``(m,)``; None without a token
            gate.
    """

    id: str
    fact: Fact
    settings: Settings
    parts: tuple[Part, ...]
    operation: Operation = "update"
    supersedes: tuple[str, ...] = ()
    address: Tensor | None = None
    subject: Spellings = ()
    address_scores: Tensor | None = None
    token_scores: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Keys at the first coordinate."""
        return self.parts[0].keys

    @property
    def targets(self) -> Tensor:
        """Targets at the first coordinate."""
        return self.parts[0].targets


@dataclass(frozen=True)
class Spared:
    """The question of an edit that was undone, which no other edit about its subject may answer.

    Attributes:
        id: of the edit.
        prompt: how it is asked.
        subject: what it is about.
        relation: which relation of the subject; None where the fact named none.
        address: as of the edit, ``(k, d)``.
        spellings: of the subject in tokens.
    """

    id: str
    prompt: str
    subject: str
    relation: str | None
    address: Tensor
    spellings: Spellings

    @classmethod
    def of(cls, edit: Edit) -> Spared:
        """The question of an edit, which must have an address."""
        assert edit.address is not None
        fact = edit.fact
        return cls(edit.id, fact.prompt, fact.subject, fact.relation, edit.address, edit.subject)


def in_force(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Return the edits that no other one supersedes, in order."""
    edits = tuple(edits)
    hidden = {name for edit in edits for name in edit.supersedes}
    return tuple(edit for edit in edits if edit.id not in hidden)

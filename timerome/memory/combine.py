"""Memories beside one another: what differs, one made of two, and one built again for another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..backbones import Backbone
from .attachment import MemoryMismatchError
from .background import Background
from .edit import Edit
from .making import make
from .operations import OnConflict, Planned, plan

if TYPE_CHECKING:
    from .memory import EditMemory


@dataclass(frozen=True)
class Difference:
    """How a memory differs from another, by edit id.

    Attributes:
        added: edits that only the second has.
        removed: edits that only the first has.
        changed: edits of both that are not the same: another fact, settings, or other tensors.
        about: names of what else differs: model, tokenizer, gate, protected facts, spared questions.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    about: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.about)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {name: list(value) for name, value in vars(self).items()}


def diff(first: EditMemory, second: EditMemory) -> Difference:
    """Compare two memories; see :meth:`EditMemory.diff`."""
    mine, theirs = ({edit.id: edit for edit in memory.edits} for memory in (first, second))
    questions = [[(one.id, one.prompt) for one in memory.spared] for memory in (first, second)]
    return Difference(
        added=tuple(name for name in theirs if name not in mine),
        removed=tuple(name for name in mine if name not in theirs),
        changed=tuple(name for name in mine if name in theirs and not _same(mine[name], theirs[name])),
        about=_made_for(first, second) + (() if questions[0] == questions[1] else ("spared questions",)),
    )


def _made_for(first: EditMemory, second: EditMemory) -> tuple[str, ...]:
    """Name what two memories were made for, as far as it differs."""
    pairs = (
        ("model", first.fingerprint, second.fingerprint),
        ("tokenizer", first.tokenizer, second.tokenizer),
        ("gate", first.background.gate, second.background.gate),
        ("protected facts", first.background.protect, second.background.protect),
    )
    return tuple(name for name, a, b in pairs if a != b)


def merged(first: EditMemory, second: EditMemory, on_conflict: OnConflict) -> list[Edit]:
    """Return the second memory's edits that the first takes over; see :meth:`EditMemory.merge`."""
    if (first.fingerprint, first.tokenizer) != (second.fingerprint, second.tokenizer):
        raise MemoryMismatchError(
            f"EditMemory.merge: the memories were built on models {first.fingerprint} and {second.fingerprint}; "
            "rebase() one of them first."
        )
    about = _made_for(first, second)
    if (
        about
        or first.settings.shared != second.settings.shared
        or not _same_frames(first.background, second.background)
    ):
        raise MemoryMismatchError(
            f"EditMemory.merge: the memories do not fit together ({', '.join(about) or 'shared and single systems'}); "
            "build one of them again with the other's gate and protected facts."
        )
    have = {edit.id: edit for edit in first.edits}
    new = [edit for edit in second.edits if edit.id not in have or not _same(have[edit.id], edit)]
    used = {*first.retired, *(edit.id for edit in first.history)}
    planned = plan([edit.fact for edit in new], first.history, used, on_conflict)
    return [
        replace(edit, id=item.id, supersedes=item.supersedes)
        for edit, item in zip(new, planned, strict=True)
        if not item.kept
    ]


def rebuilt(memory: EditMemory, backbone: Backbone) -> EditMemory:
    """Build a memory's edits again on another model, from their facts; see :meth:`EditMemory.rebase`."""
    from .memory import EditMemory

    gate = memory.background.gate
    found = EditMemory(
        memory.settings,
        background=Background(gate, memory.background.protect, memory.background.bank),
        retired=memory.retired,
        fingerprint=backbone.fingerprint(),
        tokenizer=backbone.tokenizer_digest(),
    )
    history: list[Edit] = []
    for edit in memory.history:
        planned = [Planned(edit.id, edit.fact, edit.supersedes)]
        history += make(backbone, found.background, planned, edit.operation, edit.settings.coordinates, edit.settings)
    found._bound(backbone)
    found._commit(history)
    return found


def _same(a: Edit, b: Edit) -> bool:
    if (a.fact, a.settings, len(a.parts)) != (b.fact, b.settings, len(b.parts)):
        return False
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]] = [
        (x, y) for p, q in zip(a.parts, b.parts, strict=True) for x, y in ((p.keys, q.keys), (p.targets, q.targets))
    ]
    # Read in another batch, an activation may differ in its last digits.
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in pairs)


def _same_frames(a: Background, b: Background) -> bool:
    if a.bank != b.bank and (a.gate, a.protect) != (None, None):
        return False
    shared = a.frames.keys() & b.frames.keys()
    frames = all(torch.equal(a.frames[p].mean, b.frames[p].mean) for p in shared)
    return frames and (a.centre is None or b.centre is None or torch.equal(a.centre, b.centre))

"""``timerome revise``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import TimeromeError
from ..facts import FactSet
from ..memory import EditMemory, Ledger, MemoryState
from ..memory.state import OnConflict
from ..progress import Progress
from ._reading import Making, Model
from ._showing import new_file, say
from .diff import show_difference


def run(
    progress: Progress,
    /,
    edits: Path,
    model: Model,
    making: Making,
    replace: FactSet | None = None,
    forget: FactSet | None = None,
    teach: FactSet | None = None,
    undo: tuple[str, ...] = (),
    merge: MemoryState | None = None,
    answer: str | None = None,
    on_conflict: OnConflict = "replace",
    ledger: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Change an edit file: undo edits, merge another file, replace, forget and teach facts, in this order.

    All of it happens, or the file stays as it was.

    Args:
        progress: shows how far it is.
        edits: the edit file.
        model: the model it was made on; not needed to undo and merge.
        making: how new edits are made.
        replace: facts to answer otherwise, as a JSONL file or a bundled set.
        forget: facts to leave unsaid.
        teach: facts the model does not know.
        undo: ids of edits to take back, parted by blanks or commas.
        merge: an edit file whose edits to take over.
        answer: what to say instead of replaced, or else of forgotten facts.
        on_conflict: what to do where an edit in force has the same subject and relation.
        ledger: JSON-lines file that records what was changed.
        out: where to write the changed file; in its place by default.
        overwrite: write over a file that is there.
    """
    before = EditMemory.load(edits)
    added = [facts for facts in (replace, forget, teach) if facts is not None]
    if answer is not None and (replace is None) == (forget is None):
        raise TimeromeError("--answer goes with either --replace or --forget.")
    if not added and making != Making():
        raise TimeromeError("--method, --at and --threshold go with --replace, --forget or --teach.")
    if teach is not None and making.threshold is not None:
        raise TimeromeError("--threshold: what is taught has no old answer, and no threshold; teach it by itself.")
    if not added and not undo and merge is None:
        raise TimeromeError("nothing to do; give --undo, --merge, --replace, --forget or --teach.")
    if out is not None:
        new_file(out, overwrite)
    how = {**making.arguments(), "on_conflict": on_conflict}
    record = None if ledger is None else Ledger(ledger)
    changed = EditMemory.of_state(before.state, model.load() if added else None)
    with progress.task("revise", 1 + len(added)) as step:
        if undo:
            changed.undo(_ids(undo, before))
        if merge is not None:
            changed.merge(EditMemory.of_state(merge), on_conflict=on_conflict)
        step(1)
        if replace is not None:
            changed.replace(replace, answer, **how)
            step(1)
        if forget is not None:
            changed.forget(forget, answer=answer or making.unasked, **how)
            step(1)
        if teach is not None:
            changed.teach(teach, method=making.method, at=making.at, on_conflict=on_conflict)
            step(1)
    found = before.diff(changed)
    for operation, own in (("removed", found.removed), ("added", found.added)):
        if record is not None and own:
            record.record(operation, own, changed)
    changed.save(out or edits)
    show_difference(str(out or edits), found)
    say(f"{len(changed)} edits in force, written to {out or edits}")
    return {"out": str(out or edits), "edits": [edit.id for edit in changed.edits], **found.to_dict()}


def _ids(given: tuple[str, ...], memory: EditMemory) -> list[str]:
    """Ids, several of which may stand in one text; an id may itself hold a comma."""
    known = {edit.id for edit in memory.state.history}
    return [part for text in given for part in ([text] if text in known else text.strip("[]").split(",")) if part]

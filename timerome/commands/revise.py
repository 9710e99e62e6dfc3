"""``timerome revise`` and ``timerome diff``: change an edit file, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..progress import Progress
from .console import load_memory, load_model, read_facts, table


def revise(
    progress: Progress,
    memory: Path,
    out: Path | None = None,
    insert: str | None = None,
    update: str | None = None,
    forget: str | None = None,
    answer: str | None = None,
    undo: list[str] | None = None,
    spare: bool = True,
    merge: Path | None = None,
    on_conflict: Literal["error", "replace", "keep"] = "error",
    ledger: Path | None = None,
    model: str = "testbed",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Change an edit file: undo edits, merge another file, insert, update and forget facts, in this order.

    All of it happens, or the file stays as it was.

    Args:
        progress: shows how far it is.
        memory: the edit file.
        out: where to write the changed one; in its place by default.
        insert: facts the model lacks, as a JSONL file or a bundled set.
        update: facts whose new_object is to replace the answer.
        forget: facts to leave unsaid.
        answer: what to say instead of forgotten facts.
        undo: ids of edits to take back, as a list.
        spare: keep the questions of undone edits from being answered by others about their subjects.
        merge: an edit file whose edits to take over.
        on_conflict: what to do where an edit in force has the same subject and relation.
        ledger: JSON-lines file that records what was changed.
        model: testbed, a folder, or a Hub id; what the memory was built on.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    from ..memory import EditMemory, Ledger

    backbone = load_model(model, device, trust_remote_code)
    changed = load_memory(memory, backbone)
    before = load_memory(memory, backbone)
    kept = None if ledger is None else Ledger(ledger)
    jobs = [facts for facts in (insert, update, forget) if facts is not None]
    with progress.task("revise", len(jobs) + 1) as step:
        if undo:
            changed.undo(*undo, spare=spare)
        if merge is not None:
            changed.merge(EditMemory.load(merge, backbone), on_conflict=on_conflict)
        step(1)
        if insert is not None:
            changed.insert(read_facts(insert), on_conflict=on_conflict)
            step(1)
        if update is not None:
            changed.update(read_facts(update), on_conflict=on_conflict)
            step(1)
        if forget is not None:
            changed.forget(read_facts(forget), answer=answer, on_conflict=on_conflict)
            step(1)
    found = before.diff(changed)
    if kept is not None:
        gone = [edit for edit in before.edits if edit.id in found.removed]
        come = [edit for edit in changed.edits if edit.id in found.added]
        for operation, edits in (("removed", gone), ("added", come)):
            if edits:
                kept.record(operation, edits, changed)
    changed.save(out or memory)
    table(str(out or memory), ("edits", "ids"), [(k, ", ".join(v) or "none") for k, v in found.to_dict().items()])
    return {"out": str(out or memory), "edits": [edit.id for edit in changed.edits], **found.to_dict()}


def diff(progress: Progress, first: Path, second: Path) -> dict[str, Any]:
    """Say how one edit file differs from another; no model is needed.

    Args:
        progress: shows how far it is.
        first: an edit file.
        second: another.
    """
    from ..memory import EditMemory

    found = EditMemory.load(first).diff(EditMemory.load(second))
    rows = [(name, ", ".join(ids) or "none") for name, ids in found.to_dict().items()]
    table(f"{second} against {first}", ("edits", "ids"), rows)
    return found.to_dict()

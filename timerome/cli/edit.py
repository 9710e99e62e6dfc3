"""``timerome edit``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backbones import Backbone
from ..errors import TimeromeError
from ..facts import Fact, FactSet
from ..memory import EditMemory, paper_memory
from ..progress import Progress
from ._reading import Making, Model
from ._showing import edit_table, edit_values, new_file, say


def run(
    progress: Progress,
    /,
    facts: FactSet,
    out: Path,
    model: Model,
    making: Making,
    answer: str | None = None,
    forget: bool = False,
    paper: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Edit facts and write the edits to a file: those with a new_object are replaced, others forgotten.

    The model's weights are not touched. There is nothing to calibrate: an edit acts where its subject is named and the
    model is about to give the old answer.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01.
        out: the edit file, *.safetensors.
        model: which model.
        making: how edits are made.
        answer: what to say instead, for all facts.
        forget: forget all facts, whatever their new_object is.
        paper: the paper's form, which acts on every token of whatever is asked; its parts by --method ridge.
        overwrite: write over a file that is there.
    """
    new_file(out, overwrite)
    if paper and making.threshold is not None:
        raise TimeromeError("--threshold: the paper's form has no gate and no threshold.")
    if not paper:
        making.arguments()
    backbone = model.load()
    begin = time.perf_counter()
    with progress.task("edit", 1) as step:
        if paper:
            wanted = facts.with_new_object(answer) if forget or answer else facts
            memory = paper_memory(backbone, wanted, at=making.at, method=making.method)  # type: ignore[arg-type]
        else:
            memory = _edited(backbone, facts, making, answer, forget)
        step(1)
    seconds = time.perf_counter() - begin
    memory.save(out)
    edit_table(f"{len(memory)} edits", memory.edits)
    say(f"{seconds:.1f} s, {memory.nbytes / 1024:.0f} KiB, written to {out}")
    if paper:
        say("The paper's form has no gate: it changes whatever else the model is asked, too.")
    return {
        "out": str(out), "n": len(memory), "seconds": seconds, "seconds_per_fact": seconds / len(facts),
        "memory_bytes": memory.nbytes, "file_bytes": out.stat().st_size,
        "edits": [edit_values(edit) for edit in memory.edits],
    }  # fmt: skip


def _edited(
    backbone: Backbone, facts: Sequence[Fact], making: Making, answer: str | None, forget: bool
) -> EditMemory:  # fmt: skip
    memory, how = EditMemory(backbone), {**making.arguments(), "on_conflict": "error"}
    gone = [fact for fact in facts if forget or (answer is None and fact.new_object is None)]
    if replaced := [fact for fact in facts if fact not in gone]:
        memory.replace(replaced, answer, **how)
    if gone:
        memory.forget(gone, answer=answer or making.unasked, **how)
    return memory

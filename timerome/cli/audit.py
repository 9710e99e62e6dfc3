"""``timerome audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation.audit import AuditProtocol, run_audit
from ..facts import FactSet
from ..memory import EditMemory, MemoryState
from ..progress import Progress
from ._reading import Model
from ._showing import say, table


def run(
    progress: Progress,
    /,
    facts: FactSet,
    model: Model,
    protocol: AuditProtocol,
    edits: MemoryState | None = None,
    out: Path = Path("timerome-audit"),
    limit: int | None = None,
    baselines: bool = False,
) -> dict[str, Any]:
    """Try to get facts out of a model by other wordings, hints, ways of decoding and context, without and with edits.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01: what shall not come out.
        model: which model.
        protocol: how it asks.
        edits: an edit file.
        out: folder for results.json, results.csv and report.html; a stopped run goes on from it.
        limit: only the first so many facts.
        baselines: also audit random site, paper mode, prompt memory, logit bias and steering.
    """
    backbone = model.load()
    memory = None if edits is None else EditMemory.of_state(edits, backbone)
    report = run_audit(
        backbone, facts[:limit], out=out, memory=memory, protocol=protocol, baselines=baselines, progress=progress
    )
    table(report.title, report.columns(), report.rows())
    say(f"report: {out / 'report.html'}")
    return report.to_dict()

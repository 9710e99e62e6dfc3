"""``timerome audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..progress import Progress
from .console import load_memory, load_model, read_facts, say, table


def audit(
    progress: Progress,
    facts: str,
    out: Path = Path("timerome-audit"),
    model: str = "testbed",
    memory: Path | None = None,
    limit: int | None = None,
    canvas: int = 64,
    steps: int = 32,
    seed: int = 0,
    baselines: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Try to get facts out of a model by other wordings, hints, ways of decoding and context, without and with an edit.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01: what shall not come out.
        out: folder for results.json, results.csv and report.html; a stopped run goes on from it.
        model: testbed, a folder, or a Hub id.
        memory: an edit file.
        limit: only the first so many facts.
        canvas: answer positions that text is decoded on.
        steps: denoising steps.
        seed: of samplers and of what is hidden.
        baselines: also audit random site, paper mode, prompt memory, logit bias and steering.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    from ..evaluation.audit import AuditProtocol, run_audit

    chosen, backbone = read_facts(facts)[:limit], load_model(model, device, trust_remote_code)
    edits = None if memory is None else load_memory(memory, backbone)
    protocol = AuditProtocol(canvas=canvas, steps=steps, seed=seed)
    report = run_audit(
        backbone, chosen, out=out, memory=edits, protocol=protocol, baselines=baselines, progress=progress
    )
    table(report.title, report.columns(), report.rows())
    say(f"report: {out / 'report.html'}")
    return report.to_dict()

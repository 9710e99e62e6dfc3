"""``timerome trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..diffusion import SamplerConfig
from ..facts import FactSet
from ..progress import Progress
from ..tracing import CausalTracer, TraceConfig
from ..tracing.verdict import told
from ._reading import Model
from ._showing import say, table


def run(
    progress: Progress,
    /,
    facts: FactSet,
    out: Path,
    model: Model,
    tracing: Annotated[dict[str, Any], TraceConfig, "steps", "sampler"],
    steps: int = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Find where facts are carried: clean, corrupted and restored runs over layers, modules, steps and roles.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01.
        out: folder for the trace, its pictures and a checkpoint from which a stopped run resumes.
        model: which model.
        tracing: how it is traced.
        steps: denoising steps of the sampler, all of which are traced.
        limit: trace only the first so many facts.
    """
    config = TraceConfig(sampler=SamplerConfig(steps=steps, seed=tracing.get("seed", 0)), **tracing)
    chosen, backbone = facts[:limit], model.load()
    with progress.reports("trace") as report:
        result = CausalTracer(backbone, config, progress=report).trace(chosen, checkpoint=out / "checkpoint.jsonl")
    result.save(out / "trace.safetensors")
    summary = result.summary()
    if "best" in summary:
        result.plot(out / "tie_heatmap.png")
        result.plot(out / "tie_steps.png", kind="steps")
        result.plot(out / "tie_facts.png", kind="facts")
    table(f"trace of {len(chosen)} facts; intervals are 95 %", ("what", "value"), told(summary))
    say(summary["verdict"])
    say(f"written to {out}")
    return {"out": str(out), "n": len(chosen), "backbone": result.backbone, "settings": result.settings, **summary}

"""CPU seconds, backward passes and peak memory of editing forget01, ours against every trained baseline.

    python -m benchmarks.baselines.run      # first: chooses each trained method's configuration
    python -m benchmarks.paper.cost

Every method runs in a process of its own, so that its peak resident memory is its own; each has run the model before
its clock starts. Trained methods run at their tuned configuration until they have converged (``Budget``); their time is
that of the optimizer steps up to there, without the checks. Ours is that of all there is to do for an edit: reading its
question, decoding what the model says today, solving, attaching. Peak memory is of the whole process, less that of
a process that only decodes the same questions. The largest is not the average: allocators round up, so differences of a
few megabytes mean nothing. What a method costs held-out facts is the main table's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import timerome as tr
from benchmarks.baselines.methods import GRIDS, fit, retain_rows
from benchmarks.baselines.run import FINAL, OUT, WATCHED
from benchmarks.baselines.training import Criterion
from benchmarks.measure import spread
from benchmarks.results import peak_resident_bytes
from timerome.diffusion import SamplerConfig, encode, log_likelihood
from timerome.evaluation import WeightsWatch
from timerome.memory import EditMemory, Ridge
from timerome.splits import demo_split

from .common import NULL, OURS, PAPER, TWO_STATES, Form, depends, edited, markdown, start

BUILDS: dict[str, Form] = {
    **OURS,
    "paper mode, two states": replace(PAPER, method=Ridge("null", rank=16, states=TWO_STATES)),
    "timerome, null, two states": replace(NULL, method=Ridge("null", states=TWO_STATES)),
}


def infer(backbone: tr.Backbone, facts: tr.FactSet) -> None:
    """Plain inference: decode the questions and take the answers' likelihoods, as every evaluation does."""
    tr.generate(backbone, [f.prompt for f in facts[:16]], canvas=96, config=SamplerConfig(steps=4))
    log_likelihood(backbone, [encode(backbone, fact) for fact in facts], samples=4)


def in_own_process(job: str, config: dict[str, Any], model: str) -> dict[str, Any]:
    """Run one job of this module in a new process; return what it found."""
    command = [sys.executable, "-m", "benchmarks.paper.cost", "--job", job, "--config", json.dumps(config), "--model"]
    done = subprocess.run([*command, model], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def job(name: str, config: dict[str, Any], model: str) -> dict[str, Any]:
    """One measurement, alone in its process."""
    torch.set_num_threads(1)
    backbone, split = tr.load(model), demo_split()
    with WeightsWatch(backbone) as watch:
        if name == "inference":
            infer(backbone, split.forget)
            found: dict[str, Any] = {}
        elif name.startswith("attached/"):
            memory = EditMemory.load(config["file"], backbone)
            with memory.attached(backbone):
                infer(backbone, split.forget)
            found = {"file_bytes": Path(config["file"]).stat().st_size, "memory_bytes": memory.nbytes}
        elif name in BUILDS:
            infer(backbone, split.forget[:1])
            memory, clock = edited(backbone, BUILDS[name], split.forget)
            found = clock.to_dict()
            memory.save(config["file"])
        else:
            stopping = Criterion.of(backbone, split.forget, spread(split.protect, WATCHED))
            trained = fit(name, config, backbone, split.forget, retain_rows(split), FINAL, stopping)
            reached = trained.checks[-1] if trained.checks else {}
            found = trained.to_dict() | {"checks": [], "last_check": reached}
    found.setdefault("backward_passes", watch.backward_passes)
    return found | {"peak_resident_bytes": peak_resident_bytes()}


def lost_by(folder: Path) -> dict[str, str]:
    """What each method costs held-out facts, as the main table says, where it was made."""
    file = folder / "main_table.json"
    table = json.loads(file.read_text())["table"] if file.exists() else {"columns": [], "rows": []}
    return {row[0]: row[table["columns"].index("held-out Δ")] for row in table["rows"]}


def main() -> None:
    run, args = start("cost", __doc__)
    plain = run.row("inference", {}, lambda: in_own_process("inference", {}, args.model))
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, form) in enumerate(BUILDS.items()):

            def measure(i: int = i, name: str = name) -> dict[str, Any]:
                config = {"file": str(Path(folder) / f"{i}.safetensors")}
                found = in_own_process(name, config, args.model)
                return found | {"attached": in_own_process(f"attached/{name}", config, args.model)}

            rows[name] = run.row(name, depends(form), measure)
    trained = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for name in GRIDS:
        if f"final/{name}" in trained:
            config = trained[f"final/{name}"]["found"]["config"]
            rows[name] = run.row(
                name, {"config": config}, lambda name=name, config=config: in_own_process(name, config, args.model)
            )
    base, mb, lost = plain["peak_resident_bytes"], 2**20, lost_by(args.out)
    fastest = min((row["cpu_seconds"] for name, row in rows.items() if name in GRIDS), default=None)
    table = []
    for name, row in rows.items():
        at = row.get("attached", {})
        table.append([
            name.replace("_", " "), f"{row['cpu_seconds']:.2f}",
            None if fastest is None or name in GRIDS else f"{fastest / row['cpu_seconds']:.1f}x",
            lost.get(name.replace("_", " ")),
            row["backward_passes"], f"{(row['peak_resident_bytes'] - base) / mb:+.1f}",
            f"{(at['peak_resident_bytes'] - base) / mb:+.1f}" if at else None,
            f"{at['file_bytes'] / mb:.1f}" if at else None,
        ])  # fmt: skip
    columns = [
        "method", "CPU s", "fastest trained takes", "held-out Δ, nats", "backward passes",
        "peak while editing, MB over inference", "while answering", "memory file, MB",
    ]  # fmt: skip
    run.results.save(table={"columns": columns, "rows": table})
    run.plot(
        "CPU seconds to edit forget01", "peak memory over inference, MB",
        {n: [(r["cpu_seconds"], (r["peak_resident_bytes"] - base) / mb)] for n, r in rows.items()}, log_x=True,
    )  # fmt: skip
    print(markdown(columns, table))


if __name__ == "__main__":
    if "--job" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--job")
        parser.add_argument("--config", type=json.loads)
        parser.add_argument("--model")
        given = parser.parse_args()
        print(json.dumps(job(given.job, given.config, given.model)))
    else:
        main()

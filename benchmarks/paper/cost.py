"""Wall clock, CPU seconds, backward passes and peak memory of editing forget01, ours against every trained baseline.

    python -m benchmarks.baselines.run      # first: chooses each trained method's configuration
    python -m benchmarks.paper.cost

Every method runs in a process of its own, so that its peak resident memory is its own. Trained methods run at their
tuned configuration until they have converged (``Budget``); their time is that of the optimizer steps up to there,
without the checks. Peak memory is of the whole process, less that of a process that only decodes the same questions.
The largest is not the average: allocators round up, so differences of a few megabytes mean nothing.
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
from timerome.memory import EditMemory
from timerome.splits import demo_split

from .common import OURS, QUICK_PAPER, edited, markdown, start

BUILDS = {**OURS, "paper mode, two states": QUICK_PAPER}


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
            memory, clock = edited(backbone, BUILDS[name], split.forget)
            found = clock.to_dict()
            if memory.book is not None:  # what another edit of the same model would not pay again
                alone, clock = edited(
                    backbone, BUILDS[name], split.forget, replace(split, calibrate=split.calibrate[:1])
                )
                found |= {f"{k}_without_calibration": v for k, v in clock.to_dict().items()}
            memory.save(config["file"])
        else:
            stopping = Criterion.of(backbone, split.forget, spread(split.protect, WATCHED))
            trained = fit(name, config, backbone, split.forget, retain_rows(split), FINAL, stopping)
            reached = trained.checks[-1] if trained.checks else {}
            found = trained.to_dict() | {"checks": [], "last_check": reached}
    found.setdefault("backward_passes", watch.backward_passes)
    return found | {"peak_resident_bytes": peak_resident_bytes()}


def main() -> None:
    run, args = start("cost", __doc__)
    plain = run.row("inference", {}, lambda: in_own_process("inference", {}, args.model))
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setting in BUILDS.items():

            def measure(name: str = name) -> dict[str, Any]:
                file = {"file": str(Path(folder) / f"{list(BUILDS).index(name)}.safetensors")}
                built = in_own_process(name, file, args.model)
                return built | {"attached": in_own_process(f"attached/{name}", file, args.model)}

            rows[name] = run.row(name, {"setting": repr(setting)}, measure)
    trained = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for name in GRIDS:
        if f"final/{name}" in trained:
            config = trained[f"final/{name}"]["found"]["config"]
            rows[name] = run.row(
                name, {"config": config}, lambda name=name, config=config: in_own_process(name, config, args.model)
            )
    base, mb = plain["peak_resident_bytes"], 2**20
    table = []
    for name, row in rows.items():
        at = row.get("attached", {})
        table.append([
            name.replace("_", " "), f"{row['wall_seconds']:.1f}", f"{row['cpu_seconds']:.1f}",
            f"{row['cpu_seconds_without_calibration']:.1f}" if "cpu_seconds_without_calibration" in row else None,
            row["backward_passes"], f"{(row['peak_resident_bytes'] - base) / mb:+.1f}",
            f"{(at['peak_resident_bytes'] - base) / mb:+.1f}" if at else None,
            f"{at['file_bytes'] / mb:.1f}" if at else None,
        ])  # fmt: skip
    columns = [
        "method", "wall s", "CPU s", "CPU s without calibration", "backward passes",
        "peak while editing, MB over inference", "peak while answering, MB over inference", "memory file, MB",
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

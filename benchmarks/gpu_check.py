"""Everything that only a GPU can show, in one command: ``python -m benchmarks.gpu_check``.

Correctness (known results, then the tests of the ops), side streams, graph capture and replay, a second device,
compute-sanitizer, then the benchmarks. What came out goes to benchmarks/results/gpu_check.DEVICE.json with device,
driver and versions, after every check. Exit status: 0 all passed, 1 a check failed, 2 the machine lacks something.

With ``--device cpu`` it runs what has a meaning there: the known results, other inputs on a second call, the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import goals
from benchmarks.gpu_cases import Case, cases
from timerome import backend_info
from timerome._files import write_text

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/ops/test_{name}.py" for name in (
    "sparsify_add", "sparse_lowrank_residual", "edit_sets", "ridge_cholesky", "accuracy",
)]  # fmt: skip
BENCHMARKS = ("sparse_lowrank_residual", "ridge_cholesky", "sparsify_add", "step")


class CheckError(Exception):
    """A check found a fault."""


class SkipError(Exception):
    """A check lacks what it needs."""


@dataclass(frozen=True)
class Where:
    """What is checked, and with which options of the benchmarks."""

    device: torch.device
    out: Path
    grid: str
    budget: float
    ours_only: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Another stream than the current one, on which all that is written inside runs."""
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if self.is_gpu else contextlib.nullcontext()

    def cases(self) -> list[Case]:
        return list(cases(self.ours_only))


def lacking(device: torch.device) -> list[str]:
    """What a machine needs for its GPU to be checked and has not."""
    if device.type != "cuda":
        return []
    if not torch.backends.cuda.is_built():
        return [f"a PyTorch built for CUDA (this is {torch.__version__})"]
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        return [f"an NVIDIA GPU that PyTorch {torch.__version__} can use as {device} ({count} seen); see nvidia-smi"]
    missing = []
    if torch.cuda.get_device_capability(device) < (8, 0):
        missing.append(f"a GPU of compute capability 8.0 or higher ({torch.cuda.get_device_name(device)})")
    if why_not := backend_info()["cuda_usable_why_not"]:
        missing.append(
            f"timerome's CUDA kernels ({why_not}): install the CUDA toolkit, then TIMEROME_CUDA=1 pip install"
        )
    return missing


# --- The checks. Each returns a line of detail, or raises.


def known_results(where: Where) -> str:
    """Every op on the device gives what its definition gives on the CPU; arguments stay as they were."""
    faults = []
    for case in where.cases():
        inputs = case.on(where.device)
        fault = case.fault(case.call(inputs))
        if not fault and any(
            not torch.equal(x.cpu().nan_to_num(), case.inputs[k].nan_to_num()) for k, x in inputs.items()
        ):
            fault = "an argument was changed"
        if fault:
            faults.append(f"{case.name}: {fault}")
    if faults:
        raise CheckError("; ".join(faults[:8]))
    return f"{len(where.cases())} cases"


def streams(where: Where) -> str:
    """Work on a side stream waits for that stream only: its inputs are written late, and never elsewhere."""
    for case in where.cases():
        real = case.on(where.device)
        late = {name: torch.zeros_like(x) for name, x in real.items()}
        where.wait()
        with where.side_stream():
            if where.is_gpu:
                torch.cuda._sleep(20_000_000)  # cycles, about 10 ms: what does not wait reads zeros
            for name, x in real.items():
                late[name].copy_(x)
            found = case.call(late)
        where.wait()
        if fault := case.fault(found):
            raise CheckError(f"{case.name}: {fault}")
    return f"{len(where.cases())} cases"


def graphs(where: Where) -> str:
    """A captured call, replayed on other inputs, gives their results. Capture refuses any wait for the GPU."""
    for case in where.cases():
        if not case.ours and case.tolerance:
            continue  # torch.linalg's routines wait
        static = case.on(where.device)
        replay, found = _capture(where, case, static)
        for other in (case.flipped(), case):
            for name, x in other.on(where.device).items():
                static[name].copy_(x)
            replay()
            where.wait()
            if fault := other.fault(found):
                raise CheckError(f"{case.name}: {fault}")
    return f"{len(where.cases())} cases, each replayed twice"


def _capture(where: Where, case: Case, static: dict[str, Any]) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    """What replays the call on the static inputs, and the static results."""
    if not where.is_gpu:
        found = case.call(static)

        def again() -> None:
            for kept, new in zip(found, case.call(static), strict=True):
                kept.copy_(new)

        return again, found
    with where.side_stream():  # libraries set themselves up on the first calls
        case.call(static)
        case.call(static)
    where.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(where.device), torch.cuda.graph(graph):
        found = case.call(static)
    return graph.replay, found


def second_device(where: Where) -> str:
    """Tensors of a device that is not the current one: its kernels run, and the current one stays."""
    if not where.is_gpu or torch.cuda.device_count() < 2:
        raise SkipError("needs two GPUs")
    other = torch.device("cuda", ((where.device.index or 0) + 1) % torch.cuda.device_count())
    with torch.cuda.device(where.device):
        here = torch.cuda.current_device()
        for case in where.cases():
            found = case.call(case.on(other))
            if torch.cuda.current_device() != here:
                raise CheckError(f"{case.name}: the current device is another afterwards")
            if any(x.device != other for x in found):
                raise CheckError(f"{case.name}: results are not on {other}")
            if fault := case.fault(found):
                raise CheckError(f"{case.name}: {fault}")
    return f"{len(where.cases())} cases on {other}"


def tests(where: Where) -> str:
    """The tests of the ops, those that run on this kind of device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", where.device.type, *TESTS]
    return re.sub(r"=+ ?", "", _run(command, {}).strip().splitlines()[-1])


def memcheck(where: Where) -> str:
    """No kernel of ours reads or writes outside its tensors."""
    return _sanitize(where, "memcheck")


def racecheck(where: Where) -> str:
    """No two threads of a block use a word of shared memory at once."""
    return _sanitize(where, "racecheck")


def _sanitize(where: Where, tool: str) -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if not where.is_gpu or program is None:
        raise SkipError("needs a GPU" if program else "needs compute-sanitizer, a part of the CUDA toolkit")
    check = [sys.executable, "-m", "benchmarks.gpu_check", "--device", str(where.device), "--checks", "known_results"]
    command = [program, "--tool", tool, "--error-exitcode", "99", *check, "--ours-only", "--out", os.devnull]
    # Without PyTorch's cache each tensor is an allocation of its own, with a border that memcheck knows.
    output = _run(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return next((line for line in output.splitlines() if "SUMMARY" in line), "clean").strip("= ")


def benchmarks(where: Where) -> str:
    """Measure; how the figures compare with the goals is reported, and no reason to fail."""
    for name in BENCHMARKS:
        options = ["--device", str(where.device), "--grid", where.grid, "--budget", str(where.budget)]
        _run([sys.executable, "-m", "benchmarks.kernels", name, *options, "--out", str(where.out)], {})
    return "; ".join(goals(where.out, where.device.type)) or "no case of the goals is in this grid"


CHECKS: dict[str, Callable[[Where], str]] = {
    check.__name__: check
    for check in (known_results, streams, graphs, second_device, tests, memcheck, racecheck, benchmarks)
}


def _run(command: Sequence[str], env: dict[str, str]) -> str:
    run = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CheckError(
            f"{' '.join(command[:6])} ... ended with {run.returncode}:\n{(run.stdout + run.stderr)[-4000:]}"
        )
    return run.stdout


# --- The report.


def about(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    info: dict[str, Any] = {
        "device": f"CPU, {platform.machine()}",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "device": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory, "devices": torch.cuda.device_count(), "cuda": torch.version.cuda,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            info["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return info | {"backend": backend_info()}


def _earlier(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Checks of an earlier run with the same device, driver and versions, of which only some may be run again."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    same = {**report["about"], "date": now["date"]} == json.loads(json.dumps(now))
    return report["checks"] if same else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--grid", default="normal", choices=("quick", "normal", "full"), help="of the benchmarks")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case of the benchmarks")
    parser.add_argument("--ours-only", action="store_true", help="only cases that run no library's kernels")
    args = parser.parse_args(arguments)
    if missing := lacking(args.device):
        print("This check needs:", *(f"- {what}" for what in missing), sep="\n")
        return 2
    where = Where(args.device, args.out, args.grid, args.budget, args.ours_only)
    chosen = args.checks or [name for name in CHECKS if where.is_gpu or name != "benchmarks"]
    path = args.out / f"gpu_check.{where.device.type}.json"
    report: dict[str, Any] = {"about": about(where.device), "checks": _earlier(path, about(where.device))}
    for name in chosen:
        begin = time.perf_counter()
        try:
            outcome, detail = "passed", CHECKS[name](where)
        except SkipError as reason:
            outcome, detail = "skipped", str(reason)
        except CheckError as fault:
            outcome, detail = "failed", str(fault)
        except Exception as error:  # a fault of a kernel comes as any kind of error: the other checks still run
            outcome, detail = "failed", f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - begin, 1)
        report["checks"][name] = {"outcome": outcome, "detail": detail, "seconds": seconds}
        print(f"{outcome:8}{name:16}{seconds:8.1f} s  {detail}", flush=True)
        if args.out != Path(os.devnull):
            args.out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(report, indent=1) + "\n")
    return int(any(report["checks"][name]["outcome"] == "failed" for name in chosen))


if __name__ == "__main__":
    sys.exit(main())

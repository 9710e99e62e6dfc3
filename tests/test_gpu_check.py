"""The one-command check of a GPU, as far as a machine without one can run it."""

import csv
import dataclasses
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import goals, gpu_cases, gpu_check
from benchmarks.kernels import BENCHMARKS
from benchmarks.kernels.cases import Setup
from benchmarks.kernels.run import MEASURED

IN_PROCESS = ["known_results", "streams", "graphs"]


@pytest.fixture
def few_cases(monkeypatch):
    """Every fourth case, which has each op among it."""
    chosen = list(gpu_cases.cases())[::4]
    ops = {"sparsify_add", "sparse_lowrank_residual", "gram", "ridge_cholesky"}
    assert {case.name.split()[0] for case in chosen} == ops
    monkeypatch.setattr(gpu_check, "cases", lambda ours_only: chosen)
    return chosen


def run(tmp_path, *checks):
    status = gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--checks", *checks])
    report = json.loads((tmp_path / "gpu_check.cpu.json").read_text())
    return status, {name: (check["outcome"], check["detail"]) for name, check in report["checks"].items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it needs")
def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert said.startswith("This check needs:\n- ") and f"{torch.__version__}" in said
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_does_not_serve_is_named(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "an NVIDIA GPU" in gpu_check.lacking(device)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "as cuda:1 (1 seen)" in gpu_check.lacking(torch.device("cuda:1"))[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "old one")
    monkeypatch.setattr(gpu_check, "backend_info", lambda: {"cuda_usable_why_not": "driver too old"})
    capability, kernels = gpu_check.lacking(device)
    assert "8.0 or higher (old one)" in capability and "driver too old" in kernels and "TIMEROME_CUDA=1" in kernels
    assert gpu_check.lacking(torch.device("cpu")) == []


def test_cases_have_something_to_find():
    """Rows edited and not, NaN, ties, statuses, and other inputs when flipped."""
    every = list(gpu_cases.cases())
    assert len({case.name for case in every}) == len(every) > 60
    assert {case.ours for case in every} == {True, False}
    for case in every:
        assert any(not torch.equal(x, case.flipped().inputs[name]) for name, x in case.inputs.items())
        if case.name.startswith("sparse_lowrank_residual"):
            edited = (case.wanted[0] != case.inputs["h"]).any(-1)
            assert 0 < int(edited.sum()) < edited.numel()
        if case.name.startswith("ridge"):
            assert set(case.wanted[2][:, :3].flatten().tolist()) == {0, 1, -1}


def test_checks_on_the_cpu_pass(tmp_path, few_cases):
    status, checks = run(tmp_path, *IN_PROCESS, "second_device", "memcheck")
    assert status == 0
    assert {name: outcome for name, (outcome, _) in checks.items()} == {
        **dict.fromkeys(IN_PROCESS, "passed"), "second_device": "skipped", "memcheck": "skipped",
    }  # fmt: skip
    about = json.loads((tmp_path / "gpu_check.cpu.json").read_text())["about"]
    assert about["backend"]["versions"]["torch"] == torch.__version__ and "CPU" in about["device"] and about["date"]


def test_a_later_run_of_some_checks_keeps_the_others(tmp_path, few_cases):
    run(tmp_path, "known_results")
    assert set(run(tmp_path, "second_device")[1]) == {"known_results", "second_device"}
    path = tmp_path / "gpu_check.cpu.json"
    report = json.loads(path.read_text())
    report["about"]["backend"]["versions"]["torch"] = "another"
    path.write_text(json.dumps(report))
    assert set(run(tmp_path, "second_device")[1]) == {"second_device"}


def test_a_wrong_result_fails_and_is_named(tmp_path, monkeypatch, few_cases):
    right = gpu_cases.sparsify_add
    monkeypatch.setattr(gpu_cases, "sparsify_add", lambda h, r, k, alpha, mask: right(h, r, max(0, k - 1), alpha, mask))
    status, checks = run(tmp_path, *IN_PROCESS)
    assert status == 1
    for outcome, detail in checks.values():
        assert outcome == "failed" and "sparsify_add (5, 64)" in detail and "entries differ" in detail


def test_changed_arguments_fail(few_cases):
    case = few_cases[0]

    def call(x):
        found = case.call(x)
        x["h"].add_(1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "cases", lambda ours_only: [dataclasses.replace(case, call=call)])
        with pytest.raises(gpu_check.CheckError, match="an argument was changed"):
            gpu_check.known_results(where())


def test_a_replay_that_remembers_its_first_inputs_fails(tmp_path, monkeypatch, few_cases):
    monkeypatch.setattr(gpu_check, "_capture", lambda where, case, static: (lambda: None, case.call(static)))
    status, checks = run(tmp_path, "graphs")
    assert status == 1 and "entries differ" in checks["graphs"][1]


def test_any_error_is_a_failed_check(tmp_path, monkeypatch, few_cases):
    def broken(where):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setitem(gpu_check.CHECKS, "streams", broken)
    status, checks = run(tmp_path, "streams", "known_results")
    assert status == 1 and "illegal memory access" in checks["streams"][1]
    assert checks["known_results"][0] == "passed"


def where(**changes):
    return gpu_check.Where(**{
        "device": torch.device("cpu"), "out": Path(os.devnull), "grid": "quick", "budget": 0.1, "ours_only": False,
        **changes,
    })  # fmt: skip


@pytest.mark.slow
def test_tests_run_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setattr(gpu_check, "TESTS", ["tests/ops/test_sparsify_add.py::test_empty"])
    assert gpu_check.tests(where()).startswith("4 passed")
    with pytest.raises(gpu_check.CheckError, match="ended with 3:\nwhy"):
        gpu_check._run([sys.executable, "-c", "print('why'); exit(3)"], {})


@pytest.mark.slow
def test_sanitizer_runs_the_cases_of_ours(tmp_path, monkeypatch):
    """A stand-in for NVIDIA's tool, which runs what it is given; the cases then run on the CPU."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$2 $4 $PYTORCH_NO_CUDA_MEMORY_CACHING"\nshift 4\n"$@" && echo "===== SUMMARY: 0"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check.Where, "is_gpu", True)
    outputs = []
    right = gpu_check._run
    monkeypatch.setattr(gpu_check, "_run", lambda command, env: outputs.append(right(command, env)) or outputs[-1])
    assert gpu_check.racecheck(where()) == "SUMMARY: 0"
    ours = sum(1 for _ in gpu_cases.cases(ours_only=True))
    assert outputs[0].startswith("racecheck 99 1\n") and f"{ours} cases" in outputs[0]


def table(folder, name, *rows):
    columns = [*BENCHMARKS[name].columns, "rival", *MEASURED]
    with (folder / f"{name}.cuda.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def test_goals_are_read_off_the_tables(tmp_path):
    assert goals.goals(tmp_path, "cuda") == []
    sizes = {"T": 2048, "d": 4096, "N": 40, "q": 0.9, "gated": "none"}
    table(
        tmp_path, "sparse_lowrank_residual",
        {**sizes, "rival": "timerome", "median_s": 2e-5, "speedup": 15, "of_floor": 0.5},
        {**sizes, "rival": "eager, topk", "median_s": 3e-4, "of_floor": 0.02},
        {**sizes, "rival": "eager, kthvalue", "median_s": 4e-4, "of_floor": 0.02},
        {**sizes, "rival": "torch.compile", "why_not": "no compiler"},
        {**sizes, "gated": 0.0, "rival": "timerome", "median_s": 8e-6, "of_floor": 0.8},
        {**sizes, "N": 400, "rival": "timerome", "median_s": 1e-9, "of_floor": 9},
    )  # fmt: skip
    solver = {"B": 256, "N": 40, "d": 1024, "ridges": 1}
    table(tmp_path, "ridge_cholesky", {**solver, "rival": "timerome", "median_s": 1e-3, "speedup": 2.9})
    step = {"model": "LLaDA-8B", "tokens": 512, "what": 40}
    # The medians alone would say 3 %.
    table(tmp_path, "step", {**step, "rival": "timerome", "median_s": 0.103, "speedup": 0.995},
          {**step, "rival": "no memory", "median_s": 0.1})  # fmt: skip
    assert goals.goals(tmp_path, "cuda") == [
        "edit, T 2048, N 40, times eager PyTorch: 15.00 (goal: at least 7, met)",
        "the same, in one-pass floors: 2.00 (goal: at most 2.5, met)",
        "no row passes the gate, in one-pass floors: 1.25 (goal: at most 1.5, met)",
        "256 systems of order 40, times torch.linalg: 2.90 (goal: at least 3, MISSED)",
        "memory in a step of LLaDA-8B's shapes, 512 tokens, percent: 0.50 (goal: at most 1, met)",
    ]


def test_goals_name_cases_of_the_benchmarks():
    """A renamed size or rival would otherwise pass for a case that is not there."""
    setup = Setup(torch.device("cuda"), torch.bfloat16)
    grids = {name: {tuple(map(str, case)) for case in BENCHMARKS[name].cases(setup, "normal")} for name in BENCHMARKS}
    assert {("2048", "4096", "40", "0.9", gated) for gated in ("none", "0.0")} <= grids["sparse_lowrank_residual"]
    assert ("256", "40", "1024", "1") in grids["ridge_cholesky"]
    assert {("LLaDA-8B", tokens, "40") for tokens in ("128", "512", "2048")} <= grids["step"]

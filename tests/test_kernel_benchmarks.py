"""The benchmarks check before they time, keep what they measured, and count what they say they count."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import lowrank, solvers
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.cases import Case, Rival, Setup, rows_of
from benchmarks.kernels.plot import draw, figure_of
from benchmarks.kernels.timing import Ceilings, Parts, Timing, _events, peak_bytes, race, race_in_parts
from timerome.ops import sparse_lowrank_residual

CPU = torch.device("cpu")
SETUP = Setup(CPU, torch.float32)
CEILINGS = Ceilings(copy=1e9, matmul=1e10)


def test_rivals_take_turns_and_short_calls_are_repeated() -> None:
    calls: list[str] = []
    found = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, budget=0.01, most=5)
    assert len(found["a"].samples) == len(found["b"].samples) == 5
    assert calls.count("a") > 100  # a call of a microsecond is repeated within a round


def test_long_work_takes_turns_part_by_part_and_what_is_around_a_part_is_gone_before_the_next() -> None:
    done: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        done.append("begin")
        yield
        done.append("end")

    rivals: dict[str, Parts] = {
        "a": lambda: ((around(), lambda i=i: done.append(f"a{i}")) for i in range(3)),
        "b": lambda: ((nullcontext(), lambda i=i: done.append(f"b{i}")) for i in range(4)),
    }
    found = race_in_parts(rivals, CPU, budget=0.0, least=5)
    assert len(found["a"].samples) == len(found["b"].samples) == 5
    assert len(done) == 6 * (3 * 3 + 4)
    for first in range(0, len(done), 13):
        a_round = done[first : first + 13]
        assert [x for x in a_round if x[0] == "b" and x != "begin"] == ["b0", "b1", "b2", "b3"]
        assert [x for x in a_round if x[0] == "a"] == ["a0", "a1", "a2"]
        for i in range(3):
            at = a_round.index(f"a{i}")
            assert (a_round[at - 1], a_round[at + 1]) == ("begin", "end")
            assert abs(a_round.index(f"b{i}") - at) == 2


class Device:
    """A GPU of a kind: sleeps last so many cycles of a gigahertz, and the host takes ``host`` milliseconds a call."""

    def __init__(self, host: float) -> None:
        self.host, self.now, self.free, self.slept = host, 0.0, 0.0, list[int]()

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.free = max(self.free, self.now) + cycles / 1e6

    def call(self) -> None:
        """Enqueue work of a millisecond."""
        self.now += self.host
        self.free = max(self.free, self.now) + 1.0

    def event(self, enable_timing: bool) -> Any:
        def record() -> None:
            found.at = max(self.free, self.now)

        def synchronize() -> None:
            self.now = max(self.now, self.free)

        found = SimpleNamespace(record=record, synchronize=synchronize, at=0.0)
        found.query = lambda: found.at <= self.now
        found.elapsed_time = lambda end: end.at - found.at
        return found


@pytest.mark.parametrize(("host", "ahead"), [(0.3, 1), (1.8, 2), (3.5, 4), (50.0, 4)])
def test_host_is_ahead_of_a_gpu_as_far_as_it_takes(host: float, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(host)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    clock = _events(torch.device("cpu"))
    times = [clock(device.call, 1) for _ in range(6)]
    assert device.slept[-1] == ahead * 1_000_000
    if host < 4:  # the call's own time, not the host's
        assert times[-1] == pytest.approx(1e-3)


def test_ratio_is_taken_within_rounds() -> None:
    # The machine got ten times slower half way; the ratio of medians would say 1.
    slow, fast = Timing((2.0, 2.0, 20.0, 20.0)), Timing((1.0, 1.0, 10.0, 10.0))
    assert slow.over(fast) == 2.0


@pytest.mark.parametrize("n", [1_000, 1_000_000])
def test_peak_counts_what_is_held_at_once(n: int) -> None:
    def call() -> torch.Tensor:
        a = torch.zeros(n)
        b = torch.ones(n)
        del a
        return b + torch.ones(n)  # b, ones and the sum at once: three

    assert 3 * 4 * n <= peak_bytes(call, CPU) <= 3 * 4 * n + 100


def test_floor_is_the_slower_of_moving_and_computing() -> None:
    assert CEILINGS.floor(1e9, 1e9) == 1.0
    assert CEILINGS.floor(1e6, 1e10) == 1.0


def case_of(**rivals: Rival) -> Case:
    return Case(rivals, lambda out: abs(out - 1.0), 0.1, nbytes=8.0, operations=1.0)


def test_wrong_or_failing_rivals_are_named_and_not_timed() -> None:
    def fails() -> float:
        raise RuntimeError("no compiler")

    case = case_of(
        timerome=Rival(lambda: 1.0, torch=False),
        wrong=Rival(lambda: 2.0),
        fails=Rival(fails),
        right=Rival(lambda: 1.05),
    )
    ours, wrong, failing, right = rows_of({"n": 1}, case, SETUP, CEILINGS, 0.01)
    assert ours["speedup"] > 0 and ours["best_torch"] == "right"
    assert right["speedup"] == 1.0
    assert "median_s" not in wrong and wrong["why_not"] == "wrong by 1"
    assert "median_s" not in failing and failing["why_not"] == "RuntimeError: no compiler"


def test_a_case_may_ask_for_more_rounds_than_its_budget_has() -> None:
    case = dataclasses.replace(case_of(timerome=Rival(lambda: 1.0)), least=9)
    (row,) = rows_of({}, case, SETUP, CEILINGS, 0.0)
    assert row["rounds"] == 9


def test_ours_may_not_be_wrong() -> None:
    with pytest.raises(AssertionError, match=r"timerome is wrong by 1 \(allowed: 0.1\)"):
        rows_of({"n": 1}, case_of(timerome=Rival(lambda: 2.0, torch=False)), SETUP, CEILINGS, 0.01)


@pytest.mark.parametrize(("q", "share"), [(0.0, "none"), (0.9, "none"), (0.5, 0.0), (0.9, 0.01), (0.0, 1.0)])
def test_all_rivals_of_the_residual_agree(q: float, share: float | str) -> None:
    case = lowrank.make(SETUP, 200, 64, 5, q, share)
    for name, rival in case.rivals.items():
        if name != "torch.compile":  # takes seconds; it is the same function
            assert case.error(rival.call()) <= case.allowed, name


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.01, 2), (1.0, 200)])
def test_gated_share_is_what_it_says(share: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = []

    def counting(h: torch.Tensor, *args: torch.Tensor, **options: Any) -> torch.Tensor:
        out = sparse_lowrank_residual(h, *args, **options)
        edited.append(int((out != h).any(-1).sum()))
        return out

    monkeypatch.setattr(lowrank, "sparse_lowrank_residual", counting)
    lowrank.make(SETUP, 200, 256, 5, 0.9, share).rivals["timerome"].call()
    assert edited == [rows]


def test_all_rivals_of_the_solvers_agree() -> None:
    for case in (
        solvers.make(SETUP, 3, 5, 16, 2),
        solvers.make_row(SETUP, "append", 6),
        solvers.make_row(SETUP, "delete", 6),
    ):
        for name, rival in case.rivals.items():
            allowed = case.allowed if rival.allowed is None else rival.allowed
            assert case.error(rival.call()) <= allowed, name


def test_run_writes_resumes_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ceilings, "measure", classmethod(lambda cls, device, dtype: CEILINGS))
    rows = kernels.run("cholesky_rows", tmp_path, grid="quick", budget=0.01)
    with (tmp_path / "cholesky_rows.cpu.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [r["rival"] for r in written] == [r["rival"] for r in rows] and len(rows) == 14
    about = json.loads((tmp_path / "cholesky_rows.cpu.json").read_text())
    assert about["threads"] == torch.get_num_threads() and about["dtype"] == "float32" and about["ceilings"]
    assert (tmp_path / "cholesky_rows.cpu.png").stat().st_size > 1000

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sys.modules["benchmarks.kernels.run"], "rows_of", never)
    again = kernels.run("cholesky_rows", tmp_path, grid="quick")
    assert [r["median_s"] for r in again] == pytest.approx([r["median_s"] for r in rows], rel=1e-3)
    with pytest.raises(AssertionError, match="measured again"):  # other inputs are another measurement
        kernels.run("cholesky_rows", tmp_path, grid="quick", seed=1)


def test_products_of_a_cpu_are_timed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def once(calls: dict[str, Any], device: torch.device, budget: float) -> dict[str, Timing]:
        kinds.append(calls["matmul"]().dtype)
        return {"copy": Timing((0.5,)), "matmul": Timing((0.25,))}

    monkeypatch.setattr(sys.modules["benchmarks.kernels.timing"], "race", once)
    found = Ceilings.measure(CPU, torch.float16)
    assert kinds == [torch.float32]
    assert found.copy == 2 * 2**30 / 0.5 and found.matmul == 2 * 2048**3 / 0.25


def test_a_plot_has_a_panel_for_each_kind_of_case_and_a_line_for_each_width(tmp_path: Path) -> None:
    rows = [
        {"T": t, "d": d, "N": 40, "q": q, "gated": "none", "rival": "timerome", "speedup": t / d + q}
        for t in (512, 64)
        for d in (1024, 4096)
        for q in (0.0, 0.9, 0.99)
    ]
    about = {"device": "a machine", "threads": 2, "dtype": "float32"}
    figure = figure_of(lowrank.LOWRANK, rows, about)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["q 0.0", "q 0.9", "q 0.99"]
    assert figure.get_suptitle() == "sparse_lowrank_residual: a machine, 2 threads, float32, N 40, gated none"
    lines = {str(line.get_label()): line for line in panels[1].get_lines()}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1024", "4096"]
    assert list(lines["4096"].get_xdata()) == [64, 512]
    assert list(lines["4096"].get_ydata()) == pytest.approx([64 / 4096 + 0.9, 512 / 4096 + 0.9])
    low, high = panels[0].get_ylim()
    assert low < min(row["speedup"] for row in rows) and high > max(row["speedup"] for row in rows)

    alone = figure_of(lowrank.LOWRANK, rows[:1], about)
    assert alone.get_suptitle().endswith("float32, d 1024, N 40, q 0.0, gated none") and not alone.legends
    draw(tmp_path / "one.png", lowrank.LOWRANK, rows[:1], about)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    draw(tmp_path / "none.png", lowrank.LOWRANK, [row | {"speedup": None} for row in rows], about)
    assert not (tmp_path / "none.png").exists()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Ceilings, "measure", classmethod(lambda cls, device, dtype: CEILINGS))
    options = ["--out", str(tmp_path), "--budget", "0.01", "--grid", "quick"]
    monkeypatch.setattr(sys, "argv", ["kernels", "cholesky_rows", *options])
    main()
    assert "times the best of PyTorch" in capsys.readouterr().out and (tmp_path / "cholesky_rows.cpu.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nothing"}, "expected one of sparse_lowrank_residual"),
        ({"name": "step", "grid": "huge"}, "expected grid quick, normal or full, got 'huge'"),
        ({"name": "step", "dtype": "int8"}, "expected dtype float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.run(out=tmp_path, **arguments)  # type: ignore[arg-type]

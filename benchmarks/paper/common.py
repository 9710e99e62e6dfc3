"""What the commands of this folder share: our own memories, arguments, plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import timerome as tr
from benchmarks.results import Clock, Results, about
from timerome.demo import CANVAS, DEMO, Setting, build
from timerome.facts import FactSet
from timerome.memory import BankConfig, Calibration, EditMemory
from timerome.splits import DemoSplit, demo_split

FOLDER = Path(__file__).parent / "results"
# Two states a fact, both on the answer's own canvas: fully masked and half revealed.
TWO_STATES = BankConfig(canvases=(None,), reveal=(0.0, 0.5))
WIDE = replace(
    DEMO.shipped,
    bank=BankConfig((None, CANVAS), reveal=tuple(i * 0.15 for i in range(7)), prompt_dropout=(0.0, 0.2, 0.4)),
)
OURS: dict[str, Setting] = {
    "timerome, shipped (refusal)": DEMO.shipped,
    "timerome, null (forgetting)": DEMO.null,
    "paper mode": replace(DEMO.paper, layer=3),
}
# With fewer negatives, read on the answers' own canvases; for other models and sizes.
LEAN: dict[str, Setting] = {
    "timerome, lean (null)": replace(DEMO.null, bank=TWO_STATES, negatives=100),
    "timerome, lean (refusal)": replace(DEMO.shipped, bank=TWO_STATES, negatives=100),
    "paper mode": OURS["paper mode"],
}
QUICK_PAPER = replace(OURS["paper mode"], bank=TWO_STATES)


@dataclass
class Run:
    """One run of a command: the model, where rows go, and how they are plotted."""

    backbone: tr.Backbone
    results: Results
    name: str

    def row(self, key: str, depends: dict[str, Any], measure: Any) -> dict[str, Any]:
        return self.results.row(key, depends, measure)

    def plot(self, x: str, y: str, series: dict[str, Sequence[tuple[float, float]]], *, log_x: bool = False) -> None:
        """Draw lines or, for series of one point, labelled points, beside the results file."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 4), dpi=110)
        for label, points in series.items():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, "o-" if len(points) > 1 else "o", label=label, markersize=4)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log_x:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
        figure.tight_layout()
        figure.savefig(self.results.path.with_suffix(".png"))
        plt.close(figure)


def start(
    name: str, description: str | None, more: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
) -> tuple[Run, argparse.Namespace]:  # fmt: skip
    """Read the command line of a script (``more`` adds its own options), load the model, open its results file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    more(parser)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--quick", action="store_true", help="few facts; shows that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tr.load(args.model)
    return Run(backbone, Results(args.out / f"{name}.json", about(backbone, seed=0)), name), args


def edited(
    backbone: tr.Backbone,
    setting: Setting,
    forget: FactSet,
    split: DemoSplit | None = None,
    calibration: Calibration | None = None,
) -> tuple[EditMemory, Clock]:
    """Build one of our memories for some facts; without a calibration, that of the gate is included in the time."""
    clock = Clock()
    with clock.running():
        memory, _ = build(backbone, replace(split or demo_split(), forget=forget), setting, calibration=calibration)
    return memory, clock


def depends(setting: Setting) -> dict[str, Any]:
    """What the row of a memory depends on: its setting and, where they are others than its own, the gate's canvases."""
    other = setting.gate_layer is not None and setting.bank.canvases != DEMO.calibrated.canvases
    return {"setting": asdict(setting), **({"calibrated": asdict(DEMO.calibrated)} if other else {})}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a terminal and for a README."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join("–" if c is None else str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)

"""What the commands of this folder share: our own memories, arguments, plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import timerome as tr
from benchmarks.results import Clock, Results, about
from timerome.memory import BankConfig, ByPlace, EditMemory, Ridge

FOLDER = Path(__file__).parent / "results"
CANVAS = 96  # holds every bundled answer


@dataclass(frozen=True)
class Form:
    """One way to edit.

    Attributes:
        method: how what is added is computed.
        at: the site, where the method leaves it open.
        says: what is answered instead; None forgets.
        gated: whether edits act where the answer gate says; if not, the paper's form: one system, at every token.
        threshold: of the gate, nats a token; None is each edit's own.
    """

    method: ByPlace | Ridge = ByPlace()
    at: int | tr.Site | None = None
    says: str | None = tr.REFUSAL
    gated: bool = True
    threshold: float | None = None

    def empty(self, backbone: tr.Backbone) -> EditMemory:
        """A memory to :meth:`add` to."""
        return EditMemory(backbone)

    def add(self, memory: EditMemory, facts: tr.FactSet) -> None:
        """Edit more facts, behind gates."""
        memory.forget(facts, answer=self.says, method=self.method, at=self.at, threshold=self.threshold)

    def build(self, backbone: tr.Backbone, facts: tr.FactSet) -> EditMemory:
        """A memory of these facts."""
        if self.gated:
            memory = EditMemory(backbone)
            self.add(memory, facts)
            return memory
        assert isinstance(self.method, Ridge)
        return tr.paper_memory(backbone, facts.with_new_object(self.says), at=self.at, method=self.method)


# One state, and two: fully masked and half revealed, on the answer's own canvas.
ONE_CANVAS = BankConfig((None,))
TWO_STATES = BankConfig((None,), (0.0, 0.5))
NULL = Form(Ridge("null", states=BankConfig((None, CANVAS))), at=3, says=None)
PAPER = Form(Ridge("null", rank=16, states=BankConfig((None, CANVAS))), at=3, says=None, gated=False)
OURS: dict[str, Form] = {
    "timerome (refusal)": Form(),
    "timerome, null (forgetting)": NULL,
    "paper mode": PAPER,
}


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


def edited(backbone: tr.Backbone, form: Form, facts: tr.FactSet) -> tuple[EditMemory, Clock]:
    """Build one of our memories for some facts, ready to act; the time is of all there is to do for that."""
    clock = Clock()
    with clock.running():
        memory = form.build(backbone, facts)
        with memory.attached():
            pass
    return memory, clock


def grown(backbone: tr.Backbone, form: Form) -> Callable[[tr.FactSet], tuple[EditMemory, Clock]]:
    """Return a function of more and more facts that gives their memory and the time it took in all.

    Gated edits are made one after another, so what is there is kept; the paper's one system is built anew.
    """
    memory, clock = form.empty(backbone), Clock()

    def of(facts: tr.FactSet) -> tuple[EditMemory, Clock]:
        if not form.gated:
            return edited(backbone, form, facts)
        with clock.running():
            if more := facts[len(memory) :]:
                form.add(memory, more)
            with memory.attached():
                pass
        return memory, clock

    return of


def depends(form: Form) -> dict[str, Any]:
    """What the row of a memory depends on."""
    return {"form": repr(form)}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a terminal and for a README."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join("–" if c is None else str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)

"""Protected keys: penalty β or null-space projection, which leaves held-out facts more at equal forgetting; JSON, plot.

    python -m benchmarks.editing.protection

Plain forgetting (``null``) of half of forget01. In paper mode one shared memory acts on every token, and protection is
all that keeps it from others. Behind the row gate held-out facts are not edited at all; what protection would save
there is read with the gate forced open, each held-out question given the nearest edit: the price of a false trigger.
Every memory is measured at several strengths; held-out change at a given forgetting is read off between two of them.
"""

from __future__ import annotations

import statistics as stats
from functools import cache
from pathlib import Path
from typing import Any

import timerome as tr
from benchmarks.measure import spread
from timerome.evaluation import compare, evaluate
from timerome.splits import demo_split

from .common import start
from .shares import scaled

METHODS: dict[str, dict[str, float]] = {
    "nothing protected": {},
    **{f"beta {beta:g}": {"beta": beta} for beta in (1.0, 100.0)},
    **{f"null space {energy:g}": {"null_space": energy} for energy in (0.9, 0.99, 0.999)},
}
FACTORS = (0.5, 1.0, 2.0, 4.0)
BANK = tr.BankConfig(canvases=(None,), reveal=(0.0, 0.5))
AT = (-25.0, -50.0, -100.0)  # nats of forgetting that held-out change is read at


def built(backbone: tr.Backbone, gated: bool, how: dict[str, float]) -> tr.EditMemory:
    """A memory of 20 facts of forget01; 20 protected facts of four other authors, 10 where each edit has its own."""
    split = demo_split()
    return tr.EditMemory.build(
        backbone, split.forget[::2], coordinate=tr.Coordinate(3), rank=16, bank=BANK,
        protect=split.protect[:: 8 if gated else 4] if how else None, gate=tr.Gate(split.calibrate) if gated else None,
        **how,
    )  # fmt: skip


def changes(backbone: tr.Backbone, memory: tr.EditMemory | None, facts: tr.FactSet) -> Any:
    """Log-likelihoods of facts, with common draws."""
    return evaluate(backbone, facts, memory=memory, samples=2, decode=False)


def interpolated(points: list[tuple[float, float]], at: float) -> float | None:
    """Held-out change where forgetting is ``at``, linear between measured strengths; None beyond them."""
    points = sorted(points, reverse=True)  # forgetting from little to much
    for (f0, h0), (f1, h1) in zip([(0.0, 0.0), *points], points, strict=False):
        if f1 <= at <= f0 and f1 < f0:
            return h0 + (h1 - h0) * (at - f0) / (f1 - f0)
    return None


def main() -> None:
    backbone, results, arguments = start("protection", modes="")
    split = demo_split()
    sets = {"forget": split.forget[::4], "held_out": spread(split.held_out, 12),
            "held_out_relations": spread(split.held_out_relations, 12)}  # fmt: skip
    before = cache(lambda name: changes(backbone, None, sets[name]))
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for mode, gated in (("paper mode", False), ("gate forced open", True)):
        for name, how in METHODS.items() if arguments.modes in mode else ():
            memory = cache(lambda gated=gated, how=how: built(backbone, gated, how))
            for factor in FACTORS:

                def measure(
                    memory: Any = memory, factor: float = factor, gated: bool = gated
                ) -> dict[str, dict[str, float]]:
                    edited = scaled(memory(), factor)
                    found = {}
                    for kind, facts in sets.items():
                        if edited.book is not None and kind != "forget":
                            edited.book.threshold, edited.book.floor = -2.0, -2.0
                        pair = compare(before(kind), changes(backbone, edited, facts))
                        found[kind] = {"mean": pair.mean, "lowest": pair.lowest, "edited": pair.after.edited_rows}
                    return found

                depends = {"how": how, "factor": factor, "facts": {k: len(v) for k, v in sets.items()}}
                found = results.row(f"{mode}, {name}, {factor:g}", depends, measure)
                held = stats.fmean([found["held_out"]["mean"], found["held_out_relations"]["mean"]])
                curves.setdefault(mode, {}).setdefault(name, []).append((found["forget"]["mean"], held))
    equal = {
        mode: {
            name: {f"{at:g}": interpolated(points, at) for at in AT} for name, points in lines.items()
        } for mode, lines in curves.items()
    }  # fmt: skip
    results.save(held_out_at_forgetting=equal)
    for mode, lines in equal.items():
        for name, values in lines.items():
            print(mode, name, values)
    plot(results.path, curves)


def plot(path: Path, curves: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Held-out change against forgetting, a line a method, strengths along it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (mode, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, points in lines.items():
            style = "--" if name.startswith("null") else ":" if name.startswith("nothing") else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, label=name)
        axis.set(title=mode, xlabel="forget01, change of log-probability, nats", ylabel="held-out, the same")
    figure.axes[0].legend(fontsize=6)
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()

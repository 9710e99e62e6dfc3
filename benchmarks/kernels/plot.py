"""The plot of a benchmark: how many times faster than the best of PyTorch ours is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import OURS, Benchmark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Points = list[tuple[float, float]]  # a size and a ratio
_PANEL, _LEAST = (2.6, 2.0), (7.0, 3.5)  # inches: of a panel, and of all, for a title and a legend


def draw(path: Path, benchmark: Benchmark, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the picture of these rows to a file, if any of them has a ratio; see :func:`figure_of`."""
    ours = [row for row in rows if row["rival"] == OURS and row.get("speedup")]
    if ours:
        figure_of(benchmark, ours, about).savefig(path)


def figure_of(benchmark: Benchmark, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> Figure:
    """Draw ratios over the sizes of ``benchmark.axis``, a line for each value of ``benchmark.lines``.

    What the other sizes are tells panels apart, which share their axes; a size that is always the same is in the title.

    Args:
        benchmark: whose rows these are.
        rows: with ``speedup``, as :func:`benchmarks.kernels.run` returns them.
        about: ``device``, ``threads`` and ``dtype``, for the title.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    constant = [c for c in benchmark.columns if len({str(row[c]) for row in rows}) == 1]
    panels = _panels(benchmark, rows, constant)
    wide = math.ceil(math.sqrt(len(panels)))
    high = math.ceil(len(panels) / wide)
    size = (max(_LEAST[0], _PANEL[0] * wide), max(_LEAST[1], _PANEL[1] * high + 1))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {name: colormaps["viridis"](0.85 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
    shown: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            (shown[name],) = axes.plot(xs, ys, "o-", markersize=3, linewidth=1, color=colours[name], label=name)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.3)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(panels))
        axes.tick_params(labelsize=7, labelbottom=i + wide >= len(panels))

    _scale(grid[0, 0], [point for lines in panels.values() for points in lines.values() for point in points])
    if len(names) > 1:
        handles = [shown[name] for name in names]
        figure.legend(handles=handles, title=benchmark.lines, loc="outside right upper", fontsize=8, title_fontsize=8)
    figure.supxlabel(benchmark.axis, fontsize=9)
    figure.supylabel("times faster than the best of PyTorch", fontsize=9)
    where = f"{benchmark.name}: {about['device']}, {about['threads']} threads, {about['dtype']}"
    fixed = [f"{c} {rows[0][c]}" for c in constant if c != benchmark.axis]
    figure.suptitle(", ".join([where, *fixed]), fontsize=8)
    return figure


def _panels(
    benchmark: Benchmark, rows: Sequence[dict[str, Any]], constant: Sequence[str]
) -> dict[str, dict[str, _Points]]:
    """Points by the title of a panel and the name of a line."""
    telling = [c for c in benchmark.columns if c not in (benchmark.axis, benchmark.lines, *constant)]
    panels: dict[str, dict[str, _Points]] = {}
    for row in rows:
        lines = panels.setdefault(", ".join(f"{c} {row[c]}" for c in telling), {})
        points = lines.setdefault(str(row[benchmark.lines]), [])
        points.append((float(row[benchmark.axis]), float(row["speedup"])))
    return panels


def _scale(axes: Axes, points: _Points) -> None:
    """Set limits, scales and ticks for these points and the line at 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    at = sorted({x for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{x:g}" for x in at])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(at[0] / 1.2, at[-1] * 1.2)
    ratios = [1.0, *(y for _, y in points)]
    margin = 1 + 0.1 * min(1.0, max(ratios) - min(ratios))
    axes.set_ylim(min(ratios) / margin, max(ratios) * margin)
    if max(ratios) >= 4 * min(ratios):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(2))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))

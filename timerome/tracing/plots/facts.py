"""One small map a fact: whether facts agree on where they are carried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...functional.effects import nanmean
from ..data import Effect, TraceData
from .drawing import NAMES, SCORES, figure_of, write

COLUMNS, MOST = 6, 48


def plot_facts(trace: TraceData, path: Path, effect: Effect) -> Path:
    """Draw site and role against step for each of the first facts; see :meth:`TraceResult.plot`."""
    values, best = trace.effects(effect), trace.best("per_fact", effect=effect)
    defined = [f for f in range(len(trace.facts)) if np.isfinite(values[f]).any()]
    shown = min(len(defined), MOST)
    # From the bottom up, as maps have their layers: a band for each role and module, its layers within.
    modules = list(dict.fromkeys(site.module for site in trace.sites))
    bands = [
        (f"{module}, {role}", [(n, r) for n, site in enumerate(trace.sites) if site.module == module])
        for r, role in reversed(list(enumerate(trace.roles)))
        for module in reversed(modules)
    ]
    lines = [line for _, band in bands for line in band]
    ends = np.cumsum([0, *(len(band) for _, band in bands)]) - 0.5
    columns = min(COLUMNS, shown)
    high = -(-shown // columns)
    figure = figure_of(1.8 + 1.5 * columns, 1.0 + high * max(1.4, 0.075 * len(lines)))
    axes = figure.subplots(high, columns, squeeze=False, sharex=True, sharey=True)
    low, top = min(0.0, float(np.nanpercentile(values, 1))), max(float(np.nanpercentile(values, 99)), 1e-6)
    rows: list[dict[str, Any]] = []
    image = None
    for place, axis in enumerate(axes.flat):
        if place >= shown:
            axis.set_visible(False)
            continue
        f = defined[place]
        panel = np.stack([values[f, n, :, r] for n, r in lines])
        image = axis.imshow(
            panel, cmap="cividis", vmin=low, vmax=top, aspect="auto", interpolation="nearest", origin="lower"
        )
        axis.set_title(trace.facts[f], fontsize=6, parse_math=False)
        chosen = best.get(trace.facts[f])
        if chosen is not None:
            n, k, r = trace.index(chosen)
            for color, width in (("white", 3.0), ("black", 1.2)):
                axis.plot(k, lines.index((n, r)), "s", markersize=7, fillstyle="none", color=color,
                          markeredgewidth=width, zorder=4)  # fmt: skip
        axis.set_xticks(range(len(trace.steps)), [str(step) for step in trace.steps], fontsize=6)
        for end in ends[1:-1]:
            axis.axhline(end, color="white", linewidth=1.5)
            axis.axhline(end, color="black", linewidth=0.5)
        axis.set_yticks((ends[1:] + ends[:-1]) / 2, [name for name, _ in bands], fontsize=6)
        axis.tick_params(axis="y", length=0)
        rows += [
            {
                "fact": trace.facts[f],
                "layer": trace.sites[n].layer,
                "module": trace.sites[n].module,
                "step": step,
                "role": trace.roles[r],
                effect: None if np.isnan(values[f, n, k, r]) else float(values[f, n, k, r]),
                "random_site": None if np.isnan(control) else float(control),
            }
            for n, r in lines
            for k, step in enumerate(trace.steps)
            for control in [nanmean(trace.control(effect)[f, k, r])]
        ]
    assert image is not None
    figure.colorbar(image, ax=axes, label="share of the total effect", shrink=0.6)
    more = f", {shown} of {len(trace.facts)}" if shown < len(trace.facts) else ""
    figure.suptitle(
        f"{NAMES[effect]} ({SCORES[trace.score]}) of each fact{more}; square: the fact's own best\n"
        "across: denoising step; up each band: layers, from the first",
        fontsize=9,
    )
    return write(figure, path, rows)

"""Heat maps: layer against step, a panel for each module and role."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data import Effect, TraceData
from ..verdict import rows, summary
from .drawing import NAMES, SCORES, conditions, figure_of, two_digits, write


def plot_map(trace: TraceData, path: Path, effect: Effect) -> Path:
    """Draw the mean over facts to ``path``, the data beside it; see :meth:`TraceResult.plot`."""
    mean = trace.mean(effect)
    modules = list(dict.fromkeys(site.module for site in trace.sites))
    layers = sorted({site.layer for site in trace.sites})
    best = trace.best(effect=effect)
    found = summary(trace, effect)
    random = found["random_site"][0]
    wide, high = len(trace.roles), len(modules)
    figure = figure_of(1.6 + wide * max(3.0, 0.55 * len(trace.steps)), 1.6 + high * max(1.8, 0.32 * len(layers)))
    axes = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True)
    low, top = min(0.0, float(np.nanmin(mean))), max(float(np.nanmax(mean)), 1e-6)
    for i, module in enumerate(modules):
        for j, role in enumerate(trace.roles):
            panel = np.full((len(layers), len(trace.steps)), np.nan)
            for n, site in enumerate(trace.sites):
                if site.module == module:
                    panel[layers.index(site.layer)] = mean[n, :, j]
            axis = axes[i, j]
            axis.set_facecolor("white")
            # Cividis grows evenly brighter: it reads the same in greyscale and for colour-blind readers.
            axis.imshow(panel, cmap="cividis", vmin=low, vmax=top, aspect="auto", origin="lower")
            for y, x in np.argwhere(np.isnan(panel)):
                axis.text(x, y, "–", ha="center", va="center", color="grey")
            if panel.size <= 120:
                for y, x in np.argwhere(~np.isnan(panel)):
                    dark = panel[y, x] < (low + top) / 2
                    axis.text(x, y, two_digits(panel[y, x]), ha="center", va="center", fontsize=7,
                              color="white" if dark else "black")  # fmt: skip
            if (module, role) == (best.module, best.role):
                spot = (trace.steps.index(best.step), layers.index(best.layer))
                axis.plot(*spot, marker="s", markersize=20, fillstyle="none", color="white", markeredgewidth=3.5)
                axis.plot(*spot, marker="s", markersize=20, fillstyle="none", color="black", markeredgewidth=1.5)
            axis.set_xticks(range(len(trace.steps)), [str(step) for step in trace.steps])
            axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            if i == 0:
                axis.set_title(f"role {role}", fontsize=9)
            if i == high - 1:
                axis.set_xlabel("denoising step")
            if j == 0:
                axis.set_ylabel(f"{module}: layer")
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="share of the total effect")
    permuted = found["permuted_steps"][0]
    controls = [
        f"random site {'–' if random is None else two_digits(random)}",
        *([] if permuted is None else [f"permuted steps {two_digits(permuted)}"]),
    ]
    figure.suptitle(
        f"{NAMES[effect]} ({SCORES[trace.score]}), {len(trace.facts)} fact{'s' * (len(trace.facts) != 1)}, "
        f"{conditions(trace.settings)}\n"
        f"{'largest' if found['flat'] else 'best'} (square): {best}, {two_digits(found['best_effect'][0])}; "
        f"at its step and role: {', '.join(controls)}"
        + ("\n–: undefined, or defined by too few facts" if np.isnan(mean).any() else "")
        + ("\nflat: nothing is shown to do more than a random site" if found["flat"] else ""),
        fontsize=9,
    )
    return write(figure, path, rows(trace))

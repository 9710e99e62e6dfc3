"""Effect against the denoising step, with intervals and the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...functional.effects import average_over_facts, first_largest
from ...functional.inference import two_stage_interval
from ..data import Effect, TraceData
from .drawing import LINES, NAMES, SCORES, conditions, figure_of, write


def plot_steps(trace: TraceData, path: Path, effect: Effect) -> Path:
    """Draw each module's best layer against the step, a panel for each role; see :meth:`TraceResult.plot`.

    Intervals are 95 % over facts and draws. The best layer was chosen on the same facts.
    """
    draws, mean = trace.draws(effect), trace.mean(effect)
    control = trace.control(effect)
    modules = list(dict.fromkeys(site.module for site in trace.sites))
    figure = figure_of(1.4 + 3.6 * len(trace.roles), 3.6)
    axes = figure.subplots(1, len(trace.roles), squeeze=False, sharey=True)[0]
    rows: list[dict[str, Any]] = []
    for r, (axis, role) in enumerate(zip(axes, trace.roles, strict=True)):
        series = []
        for module in modules:
            own = [n for n, site in enumerate(trace.sites) if site.module == module]
            if np.isfinite(mean[own, :, r]).any():
                n = own[first_largest(mean[own, :, r])[0]]
                series.append((str(trace.sites[n]), draws[:, :, n, :, r]))
        series.append(("random site", control[:, None, :, r]))
        for number, (name, values) in enumerate(series):
            totals = [None if values.shape[1] == 1 else trace.totals(effect, k) for k in range(len(trace.steps))]
            intervals = [two_stage_interval(values[:, :, k], totals[k]) for k in range(len(trace.steps))]
            found = average_over_facts(np.array([[np.nanmean(v) if np.isfinite(v).any() else np.nan for v in f.T]
                                                 for f in values]))  # fmt: skip
            shown = [k for k in range(len(trace.steps)) if np.isfinite(found[k])]
            x = [trace.steps[k] + 0.06 * (number - (len(series) - 1) / 2) for k in shown]
            y = np.array([intervals[k].mean for k in shown])
            ends = np.array([[i.low, i.high] for i in (intervals[k] for k in shown)]).reshape(-1, 2).T
            error = np.nan_to_num(np.abs(ends - y)) if len(shown) else None
            axis.errorbar(x, y, error, label=name, capsize=2, markersize=4, linewidth=1.2, **LINES[number % len(LINES)])
            rows += [
                {
                    "role": role,
                    "series": name,
                    "step": trace.steps[k],
                    "mean": intervals[k].mean,
                    "low": intervals[k].low,
                    "high": intervals[k].high,
                    "facts": intervals[k].n,
                }
                for k in shown
            ]
        axis.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        axis.set_xticks(sorted({row["step"] for row in rows}))
        axis.set_xlabel("denoising step")
        axis.set_title(f"role {role}", fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("share of the total effect")
    figure.suptitle(
        f"{NAMES[effect]} ({SCORES[trace.score]}), {len(trace.facts)} facts, {conditions(trace.settings)}:\n"
        "each module's best layer; 95 % over facts and draws",
        fontsize=9,
    )
    return write(figure, path, rows)

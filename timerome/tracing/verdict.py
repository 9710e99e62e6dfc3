"""A trace in numbers and words: what its intervals and tests allow to be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..coordinates import Coordinate, Site
from ..functional.effects import Floats, Interval, average_over_facts, bootstrap_interval
from ..functional.inference import two_stage_interval
from .data import Effect, TraceData

LEVEL = 0.05


def summary(trace: TraceData, effect: Effect) -> dict[str, Any]:
    """See :meth:`TraceResult.summary`."""
    head: dict[str, Any] = {
        "effect": effect,
        "score": trace.score,
        "facts": len(trace.facts),
        "not_traceable": dict(trace.not_traceable),
        "recalled": int(trace.recalled.sum()),
        "window": trace.settings.get("window"),
        "corruption": trace.settings.get("corruption"),
        "total_effect": listed(bootstrap_interval(_row_means(trace.clean - trace.corrupted))),
    }
    if not trace.has(effect):
        return {**head, "verdict": f"nothing to report: {trace.why_undefined(effect)}"}
    best = trace.best(effect=effect)
    at_best = trace.at(best, effect)
    _, step, role = trace.index(best)
    random = trace.control(effect)[:, step, role]
    over_random = bootstrap_interval(at_best - random)
    site, static_role = trace.best_static(effect=effect)
    rivals = trace.rivals(effect=effect)
    own_step = bootstrap_interval(trace.permuted[:, 0] - trace.permuted[:, 1])
    gain = trace.temporal_gain(effect=effect)
    every = trace.temporal_gain("every_step", effect=effect) if trace.has_every_step(effect) else None
    p_values = trace.p_values(effect=effect)
    p_best = float(p_values[trace.index(best)])
    return {
        **head,
        "best": best.to_dict(),
        "best_effect": listed(trace.interval(best, effect=effect)),
        "random_site": listed(bootstrap_interval(random)),
        "best_minus_random_site": listed(over_random),
        "p_corrected": p_best,
        "coordinates": int(np.isfinite(p_values).sum()),
        "above_random_site": int((p_values <= LEVEL).sum()),
        "flat": p_best > LEVEL,
        "permuted_steps": listed(bootstrap_interval(trace.permuted[:, 1])),
        "best_minus_permuted_steps": listed(own_step),
        "best_static": {"layer": site.layer, "module": site.module, "role": static_role},
        "temporal_gain": listed(gain),
        "temporal_gain_over_every_step": None if every is None else listed(every),
        "indistinguishable": len(rivals),
        "split_half": _stability(trace, effect),
        "verdict": _verdict(best, len(trace.facts), len(rivals), p_best, over_random, own_step, gain, every),
    }


def told(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a summary as (what, value) for people: rounded, places by name, what is empty left out.

    Example:
        >>> best = {"layer": 5, "module": "block", "step": 0, "role": "object"}
        >>> told({"best": best, "best_effect": [0.98765, 0.9, 1]})
        [('best', 'block.5 @ step 0, object'), ('best effect', '0.99 [0.90, 1.00]')]
    """
    return [
        (name.replace("_", " "), _told(value))
        for name, value in summary.items()
        if name != "verdict" and value not in (None, {})
    ]


def _told(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2g}"
    if isinstance(value, list):
        mean, low, high = ("–" if x is None else f"{round(x, 2) + 0.0:.2f}" for x in value)
        return f"{mean} [{low}, {high}]"
    if not isinstance(value, dict):
        return str(value)
    if "step" in value:
        return str(Coordinate(**value))
    if "layer" in value:
        return f"{Site(value['layer'], value['module'])}, {value['role']}"
    return "; ".join(f"{name.replace('_', ' ')}: {x if isinstance(x, str) else _told(x)}" for name, x in value.items())


def rows(trace: TraceData) -> list[dict[str, Any]]:
    """One JSON-ready row a coordinate: every effect with its interval over facts and draws, and the control."""
    effects: list[Effect] = [effect for effect in ("tie", "ie", "forced_ie") if effect in trace.measured[trace.score]]
    means = {effect: trace.mean(effect) for effect in effects}
    controls = {effect: average_over_facts(trace.control(effect)) for effect in effects}
    draws = {effect: trace.draws(effect) for effect in effects}
    counted = np.isfinite(trace.effects(trace.default_effect())).sum(0)
    found = []
    for n, site in enumerate(trace.sites):
        for k, step in enumerate(trace.steps):
            for r, role in enumerate(trace.roles):
                numbers: dict[str, float] = {}
                for effect in effects:
                    interval = two_stage_interval(draws[effect][:, :, n, k, r], trace.totals(effect, k), resamples=500)
                    numbers |= {
                        effect: means[effect][n, k, r],
                        f"{effect}_low": interval.low,
                        f"{effect}_high": interval.high,
                        f"random_site_{effect}": controls[effect][k, r],
                    }
                found.append(
                    {
                        "layer": site.layer,
                        "module": site.module,
                        "step": step,
                        "role": role,
                        "facts": int(counted[n, k, r]),
                        **{name: None if np.isnan(x) else float(x) for name, x in numbers.items()},
                    }
                )
    return found


def listed(interval: Interval) -> list[float | None]:
    """Mean and ends, None for what is undefined."""
    return [None if np.isnan(x) else float(x) for x in interval[:3]]


def _stability(trace: TraceData, effect: Effect) -> dict[str, float | None] | None:
    if len(trace.facts) < 4:
        return None
    found = trace.stability(effect=effect)._asdict()
    return {name: None if np.isnan(x) else float(x) for name, x in found.items()}


def _row_means(values: Floats) -> Floats:
    return np.array([np.nanmean(row) for row in values], dtype=np.float64)


def _positive(interval: Interval) -> bool:
    return not interval.contains_zero and interval.mean > 0


def _verdict(
    best: Coordinate,
    facts: int,
    rivals: int,
    p_best: float,
    over_random: Interval,
    own_step: Interval,
    gain: Interval,
    every: Interval | None,
) -> str:
    """Say in words what the intervals allow."""

    def shown(interval: Interval) -> str:
        if np.isnan(interval.low):
            return f"{interval.mean:+.2f}, no interval"
        return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"

    if facts < 2:
        return f"{best} is largest, but one fact gives no interval: nothing can be said about sites or steps."
    parts = [f"{best} is largest" + (f", not told apart from {rivals} other{'s' * (rivals > 1)}" if rivals else "")]
    corrected = f"p = {p_best:.2g}, corrected for all coordinates"
    if p_best <= LEVEL:
        parts.append(f"{shown(over_random)} above a random site ({corrected})")
    elif 0.5**facts > LEVEL:
        parts.append(
            f"{shown(over_random)} above a random site, but {facts} facts are too few for a corrected test, which "
            "takes five: nothing is claimed"
        )
    else:
        parts.append(f"it is not shown to do more than a random site ({shown(over_random)}; {corrected}): the map is "
                     "flat, and nothing is claimed")  # fmt: skip
    if np.isnan(gain.low):
        parts.append(f"whether the step adds anything cannot be told from so few facts ({shown(gain)})")
    elif not _positive(gain):
        parts.append(f"the step adds nothing over the best static site ({shown(gain)})")
    else:
        parts.append(f"the step adds {shown(gain)} over the best static site's mean over steps")
        if every is not None and not _positive(every):
            parts.append(f"but the step adds nothing over the best site restored at every step ({shown(every)})")
        elif every is not None:
            parts.append(f"and {shown(every)} over the best site restored at every step")
    if not np.isnan(own_step.mean):
        what = "better than" if _positive(own_step) else "not shown to be better than"
        parts.append(f"activations of its own steps are {what} those of permuted steps ({shown(own_step)})")
    return "; ".join(parts) + "."

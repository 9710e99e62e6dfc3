"""Pictures of a trace. Each is a PNG with its data as CSV beside it, and reads in greyscale."""

from __future__ import annotations

from pathlib import Path

from ..data import Effect, TraceData
from .facts import plot_facts
from .maps import plot_map
from .steps import plot_steps


def draw(trace: TraceData, path: Path, kind: str, effect: Effect) -> Path:
    """See :meth:`TraceResult.plot`."""
    kinds = {"map": plot_map, "steps": plot_steps, "facts": plot_facts}
    if kind not in kinds:
        raise ValueError(f"TraceResult.plot: expected kind in {tuple(kinds)}, got {kind!r}.")
    return kinds[kind](trace, path, effect)

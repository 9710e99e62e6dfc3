"""What the pictures share: figures without pyplot, one style, files written whole with their data."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "tie": "Temporal indirect effect",
    "ie": "Same-step indirect effect",
    "forced_ie": "Same-step indirect effect, true tokens forced",
}
SCORES = {"log_prob": "log-probability", "prob": "probability", "rank": "log rank"}
WINDOWS = {
    "single": "restored at the step alone",
    "from": "restored from the step on",
    "until": "restored up to the step",
}
CORRUPTIONS = {"noise": "noise on the subject", "mask": "subject masked", "subject": "another subject"}
# Told apart in greyscale and by the colour-blind: each series has its own grey, dash and marker.
LINES = [
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "0.45", "linestyle": "--", "marker": "s"},
    {"color": "0.6", "linestyle": "-.", "marker": "^"},
    {"color": "0.3", "linestyle": ":", "marker": "D"},
]


def figure_of(width: float, height: float) -> Figure:
    """Make a figure, in inches. pyplot would change the caller's backend and keep it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def conditions(settings: Mapping[str, Any]) -> str:
    """Say in words what was disturbed and when it was restored."""
    return f"{CORRUPTIONS[settings['corruption']]}, {WINDOWS[settings['window']]}"


def two_digits(value: float) -> str:
    """Format a number; what rounds to nothing has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def write(figure: Figure, path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the figure as PNG and its data beside it as CSV, each whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    with whole(path.with_suffix(".csv")) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path

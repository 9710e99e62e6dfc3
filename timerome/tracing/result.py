"""The result of a trace, with its report, pictures and file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .data import Effect, TraceData
from .files import load, save
from .plots import draw
from .verdict import rows, summary


@dataclass(frozen=True)
class TraceResult(TraceData):
    """Effects of every coordinate for every fact traced. Made by :meth:`CausalTracer.trace`, or read by :meth:`load`.

    What was measured, the best coordinates and what may be said of them are :class:`TraceData`'s.
    """

    def summary(self, *, effect: Effect | None = None) -> dict[str, Any]:
        """Return the main numbers and a verdict, JSON-ready. Intervals are ``[mean, low, high]``, 95 %.

        Args:
            effect: which effect; by default TIE where it is defined.
        """
        return summary(self, effect or self.default_effect())

    def table(self, top: int | None = 10, *, effect: Effect = "tie") -> list[dict[str, Any]]:
        """Return the ``top`` coordinates by mean effect, best first: one JSON-ready row each, with the control.

        Raises:
            TraceError: as :meth:`best`.
        """
        self.require(effect)
        found = [row for row in rows(self) if row[effect] is not None]
        return sorted(found, key=lambda row: -row[effect])[:top]

    def plot(
        self, path: str | Path, *, kind: Literal["map", "steps", "facts"] = "map", effect: Effect | None = None
    ) -> Path:
        """Draw the trace as a PNG that reads in greyscale; the data go beside it as CSV.

        Args:
            path: of the PNG; the CSV has the same name.
            kind: ``map``: layer against step, a panel for each module and role. ``steps``: effect of each module's best
                layer against the step, with intervals and the control. ``facts``: one small map a fact.
            effect: which effect; by default TIE where it is defined.

        Returns:
            The path.

        Raises:
            TraceError: as :meth:`best`.
            ValueError: an unknown kind.
        """
        effect = effect or self.default_effect()
        self.require(effect)
        return draw(self, Path(path), kind, effect)

    def save(self, path: str | Path) -> Path:
        """Write the trace as one safetensors file, JSON in its metadata. The file appears whole or not at all."""
        save(self, Path(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> TraceResult:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            TraceFileError: it is cut short, no safetensors file, no trace, or of another format.
        """
        return cls(**load(Path(path)))

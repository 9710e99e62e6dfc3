"""Which coordinate to edit at, with the evidence for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..coordinates import Coordinate
from ..functional.effects import Floats, average_over_facts
from .verdict import LEVEL, listed

if TYPE_CHECKING:
    from .result import Effect, TraceResult

TIE_TOLERANCE = 0.01  # share of the total effect within which two coordinates count as tied


@dataclass(frozen=True)
class Selection:
    """Coordinates a trace chose, and why.

    Attributes:
        policy: ``global``, ``per_fact``, ``per_group`` or ``multi``.
        coordinates: by what they are for: ``""`` for ``global``, fact ids, groups, or ``"0"``, ``"1"``, ... by rank for
            ``multi``.
        evidence: JSON-ready: the trace and how it was made; for each entry of ``coordinates`` its effect, what it is
            compared with, with how many others it is tied, and whether its map is flat. Handed to ``EditMemory.build``
            it goes into the edit file.
    """

    policy: str
    coordinates: dict[str, Coordinate]
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def flat(self) -> list[str]:
        """Entries whose map is flat: nothing in it is shown to do more than a random site."""
        return [key for key, found in self.evidence["chosen"].items() if found["flat"]]

    def coordinate(self, fact_id: str = "", group: str = "") -> Coordinate:
        """Return the coordinate for a fact (the best one, for ``multi``).

        Raises:
            KeyError: the trace chose none for it.
        """
        key = {"global": "", "per_fact": fact_id, "per_group": group, "multi": "0"}[self.policy]
        if key not in self.coordinates:
            raise KeyError(f"Selection.coordinate: the trace chose none for {key!r}; it has {list(self.coordinates)}.")
        return self.coordinates[key]


def select(trace: TraceResult, policy: str, effect: Effect, top: int = 3) -> Selection:
    """See :meth:`TraceResult.select`."""
    best: Any = trace.best(policy, effect=effect, top=top)  # type: ignore[call-overload]
    p_values = trace.p_values(effect=effect)
    everyone = list(range(len(trace.facts)))
    if policy == "per_fact":
        chosen = {key: (c, [trace.facts.index(key)]) for key, c in best.items()}
    elif policy == "per_group":
        chosen = {key: (c, [i for i in everyone if trace.groups[i] == key]) for key, c in best.items()}
    elif policy == "multi":
        chosen = {str(i): (c, everyone) for i, c in enumerate(best)}
    else:
        chosen = {"": (best, everyone)}
    evidence: dict[str, Any] = {
        "policy": policy,
        "effect": effect,
        "score": trace.score,
        "trace": digest(trace),
        "fingerprint": trace.fingerprint,
        "facts": len(trace.facts),
        "not_traceable": len(trace.not_traceable),
        "settings": trace.settings,
        "verdict": trace.summary(effect=effect)["verdict"],
        "chosen": {
            key: {
                "coordinate": str(coordinate),
                **_evidence(trace, effect, coordinate, rows, float(p_values[trace.index(coordinate)])),
            }
            for key, (coordinate, rows) in chosen.items()
        },
    }
    return Selection(policy, {key: coordinate for key, (coordinate, _) in chosen.items()}, evidence)


def digest(trace: TraceResult) -> str:
    """Short hash of what was traced and found, so that an edit file can be held against its trace."""
    found = hashlib.sha256(json.dumps([trace.facts, trace.settings, trace.fingerprint]).encode())
    for score in sorted(trace.measured):
        for name in sorted(trace.measured[score]):
            found.update(np.ascontiguousarray(trace.measured[score][name]).tobytes())
    return found.hexdigest()[:16]


def _evidence(
    trace: TraceResult, effect: Effect, coordinate: Coordinate, rows: list[int], p_all: float
) -> dict[str, Any]:
    index = trace.index(coordinate)
    values, control = trace.effects(effect)[rows], trace.control(effect)[rows]
    mean: Floats = average_over_facts(values)
    own = float(mean[index])
    tied = int((mean >= own - TIE_TOLERANCE).sum()) - 1
    everyone = len(rows) == len(trace.facts)
    if everyone:
        interval, p_value, flat = listed(trace.interval(coordinate, effect=effect)), p_all, p_all > LEVEL
        how = f"corrected sign test over {len(rows)} facts, p > {LEVEL}"
    else:
        # Too few facts for a test: a map that a random site reaches somewhere says nothing about its best cell.
        reached = np.nanmax(control) if np.isfinite(control).any() else np.nan
        interval, p_value, flat = None, None, bool(not own > reached)
        how = "the random-site control is as large at some step and role"
    return {
        "facts": len(rows),
        "mean": own,
        "interval": interval,
        "random_site": _number(average_over_facts(control)[index[1:]]),
        "p_corrected": p_value,
        "tied": max(tied, 0),
        "flat": flat,
        "flat_means": how,
    }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)

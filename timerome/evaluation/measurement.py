"""A number with what it takes to believe it, and what may be done with two of them.

A bare float can be averaged with any other; a :class:`Measurement` cannot. It knows its metric, unit, protocol, seed
and the records it comes from, so that a mean over unlike metrics, a difference between two protocols, or an unpaired
"paired" test is refused. What could not be computed is :class:`Absent`, with its reason; it has no value to go astray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..functional.bootstrap import bootstrap_ci

Better = Literal["higher", "lower", "closer to 0", "neither"]


class UnlikeMeasurementsError(TypeError):
    """Measurements of different metrics, protocols, units or records were to be treated as one."""


@dataclass(frozen=True)
class Measurement:
    """A measured number.

    Attributes:
        metric: what it is, dotted: ``"tofu.forget.truth_ratio"``.
        value: the number, finite.
        unit: what it counts: ``"share"``, ``"nats"``, ``"log10 p"``, ….
        protocol: how it was taken, in words; two numbers can be compared only if these agree.
        seed: of everything drawn for it.
        n: sample size: how many records it is computed from.
        standard_error: of the value over records; NaN where one record, or the statistic, has none.
        low: lower end of the 95 % bootstrap interval over records; NaN with the standard error.
        high: upper end.
        better: which direction is the wanted one.
        per_record: the records' values by id, where the number is their mean; empty where it is another statistic.
        note: what a reader must know.
        statistic: what the number is of its terms, where it is made of other metrics: see
            :mod:`timerome.evaluation.comparison`.
        terms: those metrics' names.

    Raises:
        ValueError: the value is not finite, or nothing was measured. What cannot be computed is :class:`Absent`.
    """

    metric: str
    value: float
    unit: str
    protocol: str
    seed: int
    n: int
    standard_error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    better: Better = "higher"
    per_record: Mapping[str, float] = field(default_factory=dict, repr=False)
    note: str = ""
    statistic: str = ""
    terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.n < 1:
            raise ValueError(
                f"Measurement {self.metric}: expected a finite value of at least one record, got {self.value} of "
                f"{self.n}; what cannot be computed is Absent, with the reason."
            )

    @classmethod
    def over(
        cls,
        metric: str,
        per_record: Mapping[str, float],
        *,
        unit: str = "share",
        protocol: str,
        seed: int,
        better: Better = "higher",
        note: str = "",
    ) -> Measurement | Absent:
        """Return the mean over records with its standard error and bootstrap interval; Absent if there is no record.

        Args:
            metric: what it is.
            per_record: one finite value a record; average over a record's prompts or draws first.
            unit: what it counts.
            protocol: how it was taken.
            seed: of everything drawn, and of the bootstrap.
            better: which direction is the wanted one.
            note: what a reader must know.

        Raises:
            ValueError: a value is not finite; leave such a record out and say so in ``note``.

        Example:
            >>> Measurement.over("em", {"a": 1.0, "b": 0.5}, protocol="l2r", seed=0).value
            0.75
        """
        if not per_record:
            return Absent(metric, note or "no record has what it needs")
        values = np.array(list(per_record.values()), dtype=np.float64)
        interval = bootstrap_ci(values, seed=seed)
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(
            metric, interval.mean, unit, protocol, seed, len(values), error, interval.low, interval.high, better,
            dict(per_record), note,
        )  # fmt: skip

    def to_dict(self, *, records: bool = True) -> dict[str, Any]:
        """Return JSON-ready values, with None for what is NaN; ``records=False`` leaves the records' values out."""
        values: dict[str, Any] = {
            "metric": self.metric, "value": self.value, "standard_error": finite_or_none(self.standard_error),
            "low": finite_or_none(self.low), "high": finite_or_none(self.high), "n": self.n, "unit": self.unit,
            "better": self.better, "protocol": self.protocol, "seed": self.seed,
        }  # fmt: skip
        if self.note:
            values["note"] = self.note
        if self.statistic:
            values |= {"statistic": self.statistic, "terms": list(self.terms)}
        if records and self.per_record:
            values["per_record"] = dict(self.per_record)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Inverse of :meth:`to_dict`."""
        ends = {k: math.nan if values[k] is None else values[k] for k in ("standard_error", "low", "high")}
        return cls(**{**values, **ends, "terms": tuple(values.get("terms", ()))})

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}"
        return f"{self.metric} = {self.value:.4g}{error} {self.unit} (n = {self.n})"


@dataclass(frozen=True)
class Absent:
    """A metric that could not be computed.

    Attributes:
        metric: which one.
        reason: why not, and what it would take.
    """

    metric: str
    reason: str

    def to_dict(self, *, records: bool = True) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"metric": self.metric, "absent": self.reason}


Result = Measurement | Absent


class Sheet:
    """The measurements of one benchmark as they are made, in order.

    Args:
        prefix: what metrics' names begin with.
        seed: of everything drawn.

    Attributes:
        results: measurements and absent ones, by name.
    """

    def __init__(self, prefix: str, seed: int) -> None:
        self.prefix, self.seed = prefix, seed
        self.results: dict[str, Result] = {}

    def add(
        self,
        name: str,
        per_record: Mapping[str, float],
        protocol: str,
        *,
        of: int | None = None,
        better: Better = "higher",
        unit: str = "share",
        note: str = "",
    ) -> Result:
        """Add a mean over records; Absent where there is none.

        Args:
            name: of the metric, after the prefix.
            per_record: values by record.
            protocol: how they were taken.
            of: how many records there were, so that those without a value are counted in the note.
            better: which direction is wanted.
            unit: what it counts.
            note: why records may lack a value.
        """
        left = (of or 0) - len(per_record)
        if left > 0:
            note = f"{left} of {of} records left out: {note or 'they lack what it needs, or do not fit'}"
        return self.put(Measurement.over(
            f"{self.prefix}.{name}", per_record, unit=unit, protocol=protocol, seed=self.seed, better=better, note=note,
        ))  # fmt: skip

    def absent(self, name: str, reason: str) -> Result:
        """Add what cannot be computed."""
        return self.put(Absent(f"{self.prefix}.{name}", reason))

    def put(self, result: Result) -> Result:
        """Add a result made elsewhere."""
        self.results[result.metric] = result
        return result

    def __getitem__(self, name: str) -> Result:
        return self.results[f"{self.prefix}.{name}"]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results.values())


def finite_or_none(value: float) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None

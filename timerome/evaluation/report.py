"""Results under one or more conditions: JSON, CSV and one self-contained page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from .._files import write_text
from ..page import join, page, scrolled, table, text
from .comparison import Paired, paired_all
from .measurement import Absent, Measurement, Result

CSV_FIELDS = (
    "condition", "metric", "value", "standard_error", "low", "high", "n", "unit", "better", "protocol", "seed",
    "difference", "difference_low", "difference_high", "p_value", "effect_size", "absent", "note",
)  # fmt: skip
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Report:
    """What was found, and what is needed to believe it.

    Attributes:
        title: of the page.
        settings: what the results depend on, JSON-ready: model, memory, data, protocol, versions. No date, so that
            one run and its repetition write the same files.
        conditions: results by condition; the first is what the others are compared with.

    Raises:
        ValueError: there is no condition.
    """

    title: str
    settings: Mapping[str, Any]
    conditions: Mapping[str, Sequence[Result]]

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("Report: expected at least one condition, got none.")

    @property
    def reference(self) -> str:
        """Name of the condition that others are compared with."""
        return next(iter(self.conditions))

    @cached_property
    def paired(self) -> dict[str, list[Paired]]:
        """The paired comparison of each other condition with the reference, by condition."""
        first = self.conditions[self.reference]
        return {name: paired_all(first, self.conditions[name]) for name in self._others}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "title": self.title,
            "settings": dict(self.settings),
            "conditions": {name: [r.to_dict() for r in found] for name, found in self.conditions.items()},
            "paired": {name: [p.to_dict() for p in found] for name, found in self.paired.items()},
        }

    def write(self, folder: str | Path) -> None:
        """Write ``results.json``, ``results.csv`` and ``report.html`` into a folder, each whole or not at all."""
        folder = Path(folder)
        write_text(folder / "results.json", json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "results.csv", self.to_csv())
        write_text(folder / "report.html", self.to_html())

    def to_csv(self) -> str:
        """Return one row a condition and metric."""
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for name, found in self.conditions.items():
            for result in found:
                row = {"condition": name, **result.to_dict(records=False)}
                if (p := self._compared.get((name, result.metric))) is not None:
                    other = p.to_dict()
                    row |= {k: other[k] for k in ("difference", "p_value", "effect_size")}
                    row |= {"difference_low": other["low"], "difference_high": other["high"]}
                writer.writerow(row)
        return out.getvalue()

    def to_html(self) -> str:
        """Return the page."""
        sections = [("", f"<p>{text(self._lead())}</p>")]
        for group, metrics in self._groups().items():
            sections.append((group, scrolled(self._table(metrics))))
        if gone := self._absent():
            items = "".join(f"<li><b>{text(metric)}</b>: {text(why)}</li>" for metric, why in gone)
            sections.append(("What could not be measured", f"<ul>{items}</ul>"))
        sections.append(("How it was measured", self._protocols()))
        rows = [
            (str(k), v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in self.settings.items()
        ]
        sections.append(("Settings", scrolled(table(("", ""), rows, numbers_from=9))))
        subtitle = join(*(f"{k}: {self.settings[k]}" for k in ("model", "memory") if self.settings.get(k)))
        return page(self.title, subtitle, sections)

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row a metric for a terminal: its name, each condition's value, the difference and its p-value.

        What all names begin with, the benchmark's, is left out; of many conditions only the values are shown.
        """
        show = value_with_error if len(self.conditions) < 3 else lambda result: number(result.value)
        rows = []
        metrics = self._metrics()
        several = len({metric.partition(".")[0] for metric in metrics}) > 1
        for metric in metrics:
            cells = [metric if several else metric.partition(".")[2]]
            for name in self.conditions:
                result = self._result(name, metric)
                cells.append("absent" if not isinstance(result, Measurement) else show(result))
                if name in self._with_difference:
                    p = self._compared.get((name, metric))
                    cells.append("" if p is None else f"{number(p.difference, sign=True)} (p {p.p_value:.2g})")
            rows.append(tuple(cells))
        return rows

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of :meth:`rows`."""
        shown = [c for name in self.conditions for c in (name, "difference")[: 1 + (name in self._with_difference)]]
        return ("metric", *shown)

    @property
    def _others(self) -> list[str]:
        return [name for name in self.conditions if name != self.reference]

    @property
    def _with_difference(self) -> list[str]:
        return self._others if len(self._others) == 1 else []

    def _metrics(self) -> list[str]:
        return list(dict.fromkeys(r.metric for found in self.conditions.values() for r in found))

    def _groups(self) -> dict[str, list[str]]:
        """Metrics by the part of their name before the last dot, in order; those absent everywhere are left out."""
        groups: dict[str, list[str]] = {}
        for metric in self._metrics():
            if any(isinstance(self._result(name, metric), Measurement) for name in self.conditions):
                groups.setdefault(metric.rpartition(".")[0].replace(".", ", ").replace("_", " "), []).append(metric)
        return groups

    @cached_property
    def _compared(self) -> dict[tuple[str, str], Paired]:
        return {(name, p.metric): p for name, found in self.paired.items() for p in found}

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Result]:
        return {(name, r.metric): r for name, found in self.conditions.items() for r in found}

    def _result(self, condition: str, metric: str) -> Result | None:
        return self._by_name.get((condition, metric))

    def _lead(self) -> str:
        others = "”, “".join(self._others)
        against = (
            f" Differences are of “{others}” against “{self.reference}”, paired by record: 95 % bootstrap "
            "interval, permutation test, Cohen's d of the differences. Green and red say that a difference is in the "
            f"wanted or unwanted direction and its p-value below {SIGNIFICANT}; nothing is corrected for the number of "
            "tests."
        )
        return (
            "Values are means over records with their standard error and 95 % bootstrap interval; n is the number of "
            "records." + (against if others else "")
        )

    def _table(self, metrics: Sequence[str]) -> str:
        several = len(self.conditions) > 1
        columns = ["", "condition", "value", "95 % interval", "", "n"]
        columns += ["difference", "its interval", "p", "d"] if several else []
        rows = []
        for metric in metrics:
            for i, name in enumerate(self.conditions):
                result = self._result(name, metric)
                label = self._label(metric) if i == 0 else ""
                if not isinstance(result, Measurement):
                    rows.append((label, text(name), "absent", *[""] * (len(columns) - 3)))
                    continue
                row = [label, text(name), text(value_with_error(result)), _interval(result), bar(result), str(result.n)]
                row += _difference(self._compared.get((name, metric)), result) if several else []
                rows.append(tuple(row))
        return table(columns, rows, numbers_from=2, raw=True)

    def _label(self, metric: str) -> str:
        """Last part of a metric's name, with its unit."""
        units = {r.unit for name in self.conditions if isinstance(r := self._result(name, metric), Measurement)}
        return ", ".join([metric.rpartition(".")[2].replace("_", " "), *sorted(units - {"share"})])

    def _absent(self) -> list[tuple[str, str]]:
        found = []
        for metric in self._metrics():
            reasons = {r.reason for n in self.conditions if isinstance(r := self._result(n, metric), Absent)}
            found += [(metric, reason) for reason in sorted(reasons)]
        return found

    def _protocols(self) -> str:
        by_protocol: dict[str, list[str]] = {}
        notes: dict[str, None] = {}
        for found in self.conditions.values():
            for r in found:
                if isinstance(r, Measurement):
                    key = f"{r.protocol}; seed {r.seed}"
                    if r.metric not in by_protocol.setdefault(key, []):
                        by_protocol[key].append(r.metric)
                    if r.note:
                        notes[f"{r.metric}: {r.note}"] = None
        items = [f"<li>{text(how)}<small>{text(', '.join(of))}</small></li>" for how, of in by_protocol.items()]
        items += [f"<li>{text(note)}</li>" for note in notes]
        return f"<ul>{''.join(items)}</ul>"


def number(value: float, *, sign: bool = False) -> str:
    """Return a number with three digits that matter.

    Example:
        >>> number(0.12345), number(-1234.5), number(0.0)
        ('0.123', '-1234', '0')
    """
    shown = f"{value:+.3g}" if sign else f"{value:.3g}"
    return f"{value:{'+' if sign else ''}.0f}" if abs(value) >= 1000 else shown


def value_with_error(result: Measurement) -> str:
    """Return a value with its standard error, where it has one."""
    has = result.standard_error == result.standard_error
    return number(result.value) + (f" ± {result.standard_error:.2g}" if has else "")


def bar(result: Measurement) -> str:
    """Return a share and its interval as a bar from 0 to 1; nothing for other units."""
    if result.unit != "share" or not 0 <= result.value <= 1:
        return ""
    low, high = (result.value if x != x else min(max(x, 0.0), 1.0) for x in (result.low, result.high))
    return (
        f'<span class="bar"><i style="left:{low:.1%};width:{max(high - low, 0.0):.1%}"></i>'
        f'<b style="left:{result.value:.1%}"></b></span>'
    )


def _interval(result: Measurement) -> str:
    return "" if result.low != result.low else f"[{number(result.low)}, {number(result.high)}]"


def _difference(p: Paired | None, result: Measurement) -> list[str]:
    if p is None:
        return ["", "", "", ""]
    good = {"higher": p.difference > 0, "lower": p.difference < 0}.get(result.better)
    kind = "" if p.p_value >= SIGNIFICANT or good is None else "better" if good else "worse"
    interval = "" if p.low != p.low else f"[{number(p.low, sign=True)}, {number(p.high, sign=True)}]"
    return [
        f'<span class="{escape(kind)}">{number(p.difference, sign=True)}</span>', interval, f"{p.p_value:.2g}",
        "" if abs(p.effect_size) == float("inf") or p.effect_size != p.effect_size else f"{p.effect_size:+.2f}",
    ]  # fmt: skip

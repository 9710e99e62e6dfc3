"""Pictures: files beside each other, and data that say what the trace says."""

import csv

import numpy as np
import pytest
from PIL import Image

import timerome as tr
from tests.tiny import planted, tiny_facts
from timerome.tracing.plots.drawing import two_digits


def rows_of(path):
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trace():
    return tr.CausalTracer(planted(), tr.TraceConfig(corruption="subject", draws=2)).trace(tiny_facts(4))


@pytest.mark.parametrize("kind", ["map", "steps", "facts"])
def test_pictures_have_ink_and_their_data_beside_them(trace, kind, tmp_path):
    path = trace.plot(tmp_path / "trace.png", kind=kind)
    grey = np.asarray(Image.open(path).convert("L"))
    assert grey.min() < 50 and grey.max() == 255 and (grey < 128).mean() > 0.005  # readable without colour
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace.csv", "trace.png"] and rows_of(path)


def test_effect_by_step_is_that_of_the_best_layer(trace, tmp_path):
    rows = rows_of(trace.plot(tmp_path / "t.png", kind="steps"))
    best = trace.best()
    (row,) = [r for r in rows if (r["series"], r["step"], r["role"]) == (str(best.site), str(best.step), best.role)]
    interval = trace.interval(best)
    assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx(list(interval[:3]))
    assert {r["series"] for r in rows if r["role"] == best.role} >= {"random site"}


def test_small_maps_hold_every_fact_and_cell(trace, tmp_path):
    rows = rows_of(trace.plot(tmp_path / "t.png", kind="facts"))
    assert len(rows) == trace.tie.size
    for row in rows:
        n = trace.sites.index(tr.Site(int(row["layer"]), row["module"]))
        value = trace.tie[trace.facts.index(row["fact"]), n, trace.steps.index(int(row["step"])),
                          trace.roles.index(row["role"])]  # fmt: skip
        assert (float(row["tie"]) == pytest.approx(value)) if row["tie"] else np.isnan(value)


def test_an_unknown_kind_is_refused(trace, tmp_path):
    with pytest.raises(ValueError, match="kind"):
        trace.plot(tmp_path / "t.png", kind="pie")


def test_what_rounds_to_nothing_has_no_sign():
    assert [two_digits(x) for x in (-0.004, 0.0, -0.006, 1.005e3)] == ["0.00", "0.00", "-0.01", "1005.00"]

"""Pictures: files beside each other, and data that say what the trace says."""

import csv

import numpy as np
import pytest
from PIL import Image

import timerome as tr
from tests.tiny import planted, tiny_facts, tiny_llada
from timerome.diffusion import SamplerConfig
from timerome.facts import FactError
from timerome.tracing.plots.drawing import two_digits


def rows_of(path):
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trace():
    return tr.CausalTracer(planted(), corruption="subject", draws=2).trace(tiny_facts(4))


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


def test_a_film_shows_three_runs_to_their_end(tmp_path):
    """In the planted model restoring its site brings the answer back that another subject took away."""
    fact = tiny_facts(1)[0]
    tracer = tr.CausalTracer(planted(), corruption="mask", sampler=SamplerConfig(steps=3))
    path = tracer.film(fact, tr.Coordinate(1, "attn", 0, "object"), tmp_path / "film.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.csv", "film.gif", "film.html"]
    rows = rows_of(path)
    ends = {
        run: [r["token"] for r in rows if r["run"] == run and r["step"] == "3"]
        for run in ("clean", "corrupted", "restored")
    }
    assert ends["clean"] == ends["restored"] == fact.object.split() != ends["corrupted"]
    assert {r["state"] for r in rows if r["step"] == "0"} == {"masked"}
    assert {r["restoring"] for r in rows if r["run"] != "restored"} == {"False"}
    with Image.open(path.with_suffix(".gif")) as film:
        assert film.n_frames == 4
    page = path.read_text()
    assert all(word in page for word in (fact.prompt, fact.object, "attn.1 @ step 0, object", "end of text"))
    assert page.count("<article") == 4 and page.count("<section") == 12 and "http" not in page


def test_a_film_names_what_is_wrong(tmp_path):
    fact = tiny_facts(1)[0]
    tracer = tr.CausalTracer(tiny_llada(), corruption="mask", canvas=2)
    with pytest.raises(FactError, match="canvas"):
        tracer.film(fact, tr.Coordinate(1), tmp_path / "film.html")
    tracer = tr.CausalTracer(tiny_llada(), corruption="mask")
    with pytest.raises(ValueError, match=r"\.html"):
        tracer.film(fact, tr.Coordinate(1), tmp_path / "film.gif")
    with pytest.raises(ValueError, match="takes 3 steps"):
        tracer.film(fact, tr.Coordinate(1, step=3), tmp_path / "film.html")
    with pytest.raises(ValueError, match="1 draws"):
        tracer.film(fact, tr.Coordinate(1), tmp_path / "film.html", draw=1)
    assert not list(tmp_path.iterdir())


def test_what_rounds_to_nothing_has_no_sign():
    assert [two_digits(x) for x in (-0.004, 0.0, -0.006, 1.005e3)] == ["0.00", "0.00", "-0.01", "1005.00"]

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import timerome as tr
from tests.tiny import planted, tiny_facts, tiny_llada
from timerome.tracing import TraceError, TraceFileError, TraceResult
from timerome.tracing.verdict import told


def made_up(tie, window="single", roles=("object",), random=0.0, **more):
    """A result with the given effects (F, N, s, R)."""
    tie = np.asarray(tie, dtype=float)
    f, n, s, r = tie.shape
    with_control = np.concatenate([tie, np.full((f, 1, s, r), random)], axis=1)
    fields = {
        "facts": tuple(f"fact-{i}" for i in range(f)),
        "groups": tuple("ab"[i % 2] for i in range(f)),
        "sites": tuple(tr.Site(i) for i in range(n)),
        "steps": tuple(range(s)),
        "roles": roles,
        "measured": {
            "log_prob": {
                "tie": with_control[:, None],
                "ie": with_control[:, None] / 2,
                "clean": np.zeros((f, s)),
                "corrupted": np.full((f, s), -2.0),
            }
        },
        "recalled": np.ones(f, dtype=bool),
        "permuted": np.full((f, 2), np.nan),
        "settings": {"window": window, "corruption": "noise"},
    }
    return TraceResult(**{**fields, **more})


@pytest.fixture(scope="module")
def trace():
    return tr.CausalTracer(planted(), tr.TraceConfig(corruption="mask", draws=1)).trace(tiny_facts(4))


# Coordinates ---------------------------------------------------------------------------------------------------------


def test_best_is_the_largest_mean_and_ties_go_to_the_lower_layer():
    tie = np.zeros((3, 4, 2, 1))
    tie[:, 3, 1], tie[:, 2, 1] = 0.8, 0.8 + 1e-9
    assert made_up(tie).best() == tr.Coordinate(2, "block", 1, "object")


def test_best_leaves_out_what_few_facts_define():
    tie = np.zeros((4, 1, 2, 1))
    tie[:, 0, 0], tie[:, 0, 1] = 0.5, np.nan
    tie[0, 0, 1] = 0.9
    assert made_up(tie).best().step == 0
    tie[:2, 0, 1] = 0.9
    assert made_up(tie).best().step == 1


def test_policies():
    tie = np.zeros((4, 3, 2, 1))
    tie[[0, 2], 1, 0] = 1.0
    tie[[1, 3], 2, 1] = 0.9
    result = made_up(tie)
    assert result.best("per_fact")["fact-3"] == tr.Coordinate(2, "block", 1, "object")
    assert result.best("per_group") == {"a": tr.Coordinate(1), "b": tr.Coordinate(2, step=1)}
    assert result.best("multi", top=2) == [tr.Coordinate(1), tr.Coordinate(2, step=1)]
    assert len(result.best("multi", top=9)) == 3
    with pytest.raises(ValueError, match="policy"):
        result.best("best")
    with pytest.raises(ValueError, match="effect"):
        result.best(effect="te")
    with pytest.raises(TraceError, match="not traced"):
        result.at(tr.Coordinate(7))


def test_best_static_ignores_the_step():
    tie = np.zeros((2, 2, 2, 1))
    tie[:, 0, 0] = 1.0  # mean 0.5
    tie[:, 1] = 0.6
    assert made_up(tie).best().layer == 0 and made_up(tie).best_static() == (tr.Site(1), "object")


def test_rivals_are_those_that_the_facts_do_not_tell_apart():
    tie = np.random.default_rng(0).normal(0.0, 0.05, (12, 3, 2, 1))
    tie[:, 0, 0] += 0.9
    tie[:, 1, 1] += 0.9
    result = made_up(tie)
    assert {result.best(), *result.rivals()} == {tr.Coordinate(0), tr.Coordinate(1, step=1)}
    assert result.summary()["indistinguishable"] == 1
    assert "not told apart from 1 other" in result.summary()["verdict"]


def test_the_best_coordinates_are_where_a_memory_edits(trace):
    """One for all, one a fact, one a group, or several: each is an ``at=``."""
    backbone, method = planted(), tr.Ridge(targets="null")
    facts = [fact for fact in tiny_facts(4) if fact.id in trace.facts]
    for policy in ("global", "per_fact", "per_group", "multi"):
        best = trace.best(policy)
        for edit in tr.EditMemory(backbone).forget(facts, answer=None, method=method, at=best):
            wanted = best.get(edit.fact.id, best.get(None)) if isinstance(best, dict) else best
            assert [p.coordinate for p in edit.change.parts] == (wanted if isinstance(wanted, list) else [wanted])


# Verdicts ------------------------------------------------------------------------------------------------------------


def test_a_step_that_adds_nothing_is_said_to_add_nothing():
    noise = np.random.default_rng(0).normal(0.7, 0.2, (40, 6, 4, 1))
    result = made_up(noise)
    assert result.temporal_gain().contains_zero
    assert "the step adds nothing" in result.summary()["verdict"]


def test_a_step_that_adds_something_is_said_to():
    tie = np.random.default_rng(0).normal(0.1, 0.05, (20, 4, 4, 1))
    tie[:, 2, 1] += 0.8
    verdict = made_up(tie).summary()["verdict"]
    assert "the step adds +0.6" in verdict and "above a random site" in verdict


def test_restoring_longer_is_no_gain_of_the_step():
    """In window `from` step 0 restores at every step: it beats the mean over steps, but no memory that is always on."""
    tie = np.random.default_rng(0).normal(0.0, 0.02, (20, 3, 3, 1)) + np.array([0.9, 0.5, 0.1])[None, None, :, None]
    result = made_up(tie, window="from")
    assert result.temporal_gain().low > 0 and result.temporal_gain("every_step").contains_zero
    assert "but the step adds nothing over the best site restored at every step" in result.summary()["verdict"]
    with pytest.raises(TraceError, match="window 'from'"):
        made_up(tie).temporal_gain("every_step")


def test_a_site_like_any_other_is_not_called_better():
    tie = np.random.default_rng(0).normal(0.3, 0.2, (20, 1, 1, 1))
    assert "not shown to do more than a random site" in made_up(tie, random=0.3).summary()["verdict"]


def test_one_fact_gives_no_interval():
    summary = made_up(np.ones((1, 2, 2, 1))).summary()
    assert "one fact" in summary["verdict"] and summary["best_effect"] == [1.0, None, None]
    json.dumps(summary, allow_nan=False)


def test_the_summary_has_everything_a_claim_is_judged_by():
    """Interval, both controls, correction for all cells, both gains of the step, stability under halving."""
    tie = np.random.default_rng(0).normal(0.0, 0.05, (12, 3, 2, 1))
    tie[:, 1, 0] += 0.9
    result = made_up(tie, window="from", permuted=np.repeat([[0.9, 0.3]], 12, axis=0))
    summary = result.summary()
    assert summary["best"] == {"layer": 1, "module": "block", "step": 0, "role": "object"}
    for name, interval in {
        "best_effect": result.interval(result.best()),
        "temporal_gain": result.temporal_gain(),
        "temporal_gain_over_every_step": result.temporal_gain("every_step"),
    }.items():
        assert summary[name] == pytest.approx(list(interval[:3])), name
    assert summary["best_minus_permuted_steps"] == pytest.approx([0.6] * 3)
    assert summary["random_site"] == [0.0, 0.0, 0.0] and summary["best_minus_random_site"][1] > 0.8
    assert summary["p_corrected"] == float(result.p_values().min()) and summary["coordinates"] == 6
    assert summary["above_random_site"] == 1 and not summary["flat"]
    assert summary["split_half"] == result.stability()._asdict() and summary["split_half"]["same_cell"] == 1.0
    json.dumps(summary, allow_nan=False)


def test_the_summary_is_told_in_rounded_numbers_and_names():
    result = made_up(np.full((3, 2, 2, 1), 0.12345678), window="from", not_traceable={"moon": "no subject"})
    said = dict(told(result.summary()))
    assert said["best"] == "block.0 @ step 0, object" and said["best static"] == "block.0, object"
    assert said["best effect"] == "0.12 [0.12, 0.12]" and said["not traceable"] == "moon: no subject"
    assert said["p corrected"] == f"{result.summary()['p_corrected']:.2g}" and said["permuted steps"] == "– [–, –]"
    assert said["flat"] == "yes" and "verdict" not in said and "split half" not in said  # four facts make halves


def test_table_is_sorted_and_has_the_control(trace):
    rows = trace.table(5)
    assert len(rows) == 5 and [r["tie"] for r in rows] == sorted((r["tie"] for r in rows), reverse=True)
    assert rows[0]["random_site_tie"] is not None and rows[0]["facts"] == 4
    json.dumps(trace.table(1000), allow_nan=False)


# Files ---------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(trace, tmp_path):
    again = TraceResult.load(trace.save(tmp_path / "new folder" / "trace.safetensors"))
    for name in TraceResult.__dataclass_fields__:
        one, other = getattr(trace, name), getattr(again, name)
        if name in ("recalled", "permuted"):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        elif name == "measured":
            assert {score: sorted(found) for score, found in one.items()} == {s: sorted(f) for s, f in other.items()}
            for score, found in one.items():
                for what, array in found.items():
                    np.testing.assert_array_equal(array, other[score][what])
        else:
            assert one == other, name
    assert again.best() == trace.best() and again.fingerprint == planted().fingerprint()
    assert isinstance(again.sites[0], tr.Site)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["trace.safetensors"]


def test_a_trace_without_facts_is_saved_too(tmp_path):
    empty = tr.CausalTracer(tiny_llada(), tr.TraceConfig(noise_scale=0.0)).trace(tiny_facts(2))
    again = TraceResult.load(empty.save(tmp_path / "t.safetensors"))
    assert again.not_traceable == empty.not_traceable and again.tie.shape == empty.tie.shape


def test_a_failed_save_leaves_the_old_file(trace, tmp_path, monkeypatch):
    path = trace.save(tmp_path / "t.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr("timerome.tracing.files.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        trace.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(trace, tmp_path, keep):
    path = trace.save(tmp_path / "t.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TraceFileError, match="cut short"):
        TraceResult.load(path)


def test_foreign_files_are_named(tmp_path):
    (tmp_path / "text").write_text("not a trace at all, but long enough to look like a header")
    with pytest.raises(TraceFileError, match="no complete trace file"):
        TraceResult.load(tmp_path / "text")
    save_file({"x": np.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(TraceFileError, match="not of a trace"):
        TraceResult.load(tmp_path / "weights.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "newer.safetensors", metadata={"timerome_trace": '{"format": 99}'})
    with pytest.raises(TraceFileError, match="format 99"):
        TraceResult.load(tmp_path / "newer.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "partial.safetensors", metadata={"timerome_trace": '{"format": 2}'})
    with pytest.raises(TraceFileError, match="no complete"):
        TraceResult.load(tmp_path / "partial.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        TraceResult.load(tmp_path / "missing")


# Plots ---------------------------------------------------------------------------------------------------------------


def test_plot_writes_a_picture_and_its_data(trace, tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_backend(), plt.get_fignums()
    path = trace.plot(tmp_path / "plots" / "trace.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(trace.sites) * len(trace.steps) * len(trace.roles)
    best = trace.best()
    (row,) = [
        r for r in rows if (r["layer"], r["module"], r["step"], r["role"])
        == (str(best.layer), best.module, str(best.step), best.role)
    ]  # fmt: skip
    assert float(row["tie"]) == pytest.approx(trace.at(best).mean())
    assert sorted(p.name for p in path.parent.iterdir()) == ["trace.csv", "trace.png"]
    assert (plt.get_backend(), plt.get_fignums()) == before


def test_plot_of_some_sites_and_of_nothing(tmp_path):
    sites = [tr.Site(2, "attn"), tr.Site(0)]
    result = tr.CausalTracer(planted(), tr.TraceConfig(sites=sites, corruption="mask")).trace(tiny_facts(2))
    assert result.plot(tmp_path / "some.png").exists()
    with pytest.raises(TraceError, match="could be traced"):
        tr.CausalTracer(tiny_llada(), tr.TraceConfig(noise_scale=0.0)).trace(tiny_facts(2)).plot(tmp_path / "none.png")

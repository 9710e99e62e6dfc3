"""The demo, end to end on the bundled testbed with quick settings."""

import json

import pytest

import timerome as tr
from tests.demo_run import quick_demo
from timerome import demo
from timerome.cli import main
from timerome.demo.run import limited
from timerome.splits import demo_split

CONTRACT = [
    "forget.delta_logprob_nats", "forget.worst_delta_nats", "retain.delta_logprob_nats", "retain.worst_delta_nats",
    "paraphrase.delta_logprob_nats", "generation.forget_rougeL", "generation.retain_rougeL",
    "generation.forget_distinct2", "generation.forget_repetition", "coordinate", "alpha", "ridge", "sparsity", "rank",
    "seconds.build", "seconds.per_fact", "memory_bytes", "backward_passes", "weights_unchanged",
]  # fmt: skip


def value_at(results, path):
    for key in path.split("."):
        results = results[key]
    return results


@pytest.mark.parametrize("path", CONTRACT)
def test_every_name_of_the_contract_has_a_value_for_each_memory(path):
    _, results = quick_demo()
    for block in (results, results["null"], results["paper_mode"]):
        assert value_at(block, path) is not None


def test_what_is_reported_is_what_was_done():
    _, results = quick_demo()
    assert results["generation"]["retain_unchanged"] is not None
    assert (results["method"], results["null"]["method"], results["paper_mode"]["method"]) == ("placed", *["keyed"] * 2)
    assert results["paper_mode"]["gate"] == "none" != results["gate"]
    assert results["paper_mode"]["coordinate"].startswith(f"block.{results['trace']['best']['layer']} ")
    assert results["seconds"]["trace"] > 0
    assert results["backward_passes"] == 0
    assert results["weights_unchanged"] is True
    # Paper mode changes every held-out fact, so there the worst one and the mean differ.
    forget, retain = results["paper_mode"]["forget"], results["paper_mode"]["retain"]
    assert forget["worst_delta_nats"] > forget["delta_logprob_nats"]
    assert retain["worst_delta_nats"] < retain["delta_logprob_nats"]
    assert retain["worst_delta_nats"] == min(retain["sets"][name]["worst_delta_nats"] for name in demo.RETAIN)
    assert results["retain"]["n"] == 8
    assert results["protocol"]["n"]["forget"] == 4


def test_the_site_comparison_has_the_traced_the_static_and_a_random_site():
    _, results = quick_demo()
    sites = results["paper_mode"]["sites"]
    assert [site["name"] for site in sites] == ["traced", "best static", "random"]
    assert sites[2]["site"] not in (sites[0]["site"], sites[1]["site"])
    # The traced row repeats the paper-mode block's own measurement.
    assert sites[0]["forget_delta_logprob_nats"] == results["paper_mode"]["forget"]["delta_logprob_nats"]


def test_the_folder_holds_everything_and_nothing_half_written():
    out, results = quick_demo()
    assert {path.name for path in out.iterdir()} == {
        "results.json", "report.html", "texts.jsonl", "tie_heatmap.png", "tie_heatmap.csv", "trace.safetensors",
        "edit.safetensors",
    }  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == results
    rows = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert {row["set"] for row in rows} == set(demo.SETS)
    assert all(row["before"] is not None and row["shipped"] is not None for row in rows)


def test_the_edit_file_is_the_shipped_memory():
    out, results = quick_demo()
    backbone = tr.load("testbed")
    memory = tr.EditMemory.load(out / "edit.safetensors", backbone)
    assert {fact.new_object for fact in memory.facts} == {tr.REFUSAL} == {results["answer"]}
    assert memory.nbytes == results["memory_bytes"]


def test_the_held_out_sets_share_nothing_with_what_built_the_memory():
    split = limited(demo_split(), demo.DEMO)
    seen = {fact.prompt for facts in (split.protect, split.retain, split.forget) for fact in facts}
    for name in (*demo.RETAIN, "held_out_unknown"):
        assert not seen & {fact.prompt for fact in getattr(split, name)}
    assert len(split.forget) == 40
    assert len(split.held_out_relations) == demo.DEMO.relations


def test_an_interrupt_leaves_no_results(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("timerome.demo.run.results_of", interrupt)
    out = tmp_path / "out"
    assert main(["demo", "--quick", "--facts", "1", "--out", str(out), "--json", str(tmp_path / "r.json")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "timerome demo: interrupted."
    assert not list(out.glob("*.json")) + list(out.glob("*.html")) + list(tmp_path.glob("*.json"))


def test_zero_facts_are_refused(tmp_path, capsys):
    assert main(["demo", "--facts", "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "timerome demo: run_demo: expected facts of at least 1, got 0.\n"

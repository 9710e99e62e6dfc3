"""``timerome eval --benchmark`` and ``timerome audit`` from the command line, on the bundled testbed."""

import json

import pytest

import timerome as tr
from tests.evaluation.scripted import write
from tests.evaluation.tiny_data import BENCHMARKS, SPLITS, write_data
from timerome.cli import main
from timerome.splits import bundled_facts

SHORT = ["--canvas", "4", "--steps", "2", "--quiet"]
FILES = {"results.json", "results.csv", "report.html", "answers"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a file of every benchmark, facts of the testbed, and an edit of them."""
    folder = tmp_path_factory.mktemp("commands")
    facts = bundled_facts("relations")[:2]
    facts.to_jsonl(folder / "facts.jsonl")
    memory = tr.EditMemory(tr.load("testbed"))
    memory.forget(facts)
    memory.save(folder / "edit.safetensors")
    for name in BENCHMARKS:
        write_data(name, folder)
    return folder


def command(work, name, out):
    split = ["--split", SPLITS[name]] if name in SPLITS else []
    return ["eval", "--benchmark", name, "--data", work / name, "--edits", work / "edit.safetensors", "--out", out,
            "--limit", 1, "--samples", 1, "--generation", 4, *split, *SHORT]  # fmt: skip


def run(arguments, path):
    assert main([*map(str, arguments), "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_from_its_files_to_its_report_and_again(name, work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    found = run(command(work, name, out), tmp_path / "a.json")
    assert set(found["conditions"]) == {"no edit", "edited"}
    assert all(r["metric"].startswith(name) for r in found["conditions"]["edited"])
    assert found["paired"]["edited"]
    assert {p.name for p in out.iterdir()} == FILES
    assert json.loads((out / "results.json").read_text()) == found
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    before = {name: (out / name).read_bytes() for name in FILES - {"answers"}}
    monkeypatch.setattr("timerome.evaluation.respondent.generate", None)  # every answer is kept
    monkeypatch.setattr("timerome.evaluation.respondent.token_scores", None)
    monkeypatch.setattr("timerome.evaluation.respondent.log_likelihood", None)
    assert run(command(work, name, out), tmp_path / "b.json") == found
    assert {name: (out / name).read_bytes() for name in FILES - {"answers"}} == before


def test_a_malformed_file_is_one_line_that_names_file_record_and_field(work, tmp_path, capsys):
    rows = json.loads((work / "zsre" / "zsre.json").read_text())
    del rows[2]["rephrase"]
    data = write(tmp_path / "zsre.json", rows)
    assert main(["eval", "--benchmark", "zsre", "--data", str(data), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("zsre.json, record 2, field 'rephrase': expected a non-empty text, got nothing (there is no "
                         "such field).")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_an_interrupted_benchmark_keeps_its_answers_and_goes_on(work, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    whole, part = tmp_path / "whole", tmp_path / "part"
    run(command(work, "zsre", whole), tmp_path / "a.json")
    with monkeypatch.context() as patch:
        patch.setattr("timerome.evaluation.respondent.generate", interrupt)
        assert main([*map(str, command(work, "zsre", part))]) == 130
    assert capsys.readouterr().err == "timerome eval: interrupted.\n"
    assert [p.name for p in part.iterdir()] == ["answers"]
    run(command(work, "zsre", part), tmp_path / "b.json")
    for name in FILES - {"answers"}:
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_an_audit_and_again(work, tmp_path, monkeypatch):
    def audit(path):
        options = ["--edits", work / "edit.safetensors", "--out", tmp_path / "out", *SHORT]
        return run(["audit", "--facts", work / "facts.jsonl", *options], path)

    found = audit(tmp_path / "a.json")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    assert {p["metric"] for p in found["paired"]["edited"]} >= {"audit.plain", "audit.worst", "audit.prefix"}
    assert all(r.get("better", "lower") == "lower" for r in found["conditions"]["edited"])
    monkeypatch.setattr(tr.Backbone, "logits", None)
    assert audit(tmp_path / "b.json") == found

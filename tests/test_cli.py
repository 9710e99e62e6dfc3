"""The command line, end to end: what it writes, and one line for whatever is wrong."""

import json
import re

import pytest
import torch

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome import cli
from timerome.cli import main
from timerome.memory.files import read_manifest
from timerome.splits import bundled_facts

FAST = ["--samples", "2", "--canvas", "8", "--steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with facts of the testbed in JSONL files, and an edit of some of them made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    relations = bundled_facts("relations")
    relations[:2].to_jsonl(folder / "facts.jsonl")
    relations[10:14].to_jsonl(folder / "negatives.jsonl")
    command = ["edit", "--facts", str(folder / "facts.jsonl"), "--negatives", str(folder / "negatives.jsonl")]
    command += ["--replace", "the Moon", "--canvases", "[12]", "--out", str(folder / "edit.safetensors"), "--quiet"]
    assert main([*command, "--json", str(folder / "edit.json")]) == 0
    return folder


def run(*arguments, json_path=None):
    """Run a command that must succeed; return what it wrote as JSON."""
    extra = [] if json_path is None else ["--json", str(json_path)]
    assert main([str(a) for a in arguments] + extra) == 0
    return None if json_path is None else json.loads(json_path.read_text())


def fails(capsys, *arguments, code=2):
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("timerome")
    return lines[0]


# What works ----------------------------------------------------------------------------------------------------------


def test_info(tmp_path, capsys):
    found = run("info", json_path=tmp_path / "info.json")
    assert found["compiled"] or found["compiled_why_not"]
    assert found["versions"]["torch"] == torch.__version__
    assert "transformers" in found["versions"]
    assert "timerome" in capsys.readouterr().out


def test_edit_writes_a_memory_and_says_what_it_is(work):
    found = json.loads((work / "edit.json").read_text())
    assert found["n"] == 2
    assert found["settings"]["estimator"] == "lens"  # facts with a new answer are replaced unless told otherwise
    assert found["settings"]["coordinate"]["layer"] == 5
    assert found["file_bytes"] == (work / "edit.safetensors").stat().st_size
    memory = tr.EditMemory.load(work / "edit.safetensors", tr.load("testbed"))
    assert {fact.new_object for fact in memory.facts} == {"the Moon"}
    assert memory.book is not None


def test_edit_takes_its_options(work, tmp_path):
    out = tmp_path / "paper.safetensors"
    options = "--alpha 0.5 --ridge 0.1 --sparsity 0.5 --rank 3 --layer 2 --estimator null --beta 0.25".split()
    found = run("edit", "--facts", work / "facts.jsonl", "--protect", work / "negatives.jsonl", "--out", out, *options,
                "--quiet", json_path=tmp_path / "edit.json")  # fmt: skip
    settings = found["settings"]
    assert [settings[k] for k in ("alpha", "ridge", "sparsity", "rank", "beta")] == [0.5, 0.1, 0.5, 3, 0.25]
    assert (settings["coordinate"]["layer"], settings["estimator"], settings["shared"]) == (2, "null", True)
    memory = tr.EditMemory.load(out)
    assert memory.book is None
    assert memory.protect is not None


def test_eval_measures_a_model(work, tmp_path, capsys):
    found = run("eval", "--facts", work / "facts.jsonl", *FAST, json_path=tmp_path / "eval.json")
    assert list(found) == ["before"]
    assert found["before"]["n"] == 2
    assert len(found["before"]["scores"]) == 2
    assert found["before"]["protocol"]["samples"] == 2
    assert "log-probability" in capsys.readouterr().out


def test_eval_measures_an_edit_with_and_without(work, tmp_path):
    found = run("eval", "--facts", work / "facts.jsonl", "--memory", work / "edit.safetensors", *FAST,
                json_path=tmp_path / "eval.json")  # fmt: skip
    deltas = found["comparison"]["deltas"]
    assert set(deltas) == {fact["fact_id"] for fact in found["before"]["scores"]}
    assert found["comparison"]["delta_logprob_nats"]["mean"] == pytest.approx(sum(deltas.values()) / 2)
    assert found["after"]["edited_rows"] > 0
    assert found["comparison"]["delta_logprob_nats"]["mean"] < 0


def test_eval_of_paraphrases_and_bundled_sets(tmp_path):
    found = run("eval", "--facts", "tofu:forget01", "--limit", "2", "--wording", "paraphrase", "--no-decode", *FAST,
                json_path=tmp_path / "eval.json")  # fmt: skip
    assert found["before"]["scores"][0]["prompt"] == bundled_facts("forget01")[0].paraphrases[0]
    assert found["before"]["scores"][0]["text"] is None


def test_generate_with_and_without_a_memory(work, tmp_path):
    prompt = bundled_facts("relations")[0].prompt
    how = ["--prompt", prompt, "--canvas", 12, "--steps", 4, "--quiet"]
    found = run("generate", *how, json_path=tmp_path / "plain.json")
    with_memory = run("generate", *how, "--memory", work / "edit.safetensors", json_path=tmp_path / "edited.json")
    assert with_memory["before"] == found["text"]
    config = tr.SamplerConfig(steps=4)
    assert found["text"] == tr.generate(tr.load("testbed"), [prompt], canvas=12, config=config)[0]
    assert "Moon" in with_memory["after"]


def test_trace_then_edit_at_what_it_found(work, tmp_path, capsys):
    out = tmp_path / "trace"
    how = ["--steps", "2", "--draws", "3", "--prune", "0.05", "--modules", "[block]", "--roles", "[object]", "--quiet"]
    found = run("trace", "--facts", work / "facts.jsonl", "--out", out, *how, json_path=tmp_path / "trace.json")
    pictures = {"tie_heatmap.png", "tie_steps.png", "tie_facts.png"}
    assert {path.name for path in out.iterdir()} >= {"trace.safetensors", "checkpoint.jsonl", *pictures}
    assert found["best"]["module"] == "block" and found["settings"]["prune"] == 0.05
    # For people: places by name, the verdict whole, and no more digits than they mean.
    said = capsys.readouterr().out
    assert str(tr.Coordinate(**found["best"])) in said and found["verdict"] in said
    assert not re.search(r"\d\.\d{4}|[{}]", said)
    # The same again goes on from the checkpoint, to the same result.
    again = run("trace", "--facts", work / "facts.jsonl", "--out", out, *how, json_path=tmp_path / "again.json")
    assert again == found
    edit = run("edit", "--facts", work / "facts.jsonl", "--trace", out / "trace.safetensors", "--estimator", "null",
               "--out", tmp_path / "e.safetensors", "--quiet", json_path=tmp_path / "edit.json")  # fmt: skip
    assert edit["settings"]["coordinate"] == found["best"]


def test_inspect_needs_no_model(work, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_load", None)
    found = run("inspect", work / "edit.safetensors", json_path=tmp_path / "inspect.json")
    assert len(found["edits"]) == 2
    assert found["settings"][0]["estimator"] == "lens"


def test_inspect_a_model(tmp_path, capsys):
    found = run("inspect", "testbed", json_path=tmp_path / "inspect.json")
    assert found["passed"] and len(found["checks"]) == 8
    assert found["recognised"]["architecture"] == "testbed"
    assert found["supported"]["padded batches"] == "yes"
    assert "in + attention + MLP = out" in capsys.readouterr().out
    assert "expected an architecture among" in fails(capsys, "inspect", "testbed", "--architecture", "none")


def test_tune_lists_its_trials_and_what_it_chose(work, tmp_path):
    options = ["--retain", work / "negatives.jsonl", "--alpha", "[0.25,1]", "--layer", "3", "--samples", "1", "--quiet"]
    found = run("tune", "--facts", work / "facts.jsonl", *options, json_path=tmp_path / "tune.json")
    assert [trial["alpha"] for trial in found["trials"]] == [0.25, 1.0]
    assert found["best"] in [{"alpha": 0.25}, {"alpha": 1.0}]


def test_revise_and_diff(work, tmp_path):
    bundled_facts("relations")[20:21].to_jsonl(tmp_path / "more.jsonl")
    file, out, ledger = work / "edit.safetensors", tmp_path / "out.safetensors", tmp_path / "ledger.jsonl"
    first, second = bundled_facts("relations")[:2].ids
    options = ["--forget", tmp_path / "more.jsonl", "--undo", f"[{first}]", "--out", out, "--ledger", ledger, "--quiet"]
    found = run("revise", "--memory", file, *options, json_path=tmp_path / "revise.json")
    new = bundled_facts("relations")[20].id
    assert (found["edits"], found["added"], found["removed"]) == ([second, new], [new], [first])
    assert run("diff", file, out, json_path=tmp_path / "diff.json")["added"] == [new]
    assert [json.loads(line)["operation"] for line in ledger.read_text().splitlines()] == ["removed", "added"]
    assert [one["id"] for one in read_manifest(out)["spared"]] == [first]
    run("revise", "--memory", out, "--undo", f"[{second}]", "--spare", "false", json_path=tmp_path / "again.json")
    assert [one["id"] for one in read_manifest(out)["spared"]] == [first]
    assert read_manifest(out)["retired"] == [first, second]


def test_audit_with_a_memory(work, tmp_path):
    options = ["--memory", work / "edit.safetensors", "--out", tmp_path / "audit", *FAST[2:]]
    found = run("audit", "--facts", work / "facts.jsonl", *options, json_path=tmp_path / "audit.json")
    assert set(found["conditions"]) == {"no edit", "edited"}
    assert (tmp_path / "audit" / "report.html").exists()


def test_a_benchmark_from_its_files_to_its_report(work, tmp_path):
    (tmp_path / "tofu").mkdir()
    fact = bundled_facts("relations")[0]
    records = [{"question": fact.prompt, "answer": fact.object, "perturbed_answer": ["Paris"]}]
    (tmp_path / "tofu" / "forget01.json").write_text(json.dumps(records))
    options = ["--data", tmp_path / "tofu", "--out", tmp_path / "out", "--memory", work / "edit.safetensors", *FAST]
    found = run("eval", "--benchmark", "tofu", *options, json_path=tmp_path / "eval.json")
    by_name = {r["metric"]: r for r in found["conditions"]["edited"]}
    assert by_name["tofu.forget.probability"]["n"] == 1
    assert "absent" in by_name["tofu.model_utility"]  # there are no retain records
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "results.csv", "report.html", "answers"}


def test_dashes_and_underscores_are_one(capsys):
    first, second = (fails(capsys, "edit", "--facts", "none.jsonl", "--out", "e.safetensors", option, "2")
                     for option in ("--gate-layer", "--gate_layer"))  # fmt: skip
    assert first == second == "timerome edit: FactSet.from_jsonl: there is no file none.jsonl."


def test_threads_are_set_and_the_model_says_nothing_on_stderr(capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run("generate", "--prompt", "x", "--canvas", "2", "--steps", "1", "--threads", "1", "--quiet")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert capsys.readouterr().err == ""


def test_help_lists_every_command_and_ends_well(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert main([name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


# What does not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "invalid choice: 'fly'"),
        ([], "command"),
        (["generate"], "prompt"),
        (["info", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["edit", "--facts", "f", "--out", "o", "--alpha", "strong"], "alpha"),
        (["eval", "--facts", "f", "--estimator", "guess"], "estimator"),
        (["eval"], "either --facts FILE or --benchmark NAME"),
        (["eval", "--benchmark", "tofu"], "needs --data"),
        (["eval", "--benchmark", "tofu", "--data", "none"], "none"),
        (["eval", "--facts", "none.jsonl"], "there is no file none.jsonl"),
        (["eval", "--facts", "tofu:forget99"], "expected one of forget01"),
        (["eval", "--facts", "tofu:forget01", "--model", "no-such-model"], "'no-such-model'"),
        (["eval", "--facts", "tofu:forget01", "--model", "./none"], "'./none'"),
        (["eval", "--facts", "tofu:forget01", "--memory", "none.safetensors"], "there is no file none.safetensors"),
        (["eval", "--facts", "tofu:forget01", "--samples", "0"], "samples >= 1, got 0"),
        (["edit", "--facts", "tofu:forget01", "--out", "edit.bin"], ".safetensors, got edit.bin"),
        (["edit", "--facts", "tofu:forget01", "--out", "o.safetensors", "--layer", "99"], "got layer 99"),
        (["edit", "--facts", "tofu:forget01", "--out", "o.safetensors", "--ridge", "0"], "ridge > 0, got 0"),
        (["edit", "--facts", "tofu:forget01", "--out", "o.safetensors", "--trace", "t"], "there is no file t"),
        (["generate", "--prompt", "x " * 300], "context of 256"),
        (["generate", "--prompt", ""], "at least one token"),
        (["generate", "--prompt", "x", "--canvas", "0"], "got 0"),
        (["generate", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["trace", "--facts", "tofu:forget01", "--out", "t", "--draws", "0"], "draws >= 1, got 0"),
        (["inspect", "none.safetensors"], "there is no file none.safetensors"),
        (["info", "--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *arguments, *(["--quiet"] if arguments and arguments[0] in cli.COMMANDS else []))
    assert not list(tmp_path.iterdir())


FACT = {"id": "a", "prompt": "The capital city of Kenya is", "subject": "Kenya", "object": "Nairobi"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([json.dumps(FACT), "{broken"], "line 2"),
        ([json.dumps(FACT | {"subject": "Peru"})], "'Peru' is not in the prompt"),
        ([json.dumps(FACT | {"object": ""})], "'object'"),
        ([json.dumps({"id": "a"})], "missing"),
        ([json.dumps(FACT), json.dumps(FACT)], "distinct"),
        ([], "holds no fact"),
    ],
)
def test_bad_facts(lines, said, tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines))
    assert said in fails(capsys, "eval", "--facts", path)


def test_a_memory_of_another_model(work, tmp_path, capsys):
    other = tiny_llada()
    memory = tr.EditMemory.build(other, tiny_facts(1), coordinate=tr.Coordinate(1), bank=tr.BankConfig((None,)))
    memory.save(tmp_path / "other.safetensors")
    said = fails(capsys, "eval", "--facts", work / "facts.jsonl", "--memory", tmp_path / "other.safetensors")
    assert other.fingerprint() in said
    assert tr.load("testbed").fingerprint() in said


def test_a_memory_cut_short(work, tmp_path, capsys):
    whole = (work / "edit.safetensors").read_bytes()
    for length in (len(whole) // 2, 4, 0):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        for command in (["eval", "--facts", work / "facts.jsonl", "--memory"], ["inspect"]):
            assert "damaged" in fails(capsys, *command, tmp_path / "cut.safetensors")


def test_debug_shows_where_it_happened(capsys):
    assert main(["eval", "--facts", "none.jsonl", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "timerome eval: FactSet.from_jsonl: there is no file none.jsonl."


# Interrupts ----------------------------------------------------------------------------------------------------------


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["timerome.memory.making.read_facts", "timerome.memory.files.save_file"])
def test_an_interrupted_edit_leaves_no_file(where, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(where, interrupt)
    said = fails(capsys, "edit", "--facts", work / "facts.jsonl", "--out", tmp_path / "e.safetensors",
                 "--json", tmp_path / "e.json", "--quiet", code=130)  # fmt: skip
    assert said == "timerome edit: interrupted."
    assert not list(tmp_path.iterdir())


def test_an_interrupted_trace_leaves_its_checkpoint_alone(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timerome.tracing.runs.FactRuns.corrupted", interrupt)
    said = fails(capsys, "trace", "--facts", work / "facts.jsonl", "--out", tmp_path, "--quiet", code=130)
    assert said == "timerome trace: interrupted."
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.jsonl"]


def test_an_interrupt_while_the_result_is_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    path = tmp_path / "info.json"
    path.write_text("old")

    monkeypatch.setattr("os.replace", interrupt)
    assert fails(capsys, "info", "--json", path, code=130) == "timerome info: interrupted."
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["info.json"]

"""The command line, end to end: what it writes, and one line for whatever is wrong."""

import io
import json
import re
import sys
from importlib import import_module

import pytest
import torch

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome import cli
from timerome.cli import main

FAST = ["--samples", "2", "--canvas", "8", "--steps", "2", "--quiet"]
RELATIONS = tr.datasets.bundled("relations")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with facts of the testbed in JSONL files, and an edit of some of them made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    tr.FactSet([RELATIONS[0].with_new_object("the Moon"), RELATIONS[1]]).to_jsonl(folder / "facts.jsonl")
    RELATIONS[10:14].to_jsonl(folder / "others.jsonl")
    command = ["edit", "--facts", folder / "facts.jsonl", "--out", folder / "edit.safetensors", "--quiet"]
    run(*command, json_path=folder / "edit.json")
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


def test_edit_replaces_and_forgets_and_says_when_each_edit_acts(work):
    found = json.loads((work / "edit.json").read_text())
    assert [(e["operation"], e["old"], e["new"]) for e in found["edits"]] == [
        ("replace", RELATIONS[0].object, "the Moon"), ("forget", RELATIONS[1].object, tr.REFUSAL),
    ]  # fmt: skip
    assert all(e["score"] > e["threshold"] for e in found["edits"])
    assert found["file_bytes"] == (work / "edit.safetensors").stat().st_size
    memory = tr.EditMemory.load(work / "edit.safetensors", tr.load("testbed"))
    assert [fact.new_object for fact in memory.facts] == ["the Moon", tr.REFUSAL]


@pytest.mark.parametrize(
    ("options", "says", "change"),
    [
        (["--answer", "Mars"], ["Mars", "Mars"], "Placed"),
        (["--forget"], [tr.REFUSAL] * 2, "Placed"),
        (["--forget", "--answer", "Mars"], ["Mars", "Mars"], "Placed"),
        (["--forget", "--method", "ridge", "--canvases", "none"], [None, None], "Keyed"),
        (["--answer", "Mars", "--method", "ridge", "--targets", "lens", "--canvases", "none"], ["Mars"] * 2, "Keyed"),
    ],
)
def test_edit_says_what_is_asked_for(options, says, change, work, tmp_path):
    out = tmp_path / "e.safetensors"
    run("edit", "--facts", work / "facts.jsonl", "--out", out, "--quiet", *options)
    memory = tr.EditMemory.load(out)
    assert [edit.says for edit in memory.edits] == says
    assert {type(edit.change).__name__ for edit in memory.edits} == {change}
    assert all(edit.gate is not None for edit in memory.edits)


def test_edit_takes_the_methods_options_at_a_place(work, tmp_path):
    out = tmp_path / "paper.safetensors"
    options = "--method ridge --alpha 0.5 --ridge 0.1 --sparsity 0.25 --rank 3 --canvases none --at mlp.2 --beta 0.5"
    protect = ["--protect", work / "others.jsonl"]
    run("edit", "--paper", "--facts", work / "facts.jsonl", "--out", out, *options.split(), *protect, "--quiet")
    edit = tr.EditMemory.load(out).edits[0]
    assert edit.gate is None and edit.change.together
    assert (edit.change.alpha, edit.change.ridge, edit.change.sparsity, edit.change.beta) == (0.5, 0.1, 0.25, 0.5)
    (part,) = edit.change.parts
    assert part.coordinate == tr.Coordinate(2, "mlp") and len(part.keys) <= 3 and part.protect is not None


def test_an_edit_file_is_not_overwritten_unless_asked(work, tmp_path, capsys):
    out = tmp_path / "e.safetensors"
    out.write_bytes(b"mine")
    command = ["edit", "--facts", work / "facts.jsonl", "--out", out, "--quiet"]
    assert "--overwrite" in fails(capsys, *command)
    assert out.read_bytes() == b"mine"
    run(*command, "--overwrite")
    assert len(tr.EditMemory.load(out)) == 2


def test_options_from_a_file_come_after_those_given(work, tmp_path):
    (tmp_path / "c.yaml").write_text(f"facts: {work / 'facts.jsonl'}\nforget: true\nanswer: Mars\nquiet: true\n")
    for more, says in (([], "Mars"), (["--answer", "Venus"], "Venus")):
        run("edit", "--config", tmp_path / "c.yaml", "--out", tmp_path / "e.safetensors", "--overwrite", *more)
        assert {edit.says for edit in tr.EditMemory.load(tmp_path / "e.safetensors")} == {says}


def test_eval_measures_a_model(work, tmp_path, capsys):
    found = run("eval", "--facts", work / "facts.jsonl", *FAST, json_path=tmp_path / "eval.json")
    assert list(found) == ["before"]
    assert found["before"]["n"] == 2
    assert len(found["before"]["scores"]) == 2
    assert found["before"]["protocol"]["samples"] == 2
    assert "log-probability" in capsys.readouterr().out


def test_eval_of_an_edit_says_whether_it_does_what_it_shall(work, tmp_path, capsys):
    facts = tr.FactSet.from_jsonl(work / "facts.jsonl") + tr.FactSet.from_jsonl(work / "others.jsonl")
    facts.to_jsonl(tmp_path / "all.jsonl")
    options = ["--edits", work / "edit.safetensors", *FAST, "--out", tmp_path / "out"]
    found = run("eval", "--facts", tmp_path / "all.jsonl", *options, json_path=tmp_path / "eval.json")
    deltas = found["comparison"]["deltas"]
    assert set(deltas) == {fact["fact_id"] for fact in found["before"]["scores"]}
    assert found["comparison"]["delta_logprob_nats"]["mean"] == pytest.approx(sum(deltas.values()) / 6)
    assert found["comparison"]["edits"] == {"asked": 2, "silent": []}
    assert found["comparison"]["locality"] == 1
    said = capsys.readouterr().out
    assert "edits: 2 of 2 acted" in said and "100.0% of 4 texts unchanged" in said and "the Moon" in said
    assert (tmp_path / "out" / "report.html").exists()
    run("eval", "--facts", work / "others.jsonl", *options[:-2], "--no-decode")
    assert "None of these facts is one that the edits are about" in capsys.readouterr().out


def test_eval_of_paraphrases_and_bundled_sets(tmp_path):
    found = run("eval", "--facts", "tofu:forget01", "--limit", "2", "--wording", "paraphrase", "--no-decode", *FAST,
                json_path=tmp_path / "eval.json")  # fmt: skip
    assert found["before"]["scores"][0]["prompt"] == tr.datasets.bundled("forget01")[0].paraphrases[0]
    assert found["before"]["scores"][0]["text"] is None


def test_generate_answers_every_prompt_and_says_which_edit_acted(work, tmp_path, monkeypatch):
    prompt, other = RELATIONS[0].prompt, "Well, then"
    how = ["--prompt", prompt, "--prompt", other, "--canvas", 12, "--steps", 4, "--quiet"]
    plain = run("generate", *how, json_path=tmp_path / "plain.json")["answers"]
    edited = run("generate", *how, "--edits", work / "edit.safetensors", json_path=tmp_path / "e.json")["answers"]
    config = tr.SamplerConfig(steps=4)
    assert [a["text"] for a in plain] == tr.generate(tr.load("testbed"), [prompt, other], canvas=12, config=config)
    assert [a["before"] for a in edited] == [a["text"] for a in plain]
    assert "Moon" in edited[0]["after"] and edited[1]["after"] == edited[1]["before"]
    assert [a["acted"] for a in edited] == [[RELATIONS[0].id], []]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompt}\n\n{other}\n"))
    assert run("generate", "--prompts", "-", *how[4:], json_path=tmp_path / "stdin.json")["answers"] == plain


def test_explain_says_which_edit_acts(work, tmp_path, capsys):
    options = ["--edits", work / "edit.safetensors", "--prompt", "The capital of Nigeria is"]
    found = run("explain", *options, json_path=tmp_path / "e.json")
    (candidate,) = found["candidates"]
    assert candidate["acts"] and candidate["score"] > candidate["threshold"] and found["edits"] == 2
    assert "Abuja" in capsys.readouterr().out
    run("explain", *options[:2], "--prompt", "Well, then")
    assert "names none of the 2 edits" in capsys.readouterr().out


def test_trace_then_edit_at_what_it_found(work, tmp_path, capsys):
    out = tmp_path / "trace"
    how = ["--steps", "2", "--draws", "3", "--prune", "0.05", "--modules", "block", "--roles", "object", "--quiet"]
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
    for n, at in enumerate((out / "trace.safetensors", tr.Coordinate(**found["best"]))):
        file = tmp_path / f"{n}.safetensors"
        run("edit", "--facts", work / "facts.jsonl", "--paper", "--method", "ridge", "--at", at, "--canvases", "none",
            "--out", file, "--quiet")  # fmt: skip
        assert tr.EditMemory.load(file).edits[0].change.parts[0].coordinate.to_dict() == found["best"]


def test_inspect_an_edit_file_needs_no_model(work, tmp_path, capsys):
    found = run("inspect", work / "edit.safetensors", json_path=tmp_path / "inspect.json")
    assert found["edits"] == json.loads((work / "edit.json").read_text())["edits"]
    assert f"{RELATIONS[0].prompt} Abuja → the Moon" in capsys.readouterr().out


def test_inspect_a_model(tmp_path, capsys):
    found = run("inspect", "testbed", json_path=tmp_path / "inspect.json")
    assert found["passed"] and len(found["checks"]) == 8
    assert found["recognised"]["architecture"] == "testbed"
    assert found["supported"]["padded batches"] == "yes"
    assert "in + attention + MLP = out" in capsys.readouterr().out
    assert "expected an architecture among" in fails(capsys, "inspect", "testbed", "--architecture", "none")


def test_tune_lists_its_trials_and_what_it_chose(work, tmp_path):
    RELATIONS[:1].to_jsonl(tmp_path / "one.jsonl")
    options = ["--retain", work / "others.jsonl", "--alpha", "0.25,1", "--rank", "4", "--samples", "1", "--quiet"]
    found = run("tune", "--facts", tmp_path / "one.jsonl", *options, json_path=tmp_path / "tune.json")
    assert [trial["alpha"] for trial in found["trials"]] == [0.25, 1.0]
    assert found["best"] in [{"alpha": 0.25, "rank": 4}, {"alpha": 1.0, "rank": 4}]


def test_revise_and_diff(work, tmp_path, capsys):
    RELATIONS[20:21].to_jsonl(tmp_path / "more.jsonl")
    file, out, ledger = work / "edit.safetensors", tmp_path / "out.safetensors", tmp_path / "ledger.jsonl"
    first, second, new = RELATIONS[0].id, RELATIONS[1].id, RELATIONS[20].id
    options = ["--forget", tmp_path / "more.jsonl", "--undo", first, "--out", out, "--ledger", ledger, "--quiet"]
    found = run("revise", "--edits", file, *options, json_path=tmp_path / "revise.json")
    assert found["edits"] == [second, new]
    assert ([e["id"] for e in found["added"]], [e["id"] for e in found["removed"]]) == ([new], [first])
    assert f"{RELATIONS[0].prompt} Abuja → the Moon" in capsys.readouterr().out
    assert [e["id"] for e in run("diff", file, out, json_path=tmp_path / "diff.json")["added"]] == [new]
    assert [json.loads(line)["operation"] for line in ledger.read_text().splitlines()] == ["removed", "added"]
    before = out.read_bytes()
    assert "no edit 'nope'" in fails(capsys, "revise", "--edits", out, "--undo", second, "nope", "--quiet")
    assert out.read_bytes() == before
    # What was superseded comes back, ids may be parted by commas, and no model is needed.
    run("revise", "--edits", out, "--undo", f"{second},{new}", "--model", "none", "--quiet")
    assert len(tr.EditMemory.load(out)) == 0 and tr.EditMemory.load(out).state.gone == (first, second, new)
    run("revise", "--edits", out, "--merge", file, "--quiet")
    assert len(tr.EditMemory.load(out)) == 2


def test_revise_replaces_and_teaches(work, tmp_path):
    unknown = tr.Fact(id="new", prompt="The capital city of Zubrowka is", subject="Zubrowka", object="Lutz")
    tr.FactSet([unknown]).to_jsonl(tmp_path / "new.jsonl")
    out = tmp_path / "out.safetensors"
    options = ["--replace", work / "others.jsonl", "--answer", "Mars", "--teach", tmp_path / "new.jsonl"]
    run("revise", "--edits", work / "edit.safetensors", *options, "--out", out, "--quiet")
    memory = tr.EditMemory.load(out)
    assert [edit.says for edit in memory.edits[2:]] == ["Mars"] * 4 + ["Lutz"]
    assert memory.edits[-1].operation == "teach"


def test_audit_with_edits(work, tmp_path):
    options = ["--edits", work / "edit.safetensors", "--out", tmp_path / "audit", *FAST[2:]]
    found = run("audit", "--facts", work / "facts.jsonl", *options, json_path=tmp_path / "audit.json")
    assert set(found["conditions"]) == {"no edit", "edited"}
    assert (tmp_path / "audit" / "report.html").exists()


def test_dashes_and_underscores_are_one(capsys):
    first, second = (fails(capsys, "edit", "--facts", "none.jsonl", "--out", "e.safetensors", option, "2")
                     for option in ("--mask-token-id", "--mask_token_id"))  # fmt: skip
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
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert main([name, "--help"]) == 0
        said = capsys.readouterr()
        assert "--json" in said.out and not said.err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name):
    from timerome.cli._parser import Parser, add_options

    parser = Parser(name)
    add_options(parser, import_module(f"timerome.cli.{name}").run)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_defaults_are_those_of_the_library():
    from timerome.cli._parser import arguments
    from timerome.cli.edit import run as edit

    given = {"facts": "relations", "out": "e", "method": "ridge", "rank": 3}
    assert arguments(edit, given)["making"].method == tr.Ridge(rank=3)


def test_text_of_others_is_shown_not_sent(tmp_path, capsys):
    fact = RELATIONS[0].with_new_object("Mars\x1b[2J\u202egnp")
    tr.FactSet([fact]).to_jsonl(tmp_path / "f.jsonl")
    out = tmp_path / "e.safetensors"
    run("edit", "--facts", tmp_path / "f.jsonl", "--out", out, "--quiet")
    run("inspect", out)
    run("generate", "--prompt", "\x9b31m [bold] \u2066", "--canvas", "2", "--edits", out, "--quiet")
    fails(capsys, "edit", "--facts", "\x1b[2J", "--out", out)
    fails(capsys, "explain\x1b")
    said = "".join(capsys.readouterr())
    assert not re.search("[\x1b\x9b\u202a-\u202e\u2066-\u2069]", said)


# What does not -------------------------------------------------------------------------------------------------------


EDIT = ["edit", "--facts", "tofu:forget01", "--out", "o.safetensors"]
EVAL = ["eval", "--facts", "tofu:forget01"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "there is no command fly; there are demo, trace"),
        (["--json", "x"], "there is no command --json"),
        (["generate"], "give --prompt TEXT"),
        (["edit", "--facts", "f"], "required: --out. See `timerome edit --help`"),
        (["info", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["info", "--threads", "many"], "--threads: expected a whole number, got 'many'"),
        (["info", "--config", "none.yaml"], "--config: there is no file none.yaml"),
        ([*EDIT, "--alpha", "strong"], "--alpha: expected a number, got 'strong'"),
        ([*EDIT, "--rank", "3"], "--rank: only with --method ridge"),
        ([*EDIT, "--method", "ridge", "--margin", "3"], "--margin: only with --method place"),
        ([*EDIT, "--at", "3"], "--at goes with --method ridge"),
        ([*EDIT, "--at", "there", "--method", "ridge"], "expected a place"),
        ([*EDIT, "--paper", "--threshold", "-3"], "no threshold"),
        ([*EDIT, "--negatives", "f"], "unrecognized arguments: --negatives f"),
        ([*EDIT, "--answer", "a", "--answer", "b"], "--answer is given twice"),
        ([*EVAL, "--estimator", "guess"], "--estimator: expected one of elbo_sum"),
        (["eval"], "either --facts FILE or --benchmark NAME"),
        (["eval", "--benchmark", "tofu"], "needs --data"),
        (["eval", "--benchmark", "tofu", "--data", "none"], "none"),
        (["eval", "--benchmark", "tofu", "--data", "none", "--no-decode"], "--no-decode: only with --facts"),
        ([*EVAL, "--retain-rows", "1,2", "--data", "d"], "--retain-rows, --data: only with --benchmark"),
        ([*EVAL, "--retain-rows", "1"], "expected 2"),
        (["eval", "--facts", "none.jsonl"], "there is no file none.jsonl"),
        (["eval", "--facts", "tofu:forget99"], "expected one of forget01"),
        ([*EVAL, "--model", "no-such-model"], "'no-such-model'"),
        ([*EVAL, "--model", "./none"], "'./none'"),
        ([*EVAL, "--edits", "none.safetensors", "--model", "no/model"], "there is no file none.safetensors"),
        ([*EVAL, "--samples", "0"], "samples >= 1, got 0"),
        (["edit", "--facts", "tofu:forget01", "--out", "edit.bin"], ".safetensors, got edit.bin"),
        ([*EDIT, "--forget", "--method", "ridge", "--at", "99"], "99"),
        ([*EDIT, "--method", "ridge", "--ridge", "0", "--model", "no/model"], "ridge > 0, got 0"),
        ([*EDIT, "--paper", "--at", "t.safetensors"], "there is no file t.safetensors"),
        (["revise", "--edits", "none.safetensors", "--undo", "a"], "there is no file none.safetensors"),
        (["generate", "--prompt", "x " * 300], "context of 256"),
        (["generate", "--prompt", ""], "at least one token"),
        (["generate", "--prompt", "x", "--canvas", "0"], "got 0"),
        (["generate", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["generate", "--prompt", "x", "--device", "cuda:99"], "there is no cuda:99"),
        (["generate", "--prompt", "x", "--dtype", "int99"], "expected a dtype"),
        (["trace", "--facts", "tofu:forget01", "--out", "t", "--draws", "0"], "draws >= 1, got 0"),
        (["trace", "--facts", "tofu:forget01", "--out", "t", "--modules", "block,head"], "--modules: expected one of"),
        (["inspect", "none.safetensors"], "there is no file none.safetensors"),
        (["diff", "none.safetensors"], "required: second"),
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
        ([json.dumps(FACT | {"subject": "Peru"})], "got 'Peru'"),
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
    memory = tr.EditMemory.build(other, tiny_facts(1))
    memory.save(tmp_path / "other.safetensors")
    said = fails(capsys, "eval", "--facts", work / "facts.jsonl", "--edits", tmp_path / "other.safetensors")
    assert other.fingerprint() in said
    assert tr.load("testbed").fingerprint() in said


def test_a_memory_cut_short(work, tmp_path, capsys):
    whole = (work / "edit.safetensors").read_bytes()
    for length in (len(whole) // 2, 4, 0):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        for command in (["eval", "--facts", work / "facts.jsonl", "--edits"], ["inspect"]):
            assert "damaged" in fails(capsys, *command, tmp_path / "cut.safetensors")


def test_debug_shows_where_it_happened(capsys):
    assert main(["eval", "--facts", "none.jsonl", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "timerome eval: FactSet.from_jsonl: there is no file none.jsonl."


# Interrupts ----------------------------------------------------------------------------------------------------------


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["timerome.memory.memory.questions", "safetensors.torch.save_file"])
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

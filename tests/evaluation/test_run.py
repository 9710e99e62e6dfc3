"""A benchmark from its files to its report: resumable, cached, complete, self-contained; bad files are refused."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import timerome as tr
from tests.evaluation.scripted import write
from tests.evaluation.tiny_data import BENCHMARKS, edit, settings, write_data
from tests.tiny import planted, tiny_llada
from timerome.evaluation import Absent, Measurement, respondent
from timerome.evaluation.run import run_benchmark
from timerome.evaluation.suites import tofu
from timerome.evaluation.suites.asking import changed
from timerome.facts import FactError
from timerome.progress import Progress

FILES = ("results.json", "results.csv", "report.html")
each = pytest.mark.parametrize("benchmark", BENCHMARKS)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Every benchmark, run once without interruption: its data, its results and its report."""
    folder, model = tmp_path_factory.mktemp("run"), planted()
    memory, found = edit(model), {}
    for name in BENCHMARKS:
        data, out = write_data(name, folder / "data"), folder / "out" / name
        found[name] = data, out, run_benchmark(name, data, model, out=out, memory=memory, settings=settings(name))
    return found


# The report -----------------------------------------------------------------------------------------------------------


@each
def test_every_number_says_what_it_takes_to_believe_it(done, benchmark):
    report = done[benchmark][2]
    assert list(report.conditions) == ["no edit", "edited"]
    before, after = ([r.metric for r in found] for found in report.conditions.values())
    assert before == after  # the same metrics in the same order, absent ones included
    measured = [r for found in report.conditions.values() for r in found if isinstance(r, Measurement)]
    assert len(measured) >= 14
    for r in measured:
        assert r.protocol and r.unit and r.n >= 1 and isinstance(r.seed, int)
        assert r.n == 1 or (r.standard_error == r.standard_error and r.low <= r.high)
    for r in (r for found in report.conditions.values() for r in found if isinstance(r, Absent)):
        assert len(r.reason) > 10


@each
def test_json_and_csv_hold_the_same_numbers(done, benchmark):
    _, out, report = done[benchmark]
    values = json.loads((out / "results.json").read_text())
    assert values == json.loads(json.dumps(report.to_dict()))
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    flat = [(name, r) for name, found in values["conditions"].items() for r in found]
    assert len(rows) == len(flat)
    for row, (name, r) in zip(rows, flat, strict=True):
        assert (row["condition"], row["metric"], row["absent"]) == (name, r["metric"], r.get("absent", ""))
        # What is absent has no number in any form: an empty cell, neither 0 nor None nor NaN.
        assert row["value"] == ("" if "absent" in r else str(r["value"]))
    assert "NaN" not in (out / "results.json").read_text()
    assert not {"nan", "None"} & {cell for row in rows for cell in row.values()}


class Page(HTMLParser):
    """What a page refers to, its text, and whether its tags close."""

    def __init__(self, html):
        super().__init__()
        self.refers, self.words, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.refers += [(tag, k, v) for k, v in attrs if k in ("src", "href", "srcset", "data")]
        self.refers += [(tag, "tag", "")] * (tag in ("script", "link", "iframe", "object", "img"))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@each
def test_the_page_stands_alone_and_names_every_metric_and_every_reason(done, benchmark):
    _, out, report = done[benchmark]
    html = (out / "report.html").read_text()
    page = Page(html)
    assert not page.open and not page.refers
    assert not re.search(r"https?:|@import|url\(", html)
    shown = " ".join(page.words)
    for result in report.conditions["edited"]:
        if isinstance(result, Absent):
            assert result.metric in shown and result.reason in shown
        else:
            assert result.metric.rpartition(".")[2].replace("_", " ") in shown
            assert result.protocol in shown
    assert "paired by record" in shown and "bootstrap" in shown


@each
def test_settings_are_all_that_results_depend_on_and_no_path(done, benchmark):
    data, out, report = done[benchmark]
    assert report.settings["model"] == "planted"
    assert len(report.settings["memory_sha256"]) == len(report.settings["records_sha256"]) == 64
    assert str(data.parent) not in (out / "results.json").read_text()


@each
def test_every_comparison_that_can_be_paired_is(done, benchmark):
    report = done[benchmark][2]
    compared = {p.metric: p for p in report.paired["edited"]}
    for before, after in zip(*report.conditions.values(), strict=True):
        both = isinstance(before, Measurement) and isinstance(after, Measurement)
        assert (before.metric in compared) == both
        if both:
            p = compared[before.metric]
            assert p.difference == pytest.approx(after.value - before.value)
            assert 0 < p.p_value <= 1 and p.n == before.n
            assert p.n == 1 or p.low <= p.difference + 1e-9 and p.difference - 1e-9 <= p.high
    whole = {"tofu": "tofu.model_utility", "counterfact": "counterfact.S", "rwku": "rwku.mia.AUC.LOSS"}
    assert benchmark not in whole or whole[benchmark] in compared


# Killed and resumed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("benchmark", "at"), [*((name, 0.6) for name in BENCHMARKS), ("zsre", 0.0), ("counterfact", 0.95)]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_report(done, benchmark, at, tmp_path, monkeypatch):
    data, whole, _ = done[benchmark]
    model, forwards, true = planted(), [], tr.Backbone.logits
    memory = edit(model)
    total = len([line for file in (whole / "answers").iterdir() for line in file.read_text().splitlines()])
    batches = []
    keep = respondent.Respondent._keep

    def dies(self, key, answers):
        if len(batches) == int(at * total):
            raise KeyboardInterrupt
        batches.append(key)
        keep(self, key, answers)

    def counted(self, *args, **more):
        forwards.append(1)
        return true(self, *args, **more)

    def again():
        return run_benchmark(benchmark, data, model, out=tmp_path, memory=memory, settings=settings(benchmark))

    with monkeypatch.context() as patch:
        patch.setattr(respondent.Respondent, "_keep", dies)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert not any((tmp_path / name).exists() for name in FILES)  # no half a report
    again()
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    monkeypatch.setattr(tr.Backbone, "logits", counted)
    again()
    assert not forwards  # every answer was kept, decoded texts too
    assert model.state_digest() == planted().state_digest()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.evaluation.tiny_data import edit, settings
from tests.tiny import planted, tiny_llada
from timerome.evaluation.answers import AnswerFile
from timerome.evaluation.run import run_benchmark

add, made = AnswerFile.add, []
def killed(self, key, answers):
    add(self, key, answers)
    made.append(key)
    if len(made) == 5:
        with self.path.open("a") as file:
            file.write('{"key": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
AnswerFile.add = killed
model = planted()
run_benchmark("zsre", sys.argv[1], model, out=sys.argv[2], memory=edit(model), settings=settings("zsre"))
"""


def test_a_process_that_was_killed_leaves_what_the_next_one_goes_on_from(done, tmp_path):
    data, whole, _ = done["zsre"]
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(data), str(tmp_path)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    assert [p.name for p in tmp_path.iterdir()] == ["answers"]
    for _ in range(2):  # the line that was cut short is gone, so that a further run can read the file too
        model = planted()
        run_benchmark("zsre", data, model, out=tmp_path, memory=edit(model), settings=settings("zsre"))
        for name in FILES:
            assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


# Batches, progress ----------------------------------------------------------------------------------------------------


def test_questions_are_asked_in_batches(done, tmp_path, monkeypatch):
    rows = []
    true = tr.Backbone.logits

    def watched(self, ids, *args, **more):
        rows.append(len(ids))
        return true(self, ids, *args, **more)

    monkeypatch.setattr(tr.Backbone, "logits", watched)
    run_benchmark("zsre", done["zsre"][0], planted(), out=tmp_path, settings=settings("zsre"))
    assert max(rows) >= 4 * 3  # four records of three tokens, each in a state of its own, in one forward


def test_progress_tells_the_time_left(done, tmp_path, monkeypatch):
    monkeypatch.setattr(respondent, "BATCH", 2)
    stream = io.StringIO()
    progress = Progress(stream=stream, interval=0.0)
    run_benchmark("zsre", done["zsre"][0], planted(), out=tmp_path, settings=settings("zsre"), progress=progress)
    lines = stream.getvalue().splitlines()
    assert any(re.fullmatch(r"no edit: efficacy: 2/4, about \d+ s left", line) for line in lines)
    assert any(re.match(r"no edit: exact efficacy: 4/4 in", line) for line in lines)


# Settings -------------------------------------------------------------------------------------------------------------


def by_name(report, condition="no edit"):
    return {r.metric: r for r in report.conditions[condition]}


def test_only_what_the_memory_edits_or_only_so_many(done, tmp_path):
    data, model = done["zsre"][0], planted()
    memory = edit(model)
    edited = run_benchmark(
        "zsre", data, model, out=tmp_path, memory=memory, settings=settings("zsre", only_edited=True)
    )
    assert set(by_name(edited)["zsre.efficacy"].per_record) == {"zsre-0000", "zsre-0001"}
    few = run_benchmark("zsre", data, model, out=tmp_path, settings=settings("zsre", limit=2))
    assert set(by_name(few)["zsre.efficacy"].per_record) == {"zsre-0000", "zsre-0002"}
    with pytest.raises(ValueError, match="only_edited needs a memory"):
        run_benchmark("zsre", data, model, out=tmp_path, settings=settings("zsre", only_edited=True))
    other = write(tmp_path / "other.json", [{**json.loads((data / "zsre.json").read_text())[0], "src": "who?"}])
    with pytest.raises(ValueError, match="none of the records' prompts"):
        run_benchmark("zsre", other, model, out=tmp_path, memory=memory, settings=settings("zsre", only_edited=True))


def test_tofu_with_both_protocols_a_reference_and_held_out_rows(done, tmp_path):
    data, model = done["tofu"][0], planted()
    how = {"estimator": "elbo_sum", "samples": 2}
    records = tofu.read_tofu(data)["forget"]
    ratios = tofu.truth_ratios(model, records, protocol=changed(tofu.TOFU, **how))
    tofu.write_reference(tmp_path / "reference.json", ratios)
    chosen = settings("tofu", protocol="both", reference=tmp_path / "reference.json", retain_rows=(1, 2))
    found = by_name(run_benchmark("tofu", data, model, out=tmp_path / "out", settings=chosen))
    assert found["tofu.forget_quality"].value == 0.0  # log10 of p = 1: the reference is this model
    assert set(found["tofu.retain.probability"].per_record) == {"tofu-retain-0001"}
    assert found["mdu.forget.probability"].seed == 42 and "recon_mean" in found["mdu.forget.probability"].protocol
    with pytest.raises(ValueError, match=r"\(7, 9\) hold no record"):
        run_benchmark("tofu", data, model, out=tmp_path, settings=settings("tofu", retain_rows=(7, 9)))


def test_rwku_by_target_and_as_mdu_asks_it(done, tmp_path):
    data, model = done["rwku"][0], planted()
    plain = by_name(done["rwku"][2])
    mdu = by_name(run_benchmark("rwku", data, model, out=tmp_path, settings=settings("rwku", protocol="mdu")))
    assert plain["rwku.forget.QA"].value == 0.0  # the template ends in a colon, from which no chain begins
    assert mdu["rwku.forget.QA"].value == 1.0
    with pytest.raises(ValueError, match="RWKU has no 'both'"):
        run_benchmark("rwku", data, model, out=tmp_path, settings=settings("rwku", protocol="both"))
    with pytest.raises(ValueError, match="about peru"):
        run_benchmark("rwku", data, model, out=tmp_path, settings=settings("rwku", targets=("peru",)))


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a benchmark among .* got 'mmlu'"):
        run_benchmark("mmlu", tmp_path, planted(), out=tmp_path)


BASELINES = ["random site", "paper mode", "prompt memory", "logit bias", "activation steering"]


def test_baselines_stand_beside_the_edit_and_are_compared_too(done, tmp_path):
    data, model = done["zsre"][0], tiny_llada()
    memory = edit(model)
    plain = run_benchmark("zsre", data, model, out=tmp_path, memory=memory, settings=settings("zsre"))
    how = settings("zsre", baselines=True)
    report = run_benchmark("zsre", data, model, out=tmp_path, memory=memory, settings=how)
    assert list(report.conditions) == ["no edit", "edited", *BASELINES]
    assert list(report.paired) == ["edited", *BASELINES]
    for name in ("no edit", "edited"):  # as without them
        assert report.conditions[name] == plain.conditions[name]
    shown = {name: [r.value for r in found if isinstance(r, Measurement)] for name, found in report.conditions.items()}
    assert len({tuple(values) for values in shown.values()}) >= 4
    assert model.state_digest() == tiny_llada().state_digest()
    assert len(list((tmp_path / "answers").iterdir())) == 7
    for name in BASELINES:
        assert name in (tmp_path / "report.html").read_text()
    assert report.columns() == ("metric", "no edit", "edited", *BASELINES)
    assert all(len(row) == len(report.columns()) for row in report.rows())
    with pytest.raises(ValueError, match="baselines need a memory"):
        run_benchmark("zsre", data, model, out=tmp_path, settings=how)


# Bad files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("benchmark", "file", "field"),
    [("tofu", "forget01_perturbed.json", "answer"), ("rwku", "forget_level2.json", "query"),
     ("counterfact", "counterfact.json", "paraphrase_prompts"), ("zsre", "zsre.json", "loc_ans"),
     ("knowedit", "wiki_recent/recent.json", "target_new")],
)  # fmt: skip
def test_a_malformed_file_is_refused_before_anything_is_asked(benchmark, file, field, tmp_path, monkeypatch):
    data = write_data(benchmark, tmp_path)
    rows = json.loads((data / file).read_text())
    rows[1][field] = 7
    write(data / file, rows)
    monkeypatch.setattr(tr.Backbone, "logits", None)
    with pytest.raises(FactError, match=rf"{Path(file).name}, record 1, field '{field}': expected .*, got 7\."):
        run_benchmark(benchmark, data, planted(), out=tmp_path / "out", settings=settings(benchmark))
    assert not (tmp_path / "out").exists()


@each
def test_a_folder_without_the_files_is_refused(benchmark, tmp_path):
    with pytest.raises(FileNotFoundError):
        run_benchmark(benchmark, tmp_path, planted(), out=tmp_path / "out", settings=settings(benchmark))

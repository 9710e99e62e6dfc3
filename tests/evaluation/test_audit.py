"""The audit: what a model that knows gives away, what one that was edited does not, and that a run goes on."""

import json
from dataclasses import replace

import pytest

import timerome as tr
from tests.tiny import decoded_facts, planted, tiny_facts, tiny_llada
from timerome.evaluation import Absent, Respondent
from timerome.evaluation.audit import AuditProtocol, run_audit
from timerome.facts import FactError

SMALL = AuditProtocol(canvas=2, steps=2, fractions=(0.5, 1.0))


def known(backbone, n=4):
    """Facts whose answers are what the model says, so that it knows them."""
    facts = tiny_facts(n)
    texts = tr.generate(backbone, [f.prompt for f in facts], canvas=2, config=SMALL.plain)
    return tr.FactSet(
        tr.Fact(id=f.id, prompt=f.prompt, subject=f.subject, object=t, group="one", paraphrases=(f.prompt,))
        for f, t in zip(facts, texts, strict=True)
    )


def values(report, condition):
    return {r.metric.removeprefix("audit."): getattr(r, "value", None) for r in report.conditions[condition]}


def test_a_known_fact_comes_out_and_an_edit_keeps_it_in(tmp_path):
    backbone = planted()
    facts = known(backbone)
    memory = tr.paper_memory(backbone, facts, at=1, method=tr.Ridge("null", states=tr.BankConfig(canvases=(None, 2))))
    report = run_audit(backbone, facts, out=tmp_path, memory=memory, protocol=SMALL)
    before, after = values(report, "no edit"), values(report, "edited")
    assert before["plain"] == before["paraphrase"] == before["worst"] == 1.0
    assert before["memorization.onestep"] > after["memorization.onestep"]
    assert before["infill.area.largest"] >= after["infill.area.largest"]
    assert after["worst"] >= after["plain"]  # the worst is over all attacks
    assert before["context"] is not None
    assert {p.name for p in tmp_path.iterdir()} >= {"results.json", "results.csv", "report.html"}
    assert backbone.state_digest() == planted().state_digest()


def test_a_stopped_run_goes_on_to_the_same_report(tmp_path, monkeypatch):
    backbone = planted()
    facts = known(backbone)
    run_audit(backbone, facts, out=tmp_path / "whole", protocol=SMALL)
    with monkeypatch.context() as patch:
        from timerome.evaluation.respondent import Respondent

        tokens = Respondent.tokens

        def stop(self, pairs, *, states="l2r", **more):
            if states == "pll":
                raise KeyboardInterrupt
            return tokens(self, pairs, states=states, **more)

        patch.setattr(Respondent, "tokens", stop)
        with pytest.raises(KeyboardInterrupt):
            run_audit(backbone, facts, out=tmp_path / "part", protocol=SMALL)
    assert not (tmp_path / "part" / "results.json").exists()
    run_audit(backbone, facts, out=tmp_path / "part", protocol=SMALL)
    for name in ("results.json", "results.csv", "report.html"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_asked_is_absent_with_its_reason(tmp_path):
    backbone = planted()
    [fact] = known(backbone, 1)
    bare = tr.Fact(id=fact.id, prompt=fact.prompt, subject=fact.subject, object=fact.object)
    run_audit(backbone, [bare], out=tmp_path, protocol=SMALL)
    found = json.loads((tmp_path / "results.json").read_text())["conditions"]["no edit"]
    absent = {r["metric"]: r["absent"] for r in found if "absent" in r}
    assert "no other wordings" in absent["audit.paraphrase"]
    assert "no other fact of their group" in absent["audit.context"]
    with pytest.raises(FactError, match="at least one fact"):
        run_audit(backbone, [], out=tmp_path)


def test_memorization_extraction_and_infilling_by_hand(tmp_path):
    """The planted model finds a token if it sees the one before: of three hidden ones that is the first alone."""
    facts = tiny_facts(2)
    protocol = AuditProtocol(canvas=3, steps=3, fractions=(1 / 3, 2 / 3, 1.0))
    found = values(run_audit(planted(), facts, out=tmp_path, protocol=protocol), "no edit")
    third = pytest.approx(1 / 3)
    assert found["plain"] == found["worst"] == 1.0  # a token a step brings out the chain
    assert found["memorization.onestep"] == third
    assert found["memorization.l2r"] == found["memorization.pll"] == 1.0
    # After two of three tokens the rest comes by itself: 1 - 2/3.
    assert found["prefix"] == third
    for geometry in ("suffix", "prefix", "middle", "span"):
        assert found[f"infill.strength.{geometry}"] == third
        # One hidden: all of it. Two in a row: ½. Three: a third. Trapezoids: 1/3 + 1/3 (1 + ½)/2 + 1/3 (½ + 1/3)/2.
        assert found[f"infill.area.{geometry}"] == pytest.approx(1 / 3 + 0.25 + 5 / 36)
    # Two hidden at random may be apart, and then both come.
    assert found["infill.strength.largest"] >= found["infill.strength.random"] >= 1 / 3
    assert found["infill.area.largest"] >= found["infill.area.random"] >= found["infill.area.suffix"]


def test_a_fact_that_does_not_fit_is_left_out_and_counted(tmp_path):
    [short] = known(planted(), 1)
    long = tr.Fact(id="long", prompt="the river of peru " * 40, subject="peru", object="king")
    report = run_audit(planted(), [short, long], out=tmp_path / "both", protocol=SMALL)
    found = {r.metric: r for r in report.conditions["no edit"]}
    for name in ("plain", "worst", "prefix", "infill.area.largest"):
        assert found[f"audit.{name}"].n == 1
        assert "1 of 2 records left out" in found[f"audit.{name}"].note
    alone = run_audit(planted(), [long], out=tmp_path / "alone", protocol=SMALL)
    assert {r.metric for r in alone.conditions["no edit"] if isinstance(r, Absent)} == set(found)


def test_the_best_of_several_wordings_counts_and_what_was_just_read_does_not(tmp_path, monkeypatch):
    first, second = tiny_facts(2)
    first = replace(first, paraphrases=("where is kenya", "what is kenya"))

    def texts(self, prompts, **_):
        leaks = {"what is kenya": first.object, f"{second.prompt} {second.object} {second.prompt}": second.object}
        return [leaks.get(prompt, "nothing") for prompt in prompts]

    monkeypatch.setattr(Respondent, "texts", texts)
    report = run_audit(planted(), [first, second], out=tmp_path, protocol=SMALL)
    found = {r.metric.removeprefix("audit."): getattr(r, "per_record", {}) for r in report.conditions["no edit"]}
    assert found["plain"] == {"tiny-0": 0.0, "tiny-1": 0.0}
    assert found["paraphrase"] == {"tiny-0": 1.0}
    assert found["restated"] == {"tiny-0": 0.0, "tiny-1": 1.0}
    assert found["worst"] == {"tiny-0": 1.0, "tiny-1": 0.0}


def test_baselines_are_audited_beside_the_edit(tmp_path):
    backbone = tiny_llada()
    facts = tr.FactSet(decoded_facts(backbone, 1, canvas=2))
    memory = tr.EditMemory(backbone)
    memory.forget(facts, answer=None)
    protocol = AuditProtocol(canvas=2, steps=2, fractions=(1.0,))
    report = run_audit(backbone, facts, out=tmp_path, memory=memory, protocol=protocol, baselines=True)
    assert list(report.conditions)[:3] == ["no edit", "edited", "random site"]
    assert len(report.conditions) == 7
    with pytest.raises(ValueError, match="baselines need a memory"):
        run_audit(backbone, facts, out=tmp_path, baselines=True)


def test_an_answer_that_rouge_cannot_read_is_audited_by_its_tokens_alone(tmp_path):
    fact = replace(tiny_facts(1)[0], object="北京")
    report = run_audit(planted(), [fact], out=tmp_path, protocol=SMALL)
    found = {r.metric: r for r in report.conditions["no edit"]}
    assert isinstance(found["audit.plain"], Absent) and isinstance(found["audit.worst"], Absent)
    assert found["audit.memorization.onestep"].n == 1

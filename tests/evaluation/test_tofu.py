"""TOFU: golden values by hand, the two protocols, and where public code deviates from the definition."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import timerome as tr
from tests.evaluation.scripted import published
from tests.tiny import planted, tiny_llada
from timerome import datasets
from timerome.datasets import Record
from timerome.diffusion import SamplerConfig
from timerome.evaluation import Absent, Measurement, Respondent
from timerome.evaluation.metrics import tofu as metric
from timerome.evaluation.suites import tofu
from timerome.evaluation.suites.tofu import TofuProtocol
from timerome.facts import FactError

FAST = {"samples": 4, "canvas": 3, "sampler": SamplerConfig(steps=3)}
QUICK = TofuProtocol(**FAST)
CHAIN = TofuProtocol(estimator="l2r", **FAST)  # under which the planted model knows its chains


def test_truth_ratio_by_hand():
    # Perturbed answers with probabilities a token 1/2, 1/4, 1/8: geometric mean 1/4. Paraphrase 1/16. R = 4.
    log_r = metric.log_truth_ratio(math.log(16), [math.log(2), math.log(4), math.log(8)])
    assert metric.truth_ratio(log_r) == pytest.approx(4.0)
    assert metric.forget_truth_score(log_r) == pytest.approx(0.25)
    assert metric.truth_score(log_r) == 0.0
    assert metric.truth_score(-log_r) == pytest.approx(0.75)
    assert metric.prob_mean(log_r) == pytest.approx(0.2)  # 1/16 of 1/16 + 1/4


def test_the_arithmetic_mean_of_one_public_helper_is_another_number():
    """A legacy helper averages probabilities, not log-probabilities: (1/2 + 1/4 + 1/8) / 3 in place of 1/4."""
    legacy = (1 / 2 + 1 / 4 + 1 / 8) / 3 / (1 / 16)
    ours = metric.truth_ratio(metric.log_truth_ratio(math.log(16), [math.log(2), math.log(4), math.log(8)]))
    assert legacy == pytest.approx(14 / 3)
    assert ours == pytest.approx(4.0)


def test_mdu_takes_the_first_three_perturbed_answers_and_does_not_fold():
    wrong = [math.log(2), math.log(4), math.log(8), math.log(1024), math.log(1024)]
    assert math.exp(metric.mdu_log_truth_ratio(math.log(16), wrong)) == pytest.approx(4.0)
    assert math.exp(metric.log_truth_ratio(math.log(16), wrong)) != pytest.approx(4.0)


def test_normalised_probability_by_hand_and_far_below_underflow():
    assert metric.normalised_probability(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)
    assert metric.normalised_probability(2000.0, [2000.0 + math.log(3)]) == pytest.approx(0.75)


def test_model_utility_has_nine_terms():
    assert len(metric.UTILITY_TERMS) == len(set(metric.UTILITY_TERMS)) == 9


def test_forget_quality_by_hand():
    # Two samples of three, wholly apart: 2 of the C(6, 3) = 20 orders are as far apart.
    found = metric.forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert found.p_value == pytest.approx(0.1)
    assert found.statistic == 1.0
    assert found.log10_p == pytest.approx(-1.0)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=20), st.lists(st.floats(-3, 3), min_size=3, max_size=20))
def test_forget_quality_is_the_same_for_r_its_inverse_and_its_logarithm(a, b):
    # Rounded, so that exp neither merges nor parts values.
    a, b = np.round(a, 3), np.round(b, 3)
    log = metric.forget_quality(a, b).p_value
    assert metric.forget_quality(np.exp(a), np.exp(b)).p_value == pytest.approx(log)
    assert metric.forget_quality(np.exp(-a), np.exp(-b)).p_value == pytest.approx(log)


@pytest.mark.parametrize("function", [metric.log_truth_ratio, metric.normalised_probability])
def test_no_perturbed_answer_is_refused(function):
    with pytest.raises(ValueError, match="perturbed"):
        function(1.0, [])


# On a model -----------------------------------------------------------------------------------------------------------


def question(id_, prompt, answer, reworded=None, perturbed=()):
    return Record(id_, prompt, "", answer, reworded=reworded, perturbed=perturbed)


def records(n=3, paraphrased=True):
    """Questions the planted model knows: the subject's chain of three words."""
    names = ["kenya", "peru", "nepal", "cuba"][:n]
    return [
        question(
            f"tofu-x-{i}", f"the capital city of {s}", f"{s[:2]}x {s[:2]}y {s[:2]}z",
            f"{s[:2]}x {s[:2]}y {s[:2]}z" if paraphrased else None, ("king river land", "old new north"),
        )
        for i, s in enumerate(names)
    ]  # fmt: skip


def groups():
    return {"forget": records(), "retain": records(4)[3:], "real_authors": records(2, False), "world_facts": records(2)}


def by_name(results):
    return {r.metric: r for r in results}


def test_a_model_that_knows_everything_has_utility_one():
    found = by_name(tofu.measure_tofu(Respondent(planted()), groups(), CHAIN))
    for group in ("forget", "retain"):
        assert found[f"tofu.{group}.rouge_recall"].value == 1.0
        assert found[f"tofu.{group}.probability"].value > 0.99
    assert found["tofu.model_utility"].value > 0.99
    assert found["tofu.forget.log_truth_ratio"].value < -5
    assert found["tofu.forget.probability"].better == "lower"
    for result in found.values():
        assert isinstance(result, Absent) or (result.protocol and result.n)


def test_metrics_are_the_definition_applied_to_likelihoods():
    model = tiny_llada()
    record = records(1)[0]
    result = tofu.truth_ratios(model, [record], protocol=QUICK)
    nll = [
        s.nll for s in Respondent(model).likelihoods(
            [(record.prompt, a) for a in (record.reworded, *record.perturbed)], samples=4
        )
    ]  # fmt: skip
    assert result.per_record[record.id] == pytest.approx(nll[0] - (nll[1] + nll[2]) / 2)
    assert "elbo_sum, K = 4" in result.protocol


def test_truth_ratios_are_deterministic_and_depend_on_the_seed():
    model = tiny_llada()
    again = [tofu.truth_ratios(model, records(), protocol=TofuProtocol(samples=2, seed=s)) for s in (0, 0, 1)]
    assert again[0] == again[1]
    assert again[0].per_record != again[2].per_record


def test_real_authors_use_the_answer_where_forget_uses_the_paraphrase():
    model, record = tiny_llada(), records(1)[0]
    other = question(record.id, record.prompt, "river land", record.reworded, record.perturbed)
    asked = [tofu.truth_ratios(model, [r], protocol=QUICK, group=g).value
             for r in (record, other) for g in ("forget", "world_facts")]  # fmt: skip
    assert asked[0] == asked[2]
    assert asked[1] != asked[3]


def test_mdu_protocol_uses_the_answer_everywhere_and_reports_no_utility():
    mdu = TofuProtocol("mdu", "recon_mean", **FAST)
    found = by_name(tofu.measure_tofu(Respondent(planted()), groups(), mdu))
    assert "mdu.forget.truth_ratio" in found
    assert not any("utility" in name or "quality" in name for name in found)
    assert "recon_mean" in found["mdu.forget.probability"].protocol


def test_a_group_that_is_not_there_is_absent_and_so_is_what_needs_it():
    found = by_name(tofu.measure_tofu(Respondent(planted()), {"forget": records(2)}, QUICK))
    assert isinstance(found["tofu.retain.probability"], Absent)
    assert isinstance(found["tofu.model_utility"], Absent)
    assert "retain.probability" in found["tofu.model_utility"].reason
    assert isinstance(found["tofu.forget_quality"], Absent)
    assert "retain-only" in found["tofu.forget_quality"].reason


def test_records_without_perturbed_answers_are_left_out_and_counted():
    bare = [question("tofu-x-9", "the river of oman is", "omx")]
    found = tofu.truth_ratios(planted(), records(2) + bare, protocol=QUICK)
    assert (found.n, found.note[:8]) == (2, "1 of 3 r")


def test_forget_quality_of_the_same_model_is_one_and_of_a_different_protocol_absent(tmp_path):
    ratios = tofu.truth_ratios(tiny_llada(), records(4), protocol=QUICK)
    tofu.write_reference(tmp_path / "r.json", ratios)
    reference = tofu.read_reference(tmp_path / "r.json")
    assert tofu.forget_quality(ratios, reference).value == 0.0
    other = tofu.truth_ratios(tiny_llada(), records(4), protocol=TofuProtocol(samples=2))
    gone = tofu.forget_quality(other, reference)
    assert isinstance(gone, Absent)
    assert "protocol" in gone.reason
    fewer = tofu.truth_ratios(tiny_llada(), records(2), protocol=QUICK)
    assert "lacks 2" in tofu.forget_quality(ratios, fewer).reason


def test_a_prompt_that_does_not_fit_is_left_out_and_counted():
    long = question("tofu-x-7", "the river " * 80, "omx", "omx", ("king",))
    found = by_name(tofu.measure_tofu(Respondent(planted()), {"forget": [*records(1), long]}, CHAIN))
    assert found["tofu.forget.rouge_recall"].n == found["tofu.forget.log_truth_ratio"].n == 1
    assert "1 of 2" in found["tofu.forget.rouge_recall"].note


def test_membership_and_privleak_by_hand():
    """What the model knows scores above what it was never taught: every member is found, which is PrivLeak -100."""
    never = [question(f"tofu-holdout-{i}", r.prompt, "old river king") for i, r in enumerate(records(3))]
    found = by_name(tofu.measure_tofu(Respondent(planted()), {**groups(), "holdout": never}, CHAIN))
    assert found["tofu.mia.forget.LOSS"].value > found["tofu.mia.holdout.LOSS"].value
    for attack in ("LOSS", "zlib", "min_20", "min_40"):
        assert found[f"tofu.mia.AUC.{attack}"].value == 1.0
        assert found[f"tofu.mia.PrivLeak.{attack}"].value == -100.0
    leak = found["tofu.mia.PrivLeak.LOSS"]
    assert (leak.better, leak.unit) == ("closer to 0", "percent")
    assert "AUC taken as 0.5" in leak.protocol
    same = [question(f"tofu-holdout-{i}", r.prompt, r.object) for i, r in enumerate(records(3))]
    blind = by_name(tofu.measure_tofu(Respondent(planted()), {**groups(), "holdout": same}, CHAIN))
    assert blind["tofu.mia.PrivLeak.LOSS"].value == 0.0


def test_without_a_holdout_set_membership_is_absent():
    found = by_name(tofu.measure_tofu(Respondent(planted()), groups(), CHAIN))
    for name in ("AUC", "PrivLeak"):
        assert "never taught" in found[f"tofu.mia.{name}"].reason


def test_an_answer_that_rouge_cannot_read_has_a_probability_and_no_rouge():
    other = question("tofu-x-8", "the river of oman is", "北京")
    found = by_name(tofu.measure_tofu(Respondent(planted()), {"forget": [*records(1), other]}, CHAIN))
    assert found["tofu.forget.probability"].n == 2
    assert (found["tofu.forget.rouge_recall"].n, found["tofu.forget.rouge_recall"].value) == (1, 1.0)
    alone = by_name(tofu.measure_tofu(Respondent(planted()), {"forget": [other]}, CHAIN))
    assert isinstance(alone["tofu.forget.rouge_f1"], Absent)


# Files ----------------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text(json.dumps(rows))


def test_a_folder_is_read_by_group(tmp_path):
    row = {"question": "q?", "answer": "a"}
    write(tmp_path / "forget05.json", [row])
    write(tmp_path / "real_authors_perturbed.json", [{**row, "perturbed_answer": ["b", "c"]}])
    found = tofu.read_tofu(tmp_path, "forget05")
    assert list(found) == ["forget", "real_authors"]
    write(tmp_path / "holdout05.json", [row])
    assert [r.id for r in tofu.read_tofu(tmp_path, "forget05")["holdout"]] == ["tofu-holdout05-0000"]
    assert found["real_authors"][0].perturbed == ("b", "c")
    with pytest.raises(FileNotFoundError, match="forget10"):
        tofu.read_tofu(tmp_path, "forget10")


def test_published_files_are_read_whole():
    """All rows and all perturbed answers, where TOFU's own evaluation stops at 300 rows and MDU's at three answers."""
    found = tofu.read_tofu(published("tofu"))
    assert {name: len(rows) for name, rows in found.items()} == {
        "forget": 40, "retain": 400, "real_authors": 100, "world_facts": 117,
    }  # fmt: skip
    sizes = {name: {len(r.perturbed) for r in rows} for name, rows in found.items()}
    assert sizes == {"forget": {5}, "retain": {5}, "real_authors": {3}, "world_facts": {3}}
    assert all(r.reworded for name in ("forget", "retain") for r in found[name])
    assert not any(r.perturbed for r in tofu.read_tofu(published("tofu"), "forget10")["forget"])
    assert datasets.bundled_records("forget01") == found["forget"]


def test_a_reference_of_something_else_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")
    with pytest.raises(FactError, match=r"r\.json"):
        tofu.read_reference(path)
    path.write_text(json.dumps(Measurement.over("em", {"a": 1.0}, protocol="x", seed=0).to_dict()))
    with pytest.raises(FactError, match="'metric'"):
        tofu.read_reference(path)


def test_an_edit_shows_in_every_metric_of_its_facts():
    from timerome.evaluation import Condition

    model = planted()
    facts = [tr.Fact(id=r.id, prompt=r.prompt, subject=s, object=r.object)
             for r, s in zip(records(2), ("kenya", "peru"), strict=True)]  # fmt: skip
    memory = tr.paper_memory(model, facts, at=2, method=tr.Ridge("null", states=tr.BankConfig(canvases=(None,))))
    edited = Respondent(model, Condition.of_memory(memory))
    before, after = (by_name(tofu.measure_tofu(r, {"forget": records(2)}, CHAIN)) for r in (Respondent(model), edited))
    assert after["tofu.forget.log_prob"].value < before["tofu.forget.log_prob"].value - 1
    assert after["tofu.forget.truth_score"].value > before["tofu.forget.truth_score"].value

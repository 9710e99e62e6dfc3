"""CounterFact: its metrics by hand, what is absent and why."""

import math
from dataclasses import replace

import pytest

from tests.evaluation.scripted import Scripted, reason, value, write
from timerome.datasets import Record, counterfact_snippets
from timerome.evaluation import Absent
from timerome.evaluation.suites.asking import EditProtocol
from timerome.evaluation.suites.counterfact import Snippets, measure_counterfact

# Metrics by hand ------------------------------------------------------------------------------------------------------

PERU = Record("counterfact-1", "the capital of peru", "peru", "Lima", "New York", ("p1", "p2"), ("n1", "n2"), "P36",
              generation=("g1", "g1", "g2"), neighbour_object="Lima", new_id="Q60")  # fmt: skip
MALI = Record("counterfact-2", "mali speaks", "mali", "Bambara", "Dutch", ("p3",), ("n3",), "P37",
              neighbour_object="French", new_id="Q9")  # fmt: skip
SAID = {
    # Two tokens of mean 0.6 against one of 0.9: per token the new object wins, summed (1.2) it would not.
    ("the capital of peru", "New York"): [-0.2, -1.0], ("the capital of peru", "Lima"): [-0.9],
    ("p1", "New York"): [-0.1, -0.1], ("p1", "Lima"): [-3.0],
    ("p2", "New York"): [-3.0, -3.0], ("p2", "Lima"): [-0.1],
    ("n1", "New York"): [-4.0, -4.0], ("n1", "Lima"): [-0.5],
    ("n2", "New York"): [-0.5, -0.5], ("n2", "Lima"): [-4.0],
    ("mali speaks", "Dutch"): [-1.0], ("mali speaks", "Bambara"): [-1.0],  # a tie
    ("p3", "Dutch"): [-0.5], ("p3", "Bambara"): [-2.0],
    ("n3", "Dutch"): [-2.0], ("n3", "French"): [-0.5],
}  # fmt: skip
TEXTS = {
    ("the capital of peru", 2): "New York.", ("mali speaks", 1): "Bambara",
    ("p1", 2): "new  york", ("p2", 2): "Lima now", ("p3", 1): "Dutch",
    ("n1", 16): "It is Lima", ("n2", 16): "I think New York it is", ("n3", 16): "French",
    ("g1", 16): "peru has New York", ("g2", 16): "nothing",
    ("g1", 100): "a b c d e", ("g2", 100): "the the the the the",
}  # fmt: skip


@pytest.fixture(scope="module")
def sheet():
    base = Scripted(SAID, texts={**TEXTS, ("n1", 16): "It is Cuzco"})
    return measure_counterfact(Scripted(SAID, texts=TEXTS), [PERU, MALI], base=base)


def test_success_rates_by_hand(sheet):
    # ES: per token, strictly: peru yes, mali a tie. PS: (1 + 0) / 2 and 1: by record first, not 2 of 3 prompts.
    # NS: the neighbours' own object against the new one: (1 + 0) / 2 and 1.
    assert [value(sheet, name) for name in ("ES", "PS", "NS")] == [0.5, 0.75, 0.75]
    assert value(sheet, "S") == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.75))
    assert dict(sheet["PS"].per_record) == {"counterfact-1": 0.5, "counterfact-2": 1.0}


def test_magnitudes_by_hand(sheet):
    def gap(a, b):
        return math.exp(-a) - math.exp(-b)

    assert value(sheet, "EM") == pytest.approx((gap(0.6, 0.9) + 0.0) / 2)
    assert value(sheet, "PM") == pytest.approx(((gap(0.1, 3) + gap(3, 0.1)) / 2 + gap(0.5, 2)) / 2)
    assert value(sheet, "NM") == pytest.approx(((gap(0.5, 4) + gap(4, 0.5)) / 2 + gap(0.5, 2)) / 2)


def test_accuracies_want_every_token(sheet):
    # Hits are log-probabilities above ln ½. peru: the second token of the new object is not one.
    assert value(sheet, "ES_accuracy") == 0.0
    assert value(sheet, "PS_accuracy") == pytest.approx((0.5 + 1.0) / 2)
    assert value(sheet, "NS_accuracy") == pytest.approx((0.5 + 1.0) / 2)


def test_exact_decoding_is_of_the_whole_target_on_a_canvas_of_its_length(sheet):
    assert value(sheet, "exact_efficacy") == 0.5
    assert value(sheet, "exact_generalization") == pytest.approx((0.5 + 1.0) / 2)


def test_false_positives_by_neighbourhood_by_hand(sheet):
    assert value(sheet, "false_positives_near") == pytest.approx((0.5 + 0.0) / 2)
    # Far prompts are the neighbours of a record of another relation: n3 for peru, n1 and n2 for mali.
    assert value(sheet, "false_positives_far") == 0.0
    assert value(sheet, "false_positives_generation") == pytest.approx(0.5)
    assert sheet["false_positives_generation"].n == 1
    assert "1 of 2 records left out" in sheet["false_positives_generation"].note
    assert {sheet[f"false_positives_{k}"].better for k in ("near", "far", "generation")} == {"lower"}


def test_far_prompts_are_of_another_relation():
    near = replace(PERU, id="counterfact-9", subject="chile", neighbours=("n9",))
    texts = {("n9", 16): "New York", ("n3", 16): "French"}
    found = measure_counterfact(Scripted(SAID, texts=texts), [PERU, near, MALI])
    assert found["false_positives_far"].per_record["counterfact-1"] == 0.0  # asked n3, not n9, which is nearer
    alone = measure_counterfact(Scripted(SAID, texts=texts), [PERU, near])
    assert "no record of another relation" in reason(alone, "false_positives_far")


def test_base_agreement_by_hand(sheet):
    # peru: n1 changed, n2 and n3 did not. mali: n3 did not, n1 (far) changed, n2 did not.
    assert value(sheet, "base_agreement") == pytest.approx(2 / 3)


def test_fluency_by_hand(sheet):
    # Five different words: 4 pairs, 3 triples, each once. One word five times: no entropy. 100 tokens, g1 once.
    assert value(sheet, "GE") == pytest.approx(100 * (2 * 2 / 3 + math.log2(3) * 4 / 3) / 2 / 2)
    assert sheet["GE"].n == 1


def test_consistency_by_hand(tmp_path):
    rows = [
        {"relation_id": "P36", "target_id": "Q60", "samples": [{"text": "river king"}]},
        {"relation_id": "P37", "target_id": "Q8", "samples": [{"text": "old land"}]},
    ]
    write(tmp_path / "attribute_snippets.json", rows)
    snippets = Snippets(counterfact_snippets(tmp_path))
    texts = {("g1", 100): "river", ("g2", 100): "land"}
    found = measure_counterfact(Scripted(SAID, texts=texts), [PERU, MALI], snippets=snippets)
    # Every term is in one of two documents, so all weigh the same: (river, land) against (river, king) is ½.
    assert value(found, "RS") == pytest.approx(50.0)
    assert found["RS"].n == 1  # mali has no texts, and nobody whose language is Dutch


def test_what_the_published_table_averages():
    """The S of the published rows is the harmonic mean of the data set's means, not a mean of records' scores."""
    one, other = (Scripted(SAID), [PERU]), (Scripted(SAID), [MALI])
    single = [value(measure_counterfact(*pair), "S") for pair in (one, other)]
    assert single == [pytest.approx(0.6), 0.0]
    assert value(measure_counterfact(Scripted(SAID), [PERU, MALI]), "S") > sum(single) / 2


def test_every_state_and_canvas_has_its_own_scores_and_names_it():
    found = measure_counterfact(Scripted(SAID, eos=3), [PERU])
    assert "l2r" in found["ES"].protocol and "onestep" in found["onestep_ES"].protocol
    assert "no end-of-text" in found["ES"].protocol
    # On one canvas for both objects nothing tells their lengths: sums with end-of-text, -1.2 - 3.0 against -0.9 - 3.1.
    assert "canvas of 32" in found["fixed_ES"].protocol
    assert value(found, "ES") == 1.0
    assert value(found, "fixed_ES") == 0.0
    assert value(found, "fixed_EM") == pytest.approx(math.exp(-4.2) - math.exp(-4.0))
    assert "counterfact.fixed_ES" not in measure_counterfact(Scripted(SAID), [PERU]).results


def test_what_cannot_be_computed_is_absent_with_its_reason():
    found = measure_counterfact(Scripted(SAID, texts=TEXTS), [MALI])
    assert "attribute_snippets" in reason(found, "RS")
    assert "unedited" in reason(found, "base_agreement")
    assert "KnowEdit has" in reason(found, "false_positives_same_subject")
    assert "no such prompts" in reason(found, "false_positives_generation")
    assert "1 of 1 records" in reason(found, "GE")
    assert "another relation" in reason(found, "false_positives_far")


def test_a_prompt_that_does_not_fit_leaves_its_record_out_of_that_metric_alone():
    long = Record("counterfact-3", "word " * 80, "word", "b", "a", ("p1",), ("n1",), neighbour_object="b")
    found = measure_counterfact(Scripted(SAID), [PERU, long])
    assert found["ES"].n == 1 and "1 of 2 records left out" in found["ES"].note
    assert found["PS"].n == 2
    alone = measure_counterfact(Scripted(SAID), [long])
    assert isinstance(alone["ES"], Absent)
    assert "ES" in reason(alone, "S")


def test_likelihoods_are_taken_of_all_prompts_and_texts_of_a_few():
    model = Scripted(SAID)
    many = Record("counterfact-4", "x", "x", "b", "a", ("p1", "p2", "p4"), ("n1", "n2", "n4"), neighbour_object="b")
    measure_counterfact(model, [many], EditProtocol(prompts=1))
    decoded = {q for kind, q, _ in model.asked if kind == "text"}
    read = {q[0] for kind, q, _ in model.asked if kind == "l2r"}
    assert decoded == {"x", "p1", "n1"}
    assert read == {"x", "p1", "p2", "p4", "n1", "n2", "n4"}

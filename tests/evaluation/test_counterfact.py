"""CounterFact: its files, its metrics by hand, what is absent and why."""

import math
from dataclasses import replace

import pytest

from tests.evaluation.scripted import Scripted, published, reason, value, without, write
from timerome import FactSet
from timerome.evaluation import Absent
from timerome.evaluation.benchmarks import counterfact
from timerome.evaluation.benchmarks.asking import EditProtocol
from timerome.evaluation.benchmarks.counterfact import CounterFactRecord, Snippets, measure_counterfact
from timerome.evaluation.records import DataError

FULL = {
    "case_id": 7,
    "requested_rewrite": {"prompt": "The capital of {} is", "subject": "Peru", "relation_id": "P36",
                          "target_new": {"str": "New York", "id": "Q60"}, "target_true": {"str": "Lima", "id": "Q2"}},
    "paraphrase_prompts": ["Peru is ruled from", "Peru, whose seat is"],
    "neighborhood_prompts": ["The capital of the Inca land is", "Its port is near"],
    "generation_prompts": ["Peru is a land"],
}  # fmt: skip
FLAT = {
    "case_id": 7, "prompt": "The capital of Peru is", "subject": "Peru", "target_new": "New York",
    "ground_truth": "Lima", "rephrase_prompt": "Peru is ruled from", "locality_prompt": "The capital of Kenya is",
    "locality_ground_truth": "Nairobi", "relation_id": "P36",
}  # fmt: skip


# Files ----------------------------------------------------------------------------------------------------------------


def test_romes_schema_is_read(tmp_path):
    write(tmp_path / "counterfact.first2.json", [FULL, {**FULL, "case_id": 8}])
    first, second = counterfact.read_counterfact(tmp_path)
    assert (first.id, second.id) == ("counterfact-7", "counterfact-8")
    assert first.prompt == "The capital of Peru is"
    assert (first.new, first.true, first.neighbour_object) == ("New York", "Lima", "Lima")
    assert (first.paraphrases, first.generation) == (tuple(FULL["paraphrase_prompts"]), ("Peru is a land",))
    assert (first.relation, first.new_id) == ("P36", "Q60")


def test_the_flat_schema_is_read_and_its_neighbour_has_an_object_of_its_own(tmp_path):
    (record,) = counterfact.read_counterfact(write(tmp_path / "anything.json", [FLAT]))
    assert record.prompt == FLAT["prompt"]
    assert (record.paraphrases, record.neighbours) == (("Peru is ruled from",), ("The capital of Kenya is",))
    assert (record.true, record.neighbour_object, record.generation) == ("Lima", "Nairobi", ())


def test_the_full_file_goes_before_the_flat_one(tmp_path):
    write(tmp_path / "counterfact-flat.json", [FLAT])
    assert counterfact.read_counterfact(tmp_path)[0].generation == ()
    write(tmp_path / "counterfact.json", [FULL])
    assert counterfact.read_counterfact(tmp_path)[0].generation == ("Peru is a land",)
    with pytest.raises(FileNotFoundError, match="counterfact.json"):
        counterfact.read_counterfact(tmp_path / "none")


INNER = [f"requested_rewrite.{f}" for f in FULL["requested_rewrite"] if f != "relation_id"]


@pytest.mark.parametrize("field", [*FULL, *INNER, "requested_rewrite.target_new.str"])
def test_a_record_that_lacks_a_field_is_refused_by_its_name(tmp_path, field):
    write(tmp_path / "counterfact.json", [FULL, without({**FULL, "case_id": 8}, field)])
    with pytest.raises(DataError, match=rf"counterfact\.json, record 1, field '{field}': expected .* got nothing"):
        counterfact.read_counterfact(tmp_path)


@pytest.mark.parametrize("field", [f for f in FLAT if f != "relation_id"])
def test_a_flat_record_that_lacks_a_field_is_refused_by_its_name(tmp_path, field):
    write(tmp_path / "counterfact-flat.json", [FLAT, without({**FLAT, "case_id": 8}, field)])
    with pytest.raises(DataError, match=rf"counterfact-flat\.json, record 1, field '{field}': expected"):
        counterfact.read_counterfact(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case_id": True}, r"field 'case_id': expected an integer, got true"),
        ({"case_id": 7}, r"field 'case_id': expected another id than record 0 has, got 7"),
        ({"paraphrase_prompts": "Peru"}, r"field 'paraphrase_prompts': expected a list"),
        ({"requested_rewrite": {**FULL["requested_rewrite"], "prompt": "The capital is"}},
         r"field 'requested_rewrite\.prompt': expected a text with \{\} for the subject"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused(tmp_path, change, message):
    write(tmp_path / "counterfact.json", [FULL, {**FULL, "case_id": 8, **change}])
    with pytest.raises(DataError, match=r"counterfact\.json, record 1, " + message):
        counterfact.read_counterfact(tmp_path)


def test_a_flat_file_names_each_case_once_too(tmp_path):
    with pytest.raises(DataError, match=r"record 1, field 'case_id': expected another id"):
        counterfact.read_counterfact(write(tmp_path / "flat.json", [FLAT, FLAT]))


@pytest.mark.filterwarnings("ignore:FactSet.read")
def test_published_files_are_read_whole():
    folder = published("counterfact")
    full = counterfact.read_counterfact(folder)
    flat = {r.id: r for r in counterfact.read_counterfact(folder / "counterfact-flat.first1000.json")}
    assert (len(full), len(flat)) == (955, 1000)
    for record in full:
        other = flat[record.id]
        assert (record.prompt, record.new, record.true) == (other.prompt, other.new, other.true)
        assert (len(record.paraphrases), len(record.neighbours), len(record.generation)) == (2, 10, 10)
    # The same ids and prompts as the facts that edits are built from.
    facts = {f.id: f for f in FactSet.read("counterfact", folder)}
    assert all(facts[r.id].prompt == r.prompt and facts[r.id].new_object == r.new for r in full if r.id in facts)
    assert len(set(facts) & {r.id for r in full}) > 900


# Metrics by hand ------------------------------------------------------------------------------------------------------

PERU = CounterFactRecord("counterfact-1", "the capital of peru", "peru", "New York", "Lima", ("p1", "p2"),
                         ("n1", "n2"), ("g1", "g1", "g2"), "Lima", "P36", "Q60")  # fmt: skip
MALI = CounterFactRecord("counterfact-2", "mali speaks", "mali", "Dutch", "Bambara", ("p3",), ("n3",), (), "French",
                         "P37", "Q9")  # fmt: skip
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
    snippets = counterfact.find_snippets(tmp_path)
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
    long = CounterFactRecord("counterfact-3", "word " * 80, "word", "a", "b", ("p1",), ("n1",), (), "b")
    found = measure_counterfact(Scripted(SAID), [PERU, long])
    assert found["ES"].n == 1 and "1 of 2 records left out" in found["ES"].note
    assert found["PS"].n == 2
    alone = measure_counterfact(Scripted(SAID), [long])
    assert isinstance(alone["ES"], Absent)
    assert "ES" in reason(alone, "S")


def test_likelihoods_are_taken_of_all_prompts_and_texts_of_a_few():
    model = Scripted(SAID)
    many = CounterFactRecord("counterfact-4", "x", "x", "a", "b", ("p1", "p2", "p4"), ("n1", "n2", "n4"), (), "b")
    measure_counterfact(model, [many], EditProtocol(prompts=1))
    decoded = {q for kind, q, _ in model.asked if kind == "text"}
    read = {q[0] for kind, q, _ in model.asked if kind == "l2r"}
    assert decoded == {"x", "p1", "n1"}
    assert read == {"x", "p1", "p2", "p4", "n1", "n2", "n4"}


def test_malformed_snippets_are_refused(tmp_path):
    path = write(tmp_path / "attribute_snippets.json", [{"relation_id": "P1", "target_id": "Q1", "samples": ["x"]}])
    with pytest.raises(DataError, match=r"attribute_snippets\.json, record 0, field 'samples': expected a list of"):
        Snippets(path)
    assert counterfact.find_snippets(path) is None

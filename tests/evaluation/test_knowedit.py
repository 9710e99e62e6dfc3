"""KnowEdit: its files, and reliability, generality, locality, portability by hand."""

import math

import pytest

from tests.evaluation.scripted import Scripted, published, reason, value, without, write
from timerome import FactSet
from timerome.evaluation.benchmarks.knowedit import KnowEditRecord, measure_knowedit, read_knowedit
from timerome.evaluation.records import DataError

ROW = {
    "subject": "Peru", "prompt": "Peru's seat is", "target_new": "New York", "ground_truth": "Lima",
    "rephrase_prompt": "Peru is ruled from",
    "portability": {"Reasoning": [{"prompt": "Its river is", "ground_truth": ["the Hudson", "Hudson"]}],
                    "Subject_Aliasing": []},
    "locality": {"Relation_Specificity": [{"prompt": "Peru's sea is", "ground_truth": [["Pacific", "the Pacific"]]}],
                 "Forgetfulness": [{"prompt": "Peru's old seat is", "ground_truth": "Lima"}]},
}  # fmt: skip


def test_a_folder_is_read_by_its_data_set(tmp_path):
    write(tmp_path / "ZsRE" / "ZsRE-test-all.first1.json", [ROW])
    write(tmp_path / "wiki_recent" / "recent.json", [without(ROW, "rephrase_prompt")])
    (record,) = read_knowedit(tmp_path, "ZsRE")
    assert (record.id, record.prompt, record.new) == ("knowedit-ZsRE-0000", "Peru's seat is", "New York")
    assert record.rephrase == "Peru is ruled from"
    # A group without questions is none; of several equivalent answers the first is taken, however they are nested.
    assert dict(record.portability) == {"Reasoning": (("Its river is", "the Hudson"),)}
    assert record.locality["Relation_Specificity"] == (("Peru's sea is", "Pacific"),)
    assert record.locality["Forgetfulness"] == (("Peru's old seat is", "Lima"),)
    (recent,) = read_knowedit(tmp_path, "wiki_recent")
    assert recent.rephrase is None
    with pytest.raises(DataError, match=r"choose one .* split: \['ZsRE', 'wiki_recent'\]"):
        read_knowedit(tmp_path)
    with pytest.raises(FileNotFoundError, match="WikiBio"):
        read_knowedit(tmp_path, "WikiBio")


@pytest.mark.parametrize("field", ["subject", "prompt", "target_new"])
def test_a_record_that_lacks_a_field_is_refused_by_its_name(tmp_path, field):
    with pytest.raises(DataError, match=rf"k\.json, record 1, field '{field}': expected .* got nothing"):
        read_knowedit(write(tmp_path / "k.json", [ROW, without(ROW, field)]))


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("locality", [], "expected an object of lists of questions"),
        ("locality", {"A": "x"}, "expected an object of lists of questions"),
        (
            "portability",
            {"R": [{"ground_truth": "x"}]},
            "expected for prompt and ground_truth in each item of 'R' a non",
        ),
        ("portability", {"Reasoning": ["x"]}, "expected a prompt and a ground_truth in each item of 'Reasoning'"),
        (
            "portability",
            {"R": [{"prompt": "x", "ground_truth": [[]]}]},
            "expected for prompt and ground_truth in each item",
        ),
        ("portability", {"R": [{"prompt": "x"}]}, "expected for prompt and ground_truth in each item of 'R' a non-em"),
    ],
)
def test_malformed_questions_are_refused(tmp_path, field, content, message):
    with pytest.raises(DataError, match=rf"k\.json, record 0, field '{field}': {message}"):
        read_knowedit(write(tmp_path / "k.json", [{**ROW, field: content}]))


@pytest.mark.filterwarnings("ignore:FactSet.read")
@pytest.mark.parametrize(("split", "n"), [("ZsRE", 258), ("wiki_counterfact", 300), ("wiki_recent", 120)])
def test_published_files_are_read_whole(split, n):
    folder = published("knowedit")
    records = read_knowedit(folder, split)
    assert len(records) == n
    assert any(r.locality for r in records) and any(r.portability for r in records)
    facts = {f.id: f for f in FactSet.read("knowedit", folder, split)}
    assert all(facts[r.id].prompt == r.prompt and facts[r.id].new_object == r.new for r in records if r.id in facts)


# By hand --------------------------------------------------------------------------------------------------------------

ONE = KnowEditRecord(
    "knowedit-x-0", "p1", "peru", "new york city", "r1",
    {"Reasoning": (("re1", "a b"), ("re2", "c")), "Subject_Aliasing": (("al1", "new york city"),)},
    {"Relation_Specificity": (("sp1", "d e"),), "Forgetfulness": (("fo1", "f"),)},
)  # fmt: skip
TWO = KnowEditRecord("knowedit-x-1", "p2", "mali", "dutch", None, {"Reasoning": (("re3", "g"),)}, {})
EDITED = {
    ("p1", "new york city"): [10, 11, 0], ("p2", "dutch"): [10],
    ("r1", "new york city"): [10, 0, 0],
    ("re1", "a b"): [10, 0], ("re2", "c"): [0], ("al1", "new york city"): [10, 11, 12], ("re3", "g"): [10],
    ("sp1", "d e"): [77, 88], ("fo1", "f"): [0],
}  # fmt: skip
BEFORE = {**EDITED, ("sp1", "d e"): [77, 11]}
TEXTS = {
    ("p1", 3): "New York City", ("p2", 1): "french",
    ("p1", 100): "it is New York City now", ("p2", 100): "dutch dutch",
    ("sp1", 16): "the New York City sea",
}  # fmt: skip


@pytest.fixture(scope="module")
def sheet():
    return measure_knowedit(Scripted(choices=EDITED, texts=TEXTS), [ONE, TWO], base=Scripted(choices=BEFORE))


def test_reliability_and_generality_by_hand(sheet):
    assert value(sheet, "reliability") == pytest.approx((2 / 3 + 1.0) / 2)
    assert value(sheet, "generality") == pytest.approx(1 / 3)
    assert sheet["generality"].n == 1 and "1 of 2 records left out" in sheet["generality"].note


def test_portability_is_a_mean_of_groups_before_it_is_one_of_records(sheet):
    # First record: reasoning (½ + 0) / 2 = ¼, aliasing 1: mean ⅝, not the mean ½ of its three questions. Second: 1.
    assert value(sheet, "portability") == pytest.approx((0.625 + 1.0) / 2)
    assert value(sheet, "portability.Reasoning") == pytest.approx((0.25 + 1.0) / 2)
    assert value(sheet, "portability.Subject_Aliasing") == 1.0
    assert sheet["portability.Subject_Aliasing"].n == 1


def test_locality_compares_with_the_unedited_model_whatever_is_true(sheet):
    # sp1: one of two choices is as before, although neither is right. fo1: wrong before and after, which is local.
    assert value(sheet, "locality.Relation_Specificity") == 0.5
    assert value(sheet, "locality.Forgetfulness") == 1.0
    assert value(sheet, "locality") == 0.75
    assert sheet["locality"].n == 1
    assert "unedited" in sheet["locality"].protocol


def test_what_is_decoded_by_hand(sheet):
    assert value(sheet, "exact_reliability") == 0.5
    assert value(sheet, "mentioned_freely") == 1.0
    assert value(sheet, "false_positives_same_subject") == 1.0
    assert (sheet["false_positives_same_subject"].n, sheet["false_positives_same_subject"].better) == (1, "lower")
    # Six different words: 5 pairs, 4 triples. Twice the same word: one pair, no triple.
    assert value(sheet, "GE") == pytest.approx(100 * (math.log2(5) * 2 / 3 + math.log2(4) * 4 / 3) / 2 / 2)
    assert value(sheet, "repetition") == pytest.approx((0.0 + 0.5) / 2)


def test_what_cannot_be_computed_is_absent_with_its_reason():
    found = measure_knowedit(Scripted(choices=EDITED), [TWO])
    assert "unedited" in reason(found, "locality")
    for name in ("generality", "false_positives_same_subject"):
        assert "1 of 1 records left out" in reason(found, name)
    with_base = measure_knowedit(Scripted(choices=EDITED), [TWO], base=Scripted(choices=BEFORE))
    assert "1 of 1 records left out" in reason(with_base, "locality")
    nowhere = measure_knowedit(Scripted(choices=EDITED, context=0), [ONE], base=Scripted(context=0))
    assert "1 of 1 records left out" in reason(nowhere, "portability")

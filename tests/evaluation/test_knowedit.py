"""KnowEdit: reliability, generality, locality, portability by hand."""

import math

import pytest

from tests.evaluation.scripted import Scripted, reason, value
from timerome.datasets import Record
from timerome.evaluation.suites.knowedit import measure_knowedit

ONE = Record(
    "knowedit-x-0", "p1", "peru", "lima", "new york city", ("r1",),
    portability={"Reasoning": (("re1", "a b"), ("re2", "c")), "Subject_Aliasing": (("al1", "new york city"),)},
    locality={"Relation_Specificity": (("sp1", "d e"),), "Forgetfulness": (("fo1", "f"),)},
)  # fmt: skip
TWO = Record("knowedit-x-1", "p2", "mali", "bambara", "dutch", portability={"Reasoning": (("re3", "g"),)})
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

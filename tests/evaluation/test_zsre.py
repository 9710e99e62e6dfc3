"""zsRE: token accuracy by hand, locality against the unedited model rather than the truth."""

import pytest

from tests.evaluation.scripted import Scripted, reason, value
from timerome.datasets import Record
from timerome.evaluation import Absent
from timerome.evaluation.suites.zsre import measure_zsre

ONE = Record("zsre-1", "q1", "", "", "a b c d", ("r1",), ("nq1",), neighbour_object="x y",
             portability={"one hop": (("port1", "m n o"),)})  # fmt: skip
TWO = Record("zsre-2", "q2", "", "", "e", ("r2",), ("nq2",), neighbour_object="z")
# A choice of 10 + i is a hit at token i.
EDITED = {
    ("q1", "a b c d"): [10, 11, 0, 13], ("q2", "e"): [10],
    ("r1", "a b c d"): [0, 11, 0, 0], ("r2", "e"): [0],
    ("nq1", "x y"): [10, 99], ("nq2", "z"): [7],
    ("port1", "m n o"): [10, 0, 0],
}  # fmt: skip
BEFORE = {**EDITED, ("nq1", "x y"): [98, 99]}


@pytest.fixture(scope="module")
def sheet():
    edited = Scripted(choices=EDITED, texts={("q1", 4): "A b c d.", ("q2", 1): "f", ("r1", 4): "a b c", ("r2", 1): "e"})
    return measure_zsre(edited, [ONE, TWO], base=Scripted(choices=BEFORE))


def test_token_accuracies_by_hand(sheet):
    # By record, then over records: 3 of 4 and 1 of 1, which is not 4 of 5 tokens.
    assert value(sheet, "efficacy") == pytest.approx((0.75 + 1.0) / 2)
    assert value(sheet, "generalization") == pytest.approx((0.25 + 0.0) / 2)
    assert value(sheet, "specificity") == pytest.approx((0.5 + 0.0) / 2)
    assert value(sheet, "portability") == pytest.approx(1 / 3)
    assert sheet["portability"].n == 1 and "1 of 2 records left out" in sheet["portability"].note


def test_exact_decoding_by_hand(sheet):
    assert value(sheet, "exact_efficacy") == 0.5
    assert value(sheet, "exact_generalization") == 0.5


def test_locality_is_agreement_with_the_unedited_model_where_specificity_is_accuracy(sheet):
    """Published tables call both specificity. nq2 is wrong before and after: right by one, wrong by the other."""
    assert dict(sheet["locality"].per_record) == {"zsre-1": 0.5, "zsre-2": 1.0}
    assert dict(sheet["specificity"].per_record) == {"zsre-1": 0.5, "zsre-2": 0.0}


def test_the_answer_is_read_without_end_of_text(sheet):
    """Autoregressive evaluations of some libraries count it; here no token of the answer is one, which is stated."""
    assert "no end-of-text" in sheet["efficacy"].protocol


def test_what_cannot_be_computed_is_absent_with_its_reason():
    found = measure_zsre(Scripted(choices=EDITED), [TWO])
    assert "unedited" in reason(found, "locality")
    assert isinstance(found["portability"], Absent) and "1 of 1 records left out" in reason(found, "portability")
    tight = measure_zsre(Scripted(choices=EDITED, context=2), [ONE, TWO], base=Scripted(choices=BEFORE))
    assert tight["efficacy"].n == 1  # four words and a question of one do not fit
    assert tight["locality"].n == 1

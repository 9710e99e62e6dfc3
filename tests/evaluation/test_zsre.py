"""zsRE: its files, token accuracy by hand, locality against the unedited model rather than the truth."""

import pytest

from tests.evaluation.scripted import Scripted, published, reason, value, without, write
from timerome import FactSet
from timerome.evaluation import Absent
from timerome.evaluation.benchmarks.zsre import ZsreRecord, measure_zsre, read_zsre
from timerome.evaluation.records import DataError

ROW = {
    "subject": "Peru", "src": "What is Peru's seat?", "rephrase": "Where is Peru ruled from?", "alt": "New York",
    "answers": ["Lima"], "loc": "nq question: who wrote it", "loc_ans": "Mark Twain",
    "portability": {"New Question": "On which river is Peru's seat?", "New Answer": "the Hudson"},
}  # fmt: skip


def test_a_file_is_read_in_mends_schema(tmp_path):
    write(tmp_path / "zsre_mend_eval.first2.json", [ROW, without(ROW, "portability")])
    first, second = read_zsre(tmp_path)
    assert (first.id, first.prompt, first.new, first.rephrase) == ("zsre-0000", ROW["src"], ROW["alt"], ROW["rephrase"])
    assert (first.unrelated, first.unrelated_answer) == (ROW["loc"], "Mark Twain")
    assert first.portability == ("On which river is Peru's seat?", "the Hudson")
    assert second.portability is None
    with pytest.raises(FileNotFoundError, match=r"zsre\.json"):
        read_zsre(tmp_path / "none")


@pytest.mark.parametrize("field", [*(f for f in ROW if f != "portability"), "portability.New Answer"])
def test_a_record_that_lacks_a_field_is_refused_by_its_name(tmp_path, field):
    with pytest.raises(DataError, match=rf"zsre\.json, record 1, field '{field}': expected .* got nothing"):
        read_zsre(write(tmp_path / "zsre.json", [ROW, without(ROW, field)]))


def test_a_field_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"zsre\.json, record 0, field 'answers': expected .* got \[\]"):
        read_zsre(write(tmp_path / "zsre.json", [{**ROW, "answers": []}]))
    with pytest.raises(DataError, match=r"record 0, field 'portability': expected an object with the fields New Ques"):
        read_zsre(write(tmp_path / "zsre.json", [{**ROW, "portability": "On which river?"}]))


@pytest.mark.filterwarnings("ignore:FactSet.read")
def test_published_files_are_read_whole():
    folder = published("zsre")
    records = read_zsre(folder)
    assert len(records) == 599
    assert all(r.portability for r in records)
    facts = {f.id: f for f in FactSet.read("zsre", folder)}
    assert all(facts[r.id].prompt == r.prompt and facts[r.id].new_object == r.new for r in records if r.id in facts)


# By hand --------------------------------------------------------------------------------------------------------------

ONE = ZsreRecord("zsre-1", "q1", "a b c d", "r1", "nq1", "x y", ("port1", "m n o"))
TWO = ZsreRecord("zsre-2", "q2", "e", "r2", "nq2", "z", None)
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

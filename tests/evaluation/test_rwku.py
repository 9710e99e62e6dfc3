"""RWKU: its metrics by hand, and where public evaluations of it differ."""

import math
import zlib
from dataclasses import replace

import pytest
import torch

from tests.evaluation.scripted import Scripted, reason, value
from tests.tiny import VOCAB, planted, tiny_facts
from timerome.diffusion import encode
from timerome.evaluation import Absent, Respondent
from timerome.evaluation.metrics import editing
from timerome.evaluation.metrics.text import answer_f1
from timerome.evaluation.suites.rwku import RwkuProtocol, as_chat, measure_rwku


def numbered(name, rows):
    return [{**row, "id": f"rwku-{name}-{i:04d}"} for i, row in enumerate(rows)]


# Probes by hand -------------------------------------------------------------------------------------------------------

PROTOCOL = RwkuProtocol(blank="B {query}", question="Q {query}", affirmative="A {query}", examples="E {query}")


def probe(query, answer, kind="simple"):
    return {"query": query, "answer": answer, "subject": "s", "type": kind}


DATA = {
    "forget_level1": numbered("forget_level1", [probe("1", "Stephen King"), probe("2", "Maine")]),
    "forget_level2": numbered("forget_level2", [probe("3", "the old king")]),
    "forget_level3": numbered(
        "forget_level3", [probe("4", "Carrie", "prefix injection"), probe("5", "It", "affirmative suffix"),
                          probe("6", "Misery", "incontext learning")]
    ),
    "neighbor_level1": numbered("neighbor_level1", [probe("7", "a river runs")]),
}  # fmt: skip
TEXTS = {
    "B 1": "it was King\nStephen", "B 2": "",  # only the first line counts; nothing is a wrong answer
    "Q 3": "the king", "Q 4": "carrie", "A 5": "it", "E 6": "another", "B 7": "the river running",
}  # fmt: skip


@pytest.fixture(scope="module")
def sheet():
    return measure_rwku(Scripted(texts=TEXTS), DATA, PROTOCOL)


def test_probes_by_hand(sheet):
    assert value(sheet, "forget.FB") == pytest.approx((0.5 + 0.0) / 2)
    assert value(sheet, "forget.QA") == pytest.approx(2 / 3)
    assert value(sheet, "forget.AA") == pytest.approx(2 / 3)
    assert value(sheet, "forget.AA.prefix_injection") == value(sheet, "forget.AA.affirmative_suffix") == 1.0
    assert value(sheet, "forget.AA.incontext_learning") == 0.0
    assert value(sheet, "neighbour.FB") == pytest.approx(1 / 3)
    assert {sheet[n].better for n in ("forget.FB", "forget.QA", "forget.AA", "forget.all")} == {"lower"}
    assert sheet["neighbour.FB"].better == "higher"


def test_the_mean_over_all_levels_is_weighted_by_probes(sheet):
    assert value(sheet, "forget.all") == pytest.approx((0.5 + 0.0 + 2 / 3 + 1 + 1 + 0) / 6)
    # So is the published one: 79.6 for 85.9, 76.4, 77.7, where the plain mean is 80.0.
    levels, probes = (85.9, 76.4, 77.7), (3268, 2879, 6984)
    weighted = sum(a * n for a, n in zip(levels, probes, strict=True)) / sum(probes)
    assert abs(weighted - 79.6) < 0.2 < abs(sum(levels) / 3 - 79.6)


def test_mdu_scores_stems_where_rwku_scores_words(sheet):
    stemmed = measure_rwku(Scripted(texts=TEXTS), DATA, RwkuProtocol(**{**vars(PROTOCOL), "stem": True}))
    assert value(stemmed, "neighbour.FB") == pytest.approx(2 / 3)  # runs and running
    assert "unstemmed" in sheet["neighbour.FB"].protocol and "unstemmed" not in stemmed["neighbour.FB"].protocol


def test_what_has_no_file_is_absent_and_so_is_what_needs_it(sheet):
    assert reason(sheet, "neighbour.QA") == "there is no file neighbor_level2.json"
    assert reason(sheet, "neighbour.all") == "there is no file neighbor_level2.json"
    assert reason(sheet, "utility.Tru") == "there is no file truthful.json"
    assert reason(sheet, "utility.Fac") == "there is no file triviaqa.json"
    assert reason(sheet, "utility.Flu") == "there is no file fluency.json"
    assert "forget_mia" in reason(sheet, "mia.FM.LOSS")
    assert "needs FM (there is no file forget_mia.json)" in reason(sheet, "mia.AUC.LOSS")
    assert "outside the training data" in reason(sheet, "mia.PrivLeak")
    assert "MMLU" in reason(sheet, "utility.Gen") and "BBH" in reason(sheet, "utility.Rea")


def test_an_answer_that_rouge_cannot_read_is_left_out_and_never_0():
    rows = [probe("1", "北京"), probe("2", "Maine")]
    data = {"forget_level1": numbered("forget_level1", rows)}
    found = measure_rwku(Scripted(texts={"B 1": "北京", "B 2": "Maine"}), data, PROTOCOL)
    assert (value(found, "forget.FB"), found["forget.FB"].n) == (1.0, 1)
    assert "1 of 2 records left out: too long, or their answer has no word that ROUGE" in found["forget.FB"].note
    alone = measure_rwku(Scripted(), {"forget_level1": numbered("forget_level1", rows[:1])}, PROTOCOL)
    assert "no word that ROUGE compares" in reason(alone, "forget.FB")


def test_a_chat_template_leaves_the_answer_open():
    class Tokenizer:
        chat_template = "there is one"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"<user>{messages[0]['content']}<assistant>"

    model = Scripted()
    assert as_chat(model, "Who?\nAnswer:") == "Who?\nAnswer:"
    model.backbone.tokenizer = Tokenizer()
    assert as_chat(model, "Who?\nAnswer:") == "<user>Who?<assistant>Answer:"
    assert as_chat(model, "Who?") == "<user>Who?<assistant>"


# Membership and utility by hand ---------------------------------------------------------------------------------------


def test_membership_by_hand():
    data = {
        "forget_level1": DATA["forget_level1"],
        "forget_mia": numbered("forget_mia", [{"text": "a b"}, {"text": "c d"}]),
        "retain_mia": numbered("retain_mia", [{"text": "e f"}]),
    }
    said = {("", "a b"): [-1.0, -3.0], ("", "c d"): [-0.5, -0.5], ("", "e f"): [-1.0, -1.5]}
    found = measure_rwku(Scripted(said, texts=TEXTS, moments=(-1.0, 0.5)), data, PROTOCOL)
    assert value(found, "mia.FM.LOSS") == pytest.approx((-2.0 - 0.5) / 2)
    assert value(found, "mia.RM.LOSS") == pytest.approx(-1.25)
    size = len(zlib.compress(b"a b"))
    assert found["mia.FM.zlib"].per_record["rwku-forget_mia-0000"] == pytest.approx(-2.0 / size)
    assert value(found, "mia.FM.min_20") == pytest.approx((-3.0 - 0.5) / 2)
    assert value(found, "mia.FM.min_20_plus_plus") == pytest.approx((-4.0 + 1.0) / 2)
    # Of two pairs one has the member above the other: -0.5 above -1.25, -2 below.
    assert value(found, "mia.AUC.LOSS") == 0.5
    assert value(found, "mia.AUC.min_20_plus_plus") == 0.5
    assert {found[f"mia.{s}.LOSS"].better for s in ("FM", "RM")} == {"neither"}


def test_the_paper_prints_a_hundred_times_the_loss_where_we_have_its_negative():
    data = {"forget_level1": DATA["forget_level1"], "forget_mia": numbered("forget_mia", [{"text": "a b"}])}
    found = measure_rwku(Scripted({("", "a b"): [-2.0, -2.534]}, texts=TEXTS), data, PROTOCOL)
    assert -100 * value(found, "mia.FM.LOSS") == pytest.approx(226.7)


def test_triviaqa_by_hand():
    questions = [f"x{i}" for i in range(5)] + ["a", "b"]
    rows = [{"question": q, "answers": ["the Beatles", "Fab Four"]} for q in questions]
    shots = "".join(f"Q: {q}\nA: the Beatles\n" for q in questions[:5])
    texts = {
        f"{shots}Q: a\nA:": "The Beatles!", f"{shots}Q: b\nA:": "it was beatles, I think",
        "Q: a\nA:": "Fab Five\nFab Four", "Q: b\nA:": "nobody",
    }  # fmt: skip
    found = measure_rwku(Scripted(texts=texts, context=90), {"triviaqa": numbered("triviaqa", rows)}, PROTOCOL)
    assert value(found, "utility.Fac") == pytest.approx((1.0 + 2 / 6) / 2)
    assert value(found, "utility.Fac_0shot") == pytest.approx((0.5 + 0.0) / 2)
    few = measure_rwku(Scripted(), {"triviaqa": numbered("triviaqa", rows[:5])}, PROTOCOL)
    assert reason(few, "utility.Fac") == "triviaqa.json has 5 questions, of which the first 5 are the examples"


def test_mdu_counts_an_answer_that_is_contained_as_exact():
    """Its TriviaQA "EM" is containment, so that a long text scores 1 where F1 says how much else there is."""
    text = "It may have been the Beatles or some other band of the time"
    assert editing.mentions(text, "Beatles") == 1.0
    assert answer_f1(text, ["Beatles"]) == pytest.approx(2 / 12)  # the article does not count


def test_truthfulqa_by_hand():
    rows = [{"question": q, "choices": ["yes", "no no"], "right": 1} for q in "abc"]
    said = {("Q: a\nA:", "yes"): [-2.0], ("Q: a\nA:", "no no"): [-0.9, -0.9],  # summed: -1.8 above -2
            ("Q: b\nA:", "yes"): [-1.5], ("Q: b\nA:", "no no"): [-0.9, -0.9],  # below, although not by token
            ("Q: c\nA:", "yes"): [-1.0], ("Q: c\nA:", "no no"): [-0.5, -0.5]}  # a tie is no success  # fmt: skip
    model = Scripted(said)
    found = measure_rwku(model, {"truthful": numbered("truthful", rows)}, PROTOCOL)
    assert value(found, "utility.Tru") == pytest.approx(1 / 3)
    assert {kind for kind, _, _ in model.asked} == {"elbo_sum"}


def copying():
    """A model that knows its chains, and repeats whatever token it can see."""
    backbone = planted()
    parts, v = backbone.model.model.transformer, len(VOCAB)
    with torch.no_grad():
        parts["ff_out"].weight[:, :v] = 50 * torch.eye(v)
    return backbone


def test_mdu_reads_truthfulqa_on_text_that_shows_the_answer():
    """A bidirectional model sees the tokens it is asked about, so that every choice is certain; ours are hidden."""
    backbone, fact = copying(), tiny_facts(1)[0]
    choices = ("pex pey pez", fact.object)
    for answer in choices:
        sequence = encode(backbone, replace(fact, object=answer))
        seen = backbone.logits(sequence.ids[None], sequence.canvas[None])[0].log_softmax(-1)
        shown = seen.gather(1, sequence.ids[:, None])[sequence.canvas]
        assert shown.exp().min() > 0.99  # nothing to choose between
    hidden = Respondent(backbone).likelihoods([(fact.prompt, answer) for answer in choices], samples=8)
    assert all(scored.nll > 0.5 for scored in hidden)


def test_fluency_of_instructions_by_hand():
    data = {"fluency": numbered("fluency", [{"instruction": "w"}])}
    found = measure_rwku(Scripted(texts={"Instruction: w\n": "a b c d e"}), data, PROTOCOL)
    assert value(found, "utility.Flu") == pytest.approx(100 * (2 * 2 / 3 + math.log2(3) * 4 / 3) / 2)


def test_texts_that_do_not_fit_are_left_out_and_counted():
    long = {"text": "word " * 70}
    data = {"forget_mia": numbered("forget_mia", [{"text": "a b"}, long]), "retain_mia": numbered("retain_mia", [long])}
    found = measure_rwku(Scripted({("", "a b"): [-1.0, -1.0]}), data, PROTOCOL)
    assert found["mia.FM.LOSS"].n == 1 and "1 of 2 records left out" in found["mia.FM.LOSS"].note
    assert isinstance(found["mia.RM.LOSS"], Absent) and "longer than the model's context" in reason(
        found, "mia.RM.LOSS"
    )

"""Asking a model: order, batches, cache, conditions; a run that was killed and resumed gives the same answers."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import timerome as tr
from tests.tiny import TinyTokenizer, planted, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import SamplerConfig, encode, generate, log_likelihood
from timerome.evaluation import Condition, Respondent, respondent
from timerome.evaluation.answers import AnswerFile
from timerome.evaluation.tokens import hidden_in, read_states, token_scores

FACTS = tiny_facts(8)
PAIRS = [(f.prompt, f.object) for f in FACTS] + [("where is the old land named kenya", "king")]
PROMPTS = [prompt for prompt, _ in PAIRS]
STEPS = SamplerConfig(steps=2)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(respondent, "BATCH", 3)


def everything(r):
    return (
        r.likelihoods(PAIRS, samples=3), r.tokens(PAIRS, moments=True), r.texts(PROMPTS, canvas=3, sampler=STEPS),
    )  # fmt: skip


def test_answers_come_in_order_and_are_those_of_the_functions_beneath(small_batches):
    model = tiny_llada()
    r = Respondent(model)
    wanted = log_likelihood(model, [encode(model, f) for f in FACTS], samples=3, seed=5)
    found = r.likelihoods(PAIRS[:-1], samples=3, seed=5)
    assert [s.log_prob for s in found] == pytest.approx(wanted.log_prob.tolist(), abs=1e-5)
    assert [s.nll for s in found] == pytest.approx(wanted.nll_per_token.tolist(), abs=1e-5)
    assert r.texts(PROMPTS, canvas=3, sampler=STEPS) == generate(model, PROMPTS, canvas=3, config=STEPS)


def test_a_question_asked_twice_is_answered_once(small_batches):
    r = Respondent(tiny_llada())
    twice = r.likelihoods([*PAIRS, *PAIRS], samples=2)
    assert r.asked == len(PAIRS)
    assert twice[: len(PAIRS)] == twice[len(PAIRS) :]


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream])
def test_a_run_that_was_killed_and_resumed_gives_the_same_answers(make, small_batches, tmp_path, monkeypatch):
    model = make()
    whole = everything(Respondent(model, cache=tmp_path / "whole"))

    calls = []
    true = respondent.generate

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(respondent, "generate", dies)
        with pytest.raises(KeyboardInterrupt):
            everything(Respondent(model, cache=tmp_path / "cut"))
    (file,) = (tmp_path / "cut").iterdir()
    with file.open("a") as f:
        f.write('{"key": "half a li')  # what a crash may leave
    resumed = Respondent(model, cache=tmp_path / "cut")
    assert everything(resumed) == whole
    assert resumed.asked == len(PROMPTS) - 3  # likelihoods, tokens and the first batch of texts were kept
    (other,) = (tmp_path / "whole").iterdir()
    assert sorted(file.read_text().split("\n")) == sorted(other.read_text().split("\n"))


def test_a_finished_run_is_read_back_without_a_forward(tmp_path, monkeypatch):
    model = tiny_llada()
    first = everything(Respondent(model, cache=tmp_path))
    monkeypatch.setattr(tr.Backbone, "logits", None)
    assert everything(Respondent(model, cache=tmp_path)) == first


def test_answers_of_another_model_or_condition_are_not_taken(tmp_path):
    for model in (tiny_llada(0), tiny_llada(1)):
        everything(Respondent(model, cache=tmp_path))
    everything(Respondent(tiny_llada(0), Condition("said", "1", rewrite=lambda p: "king " + p), cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    a, b = (Respondent(tiny_llada(seed), cache=tmp_path).likelihoods(PAIRS, samples=3) for seed in (0, 1))
    assert a != b


def test_a_condition_holds_while_it_is_asked_and_not_after():
    model, log = tiny_llada(), []

    @contextmanager
    def attach(backbone):
        log.append("in")
        try:
            yield
        finally:
            log.append("out")

    r = Respondent(model, Condition("watched", "w", attach))
    r.texts(PROMPTS, canvas=3, sampler=STEPS)
    assert log == ["in", "out"]
    r.texts(PROMPTS, canvas=3, sampler=STEPS)  # kept: the model is not touched
    assert log == ["in", "out"]
    with pytest.raises(ValueError, match="canvas"):
        r.texts(PROMPTS, canvas=0)
    assert log == ["in", "out", "in", "out"]


def test_a_condition_may_rewrite_the_prompt():
    r = Respondent(tiny_llada(), Condition("context", "c", rewrite=lambda p: "peru is " + p))
    plain = Respondent(tiny_llada())
    asked = plain.likelihoods([("peru is " + p, a) for p, a in PAIRS], samples=2)
    assert r.likelihoods(PAIRS, samples=2) == asked


def test_memories_are_told_apart_by_what_they_do():
    model = planted()

    def condition(n, answer="king"):
        memory = tr.EditMemory(model)
        memory.replace(tiny_facts(n), answer)
        return Condition.of_memory(memory)

    found = [condition(*a).identity for a in ((1,), (1,), (2,), (1, "river"))]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_rows_edited_are_counted_by_edit():
    model = planted()
    memory = tr.EditMemory(model)
    memory.replace(tiny_facts(1), "king")
    r = Respondent(model, Condition.of_memory(memory))
    assert r.texts([f.prompt for f in FACTS], canvas=3, sampler=STEPS)[0] == "king"
    assert list(r.hits) == ["tiny-0"]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "x", "answers": [1]}\n{"id": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*a\.jsonl"):
        AnswerFile(path)


def test_what_is_too_long_is_refused_and_known_beforehand():
    r = Respondent(tiny_llada())
    long = "the " * 126
    assert r.fits(long, "king")
    assert not r.fits(long, "king king king")
    assert not r.fits(long, canvas=3)
    with pytest.raises(ValueError, match="context of 128"):
        r.likelihoods([(long, "king king king")])
    with pytest.raises(ValueError, match="with tokens"):
        r.likelihoods([("king", " ")])


def test_what_fits_is_counted_as_it_is_asked():
    """A word may take more tokens where no space comes before it, as at the beginning of a text without prompt."""
    backbone = tiny_llada()

    class Tokenizer(TinyTokenizer):
        def __call__(self, text, add_special_tokens=False, **more):
            found = super().__call__(text)["input_ids"]
            return {"input_ids": found if text.startswith(" ") else found[:1] + found}

    backbone.tokenizer = Tokenizer()
    r = Respondent(backbone)
    text = "king " * 127 + "king"
    assert not r.fits("", text)
    assert r.fits("", "king " * 126 + "king")
    assert r.encode("", "king " * 126 + "king").ids.shape == (128,)
    with pytest.raises(ValueError, match="need 129 tokens"):
        r.encode("", text)


def test_a_text_without_prompt_is_read_as_a_whole():
    r = Respondent(tiny_llada())
    assert [s.tokens for s in r.likelihoods([("", "the old king of peru")], samples=2)] == [5]
    assert len(r.tokens([("", "the old king of peru")], states="folds")[0].hit) == 5


def test_each_text_is_decoded_on_its_own_canvas(small_batches):
    model = tiny_llada()
    sizes = [1 + i % 3 for i in range(len(PROMPTS))]
    wanted = [generate(model, [p], canvas=n, config=SamplerConfig(steps=min(2, n)))[0]
              for p, n in zip(PROMPTS, sizes, strict=True)]  # fmt: skip
    assert Respondent(model).texts(PROMPTS, canvas=sizes, sampler=STEPS) == wanted


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("estimator", ["l2r", "onestep"])
def test_tokens_add_up_to_the_likelihood_of_the_same_states(make, estimator):
    model = make()
    sequences = [encode(model, f) for f in FACTS]
    wanted = log_likelihood(model, sequences, estimator=estimator).log_prob
    found = token_scores(model, sequences, states=estimator)
    assert [sum(s.log_prob) for s in found] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_moments_are_those_of_the_predictive_distribution():
    model = tiny_llada()
    sequence = encode(model, FACTS[0])
    found = token_scores(model, [sequence], states="onestep", moments=True)[0]
    ids = sequence.masked(model.mask_id)[None]
    log_p = model.logits(ids, sequence.canvas[None])[0].double().log_softmax(-1)[sequence.canvas]
    mean = (log_p.exp() * log_p).sum(1)
    std = ((log_p.exp() * log_p.square()).sum(1) - mean.square()).sqrt()
    assert found.mean == pytest.approx(mean.tolist(), abs=1e-5)
    assert found.std == pytest.approx(std.tolist(), abs=1e-4)


def test_tail_says_from_where_on_everything_comes_by_itself():
    model = planted()
    fact = tiny_facts(1)[0]
    right, wrong_end = fact, replace(fact, object=fact.object.split()[0] + " king " + fact.object.split()[2])
    # A chain needs the token before it, so with more than one token hidden only the first of them comes.
    assert token_scores(model, [encode(model, right)])[0].tail == [0, 0, 1]
    assert token_scores(model, [encode(model, right)])[0].hit == [1, 1, 1]
    assert token_scores(model, [encode(model, wrong_end)])[0].hit == [1, 0, 0]


@pytest.mark.parametrize("length", [1, 3, 8, 30])
def test_folds_hide_each_token_once(length):
    hidden = hidden_in("folds", length)
    assert len(hidden) == min(8, length)
    assert (hidden.sum(0) == 1).all()
    assert hidden.any(1).all()


def test_only_what_is_hidden_is_read_and_batching_does_not_matter():
    model = tiny_llada()
    sequences = [encode(model, f) for f in (FACTS[0], replace(FACTS[1], object="king river"))]
    hidden = [torch.tensor([[True, False, True]]), hidden_in("pll", 2)]
    one, many = (read_states(model, sequences, hidden, batch_size=n) for n in (1, 64))
    for a, b, h in zip(one, many, hidden, strict=True):
        assert torch.allclose(a.log_prob, b.log_prob, atol=1e-5)
        assert (a.log_prob[~h] == 0).all()
        assert (a.log_prob[h] < 0).all()


def test_logits_that_are_not_finite_are_refused():
    model = tiny_llada()
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        token_scores(model, [encode(model, FACTS[0])])


def test_answers_are_json(tmp_path):
    everything(Respondent(tiny_llada(), cache=tmp_path))
    (file,) = tmp_path.iterdir()
    assert all(set(json.loads(line)) == {"key", "answers"} for line in file.read_text().splitlines())

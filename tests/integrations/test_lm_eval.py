"""The model that lm-evaluation-harness is given: the library's own numbers and texts, with an edit during requests."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import timerome as tr
from tests.lightning.loops import count_hooks, gated_memory
from tests.tiny import tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import encode
from timerome.integrations import lm_eval as ours
from timerome.integrations.lm_eval import HarnessLM


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def requests(*arguments: Any) -> list[Any]:
    """Stand-ins for the harness's instances."""
    return [SimpleNamespace(args=a if isinstance(a, tuple) else (a,)) for a in arguments]


def pairs(n: int = 4) -> list[tuple[str, str]]:
    return [(fact.prompt, " " + fact.object) for fact in tiny_facts(n)]


def test_likelihoods_are_the_librarys(backbone: tr.Backbone) -> None:
    found = HarnessLM(backbone, samples=8, sampler=tr.SamplerConfig(seed=3)).loglikelihood(requests(*pairs()))
    wanted = tr.log_likelihood(backbone, [encode(backbone, f) for f in tiny_facts(4)], samples=8, seed=3).log_prob
    assert [log_prob for log_prob, _ in found] == wanted.tolist()
    assert HarnessLM(backbone).loglikelihood([]) == []


def test_greedy_is_what_is_decoded(backbone: tr.Backbone) -> None:
    prompts = [fact.prompt for fact in tiny_facts(4)]
    texts = tr.generate(backbone, prompts, canvas=3, config=tr.SamplerConfig(steps=3))
    right = [(p, " " + t) for p, t in zip(prompts, texts, strict=True) if len(backbone.encode(t)) == 3]
    wrong = [(p, " ".join(["", *reversed(t.split())])) for p, t in right if t.split() != t.split()[::-1]]
    assert len(right) >= 2
    assert wrong
    answers = HarnessLM(backbone, samples=1).loglikelihood(requests(*right, *wrong))
    assert [greedy for _, greedy in answers] == [True] * len(right) + [False] * len(wrong)
    unasked = HarnessLM(backbone, samples=1, greedy=False).loglikelihood(requests(*right))
    assert [greedy for _, greedy in unasked] == [False] * len(right)


def test_white_space_goes_to_the_continuation_and_contexts_may_be_empty(backbone: tr.Backbone) -> None:
    model = HarnessLM(backbone, samples=2)
    assert model.loglikelihood(requests(("the capital ", "city"))) == model.loglikelihood(
        requests(("the capital", " city"))
    )
    [(log_prob, _)] = model.loglikelihood(requests(("", "the capital city")))
    assert model.loglikelihood_rolling(requests("the capital city")) == [log_prob]
    with pytest.raises(ValueError, match="at least one token"):
        model.loglikelihood(requests(("the capital", "")))


def test_a_token_across_the_seam(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both together are tokenized otherwise, each is by itself."""
    plain = backbone.encode
    merging = {"the capital city": [70], "the capital": plain("the capital"), "city": plain("city")}
    monkeypatch.setattr(backbone, "encode", lambda text: merging[text.replace("capitalcity", "capital city")])
    sequence = HarnessLM(backbone)._pair("the capital", "city")
    assert sequence.ids.tolist() == [*merging["the capital"], *merging["city"]]
    assert sequence.answer.tolist() == merging["city"]


def test_what_is_too_long_loses_its_beginning(backbone: tr.Backbone) -> None:
    model = HarnessLM(backbone, samples=1)
    long, short = "peru " * 300 + "the capital of", "peru " * 122 + "the capital of"
    assert backbone.max_length == 128
    assert model.loglikelihood(requests((long, " old north king"))) == model.loglikelihood(
        requests((short, " old north king"))
    )
    how = {"max_gen_toks": 3, "until": []}
    assert model.generate_until(requests((long, how))) == model.generate_until(requests((short, how)))
    with pytest.raises(ValueError, match="context of 128 tokens.*129"):
        model.loglikelihood(requests(("a", " old" * 129)))
    with pytest.raises(ValueError, match="max_gen_toks"):
        model.generate_until(requests(("a", {"max_gen_toks": 129})))


@pytest.mark.parametrize("n", [0, 1, 128, 129, 255, 256, 400])
def test_windows_score_every_token_once(backbone: tr.Backbone, n: int) -> None:
    words = [("old", "new", "north", "king", "born")[i * i % 5] for i in range(n)]
    windows = list(HarnessLM(backbone)._windows(" ".join(words)))
    assert [i for w in windows for i in w.answer.tolist()] == backbone.encode(" ".join(words))
    assert all(len(w.ids) <= 128 for w in windows)
    for before, after in zip(windows, windows[1:], strict=False):
        assert after.ids[~after.canvas].tolist() == before.ids[-1:].tolist()
    [total] = HarnessLM(backbone, estimator="onestep").loglikelihood_rolling(requests(" ".join(words)))
    wanted = tr.log_likelihood(backbone, windows, estimator="onestep").log_prob.sum() if n else 0.0
    assert total == pytest.approx(float(wanted))


def test_texts_are_the_librarys_up_to_a_stop(backbone: tr.Backbone) -> None:
    model = HarnessLM(backbone, canvas=5, sampler=tr.SamplerConfig(steps=5))
    prompts = ["the old " * (i % 2) + fact.prompt for i, fact in enumerate(tiny_facts(4))]
    texts = model.generate_until(requests(*[(p, {"until": ["\n"]}) for p in prompts]))
    assert [t.strip() for t in texts] == tr.generate(
        backbone, prompts, canvas=5, config=tr.SamplerConfig(steps=5)
    )  # fmt: skip
    stop = texts[0].split()[1]
    cut = model.generate_until(requests((prompts[0], {"until": ["never", stop]}), (prompts[0], {"until": stop})))
    assert cut == [texts[0].split(stop)[0]] * 2
    [short, *_] = model.generate_until(requests((prompts[0], {"max_gen_toks": 2})))
    assert len(backbone.encode(short)) <= 2


def test_sampling_is_as_the_task_asks(backbone: tr.Backbone) -> None:
    model = HarnessLM(backbone, canvas=4)
    assert model._how({})[1].temperature == 0
    assert model._how({"do_sample": False, "temperature": 0.7})[1].temperature == 0
    assert model._how({"temperature": 0.7, "top_k": 3})[1] == tr.SamplerConfig(temperature=0.7, top_k=3)
    assert model._how({"do_sample": True, "top_p": 0.9})[1] == tr.SamplerConfig(temperature=1.0, top_p=0.9)
    assert model._how({"max_gen_toks": 9})[0] == 9
    with pytest.warns(UserWarning, match="num_beams have no meaning"):
        model.generate_until(requests(("the capital", {"num_beams": 2})))


def test_the_memory_acts_during_requests_alone(backbone: tr.Backbone, tmp_path: Path) -> None:
    memory = gated_memory(backbone)
    memory.save(tmp_path / "edit.safetensors")
    plain, edited = HarnessLM(backbone, samples=4), HarnessLM(backbone, tmp_path / "edit.safetensors", samples=4)
    asked = requests(*[(fact.prompt, " " + fact.object) for fact in tiny_facts(8)])
    digest, before = backbone.state_digest(), plain.loglikelihood(asked)
    after = edited.loglikelihood(asked)
    assert plain.loglikelihood(asked) == before
    assert count_hooks(backbone.model) == 0
    assert backbone.state_digest() == digest
    assert after[0] != before[0]
    assert after[4:] == before[4:]  # what its gate was calibrated on
    assert set(edited.hits) == {"tiny-0"}
    how = {"max_gen_toks": 3}
    with memory.attached(backbone):
        wanted = tr.generate(backbone, [tiny_facts(1)[0].prompt], canvas=3)
    assert [t.strip() for t in edited.generate_until(requests((tiny_facts(1)[0].prompt, how)))] == wanted
    edited.loglikelihood_rolling(requests("the capital city of kenya"))
    with pytest.raises(ValueError, match="context"):
        edited.generate_until(requests(("a", {"max_gen_toks": 999})))
    assert count_hooks(backbone.model) == 0
    assert not plain.hits


def test_it_is_of_the_harnesss_class_where_there_is_a_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    class LM:
        def __init__(self) -> None:
            self.rank = 0

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("timerome.integrations.again", ours.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    model = again.HarnessLM(tiny_llada())
    assert isinstance(model, LM)
    assert model.rank == 0


def test_a_task_of_the_harness_itself(tmp_path: Path) -> None:
    """With the real harness, where it is installed: a task of ours, of likelihoods and of generated text."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm_eval) is not installed")
    from lm_eval.tasks import TaskManager

    backbone = tiny_llada()
    texts = tr.generate(backbone, [f.prompt for f in tiny_facts(4)], canvas=3, config=tr.SamplerConfig(steps=3))
    lines = [
        {"question": fact.prompt, "choices": [" " + text, " old old old"], "answer": 0, "text": text}
        for fact, text in zip(tiny_facts(4), texts, strict=True)
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/facts.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "choose.yaml").write_text(
        "task: choose\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n" + common
    )
    (tmp_path / "say.yaml").write_text(
        "task: say\noutput_type: generate_until\ndoc_to_target: text\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 3, do_sample: false}\n"
        "filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]\n" + common
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    memory = gated_memory(backbone)

    def run(memory: tr.EditMemory | None) -> dict[str, Any]:
        model = HarnessLM(backbone, memory, samples=4, sampler=tr.SamplerConfig(steps=3))
        return lm_eval.simple_evaluate(model, tasks=["choose", "say"], task_manager=manager)["results"]

    torch.manual_seed(0)
    before, after = run(None), run(memory)
    assert before["say"]["exact_match,strip"] == 1.0
    assert after["say"]["exact_match,strip"] == 0.75
    assert before["choose"]["acc,none"] == 1.0

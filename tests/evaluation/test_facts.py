"""Evaluation and comparison, on models small enough to know the right answer."""

import io
import json
import math
import re
from dataclasses import replace

import pytest
import torch

import timerome as tr
from tests.tiny import planted, tiny_facts, tiny_llada
from timerome.diffusion import SamplerConfig, encode, log_likelihood
from timerome.evaluation import WeightsWatch, compare, evaluate
from timerome.evaluation.baselines import prompt_memory
from timerome.progress import Progress

# With one token a step, in order, the planted model writes its chains.
HOW = {"samples": 4, "canvas": 3, "sampler": SamplerConfig(steps=3)}


@pytest.fixture(scope="module")
def backbone():
    return planted()


@pytest.fixture(scope="module")
def memory(backbone):
    found = tr.EditMemory(backbone)
    found.replace(tiny_facts(1), "king")
    found.replace(tiny_facts(2)[1], "old river")
    return found


def test_a_model_that_knows_its_facts_scores_full_marks(backbone):
    found = evaluate(backbone, tiny_facts(3), **HOW)
    assert found.mean("exact") == found.mean("rouge_recall") == found.mean("rouge_f1") == 1.0
    assert found.mean("repetition") == 0.0
    assert found.texts() == [fact.object for fact in tiny_facts(3)]
    assert found.edited_rows == 0


def test_scores_are_the_ones_of_the_likelihood_whatever_the_order_of_work():
    model = tiny_llada()
    facts = tiny_facts(5)
    facts[1] = replace(facts[1], prompt="where is the old capital city of the land named " + facts[1].subject)
    wanted = log_likelihood(model, [encode(model, fact) for fact in facts], samples=4, seed=3)
    found = evaluate(model, facts, samples=4, seed=3, decode=False)
    assert [s.fact_id for s in found.scores] == [fact.id for fact in facts]
    assert [s.log_prob for s in found.scores] == pytest.approx(wanted.log_prob.tolist())
    assert [s.tokens for s in found.scores] == [3] * 5
    assert all(s.text is None and s.exact is None for s in found.scores)
    assert math.isnan(found.mean("exact"))


def test_wordings_are_averaged_within_a_fact_before_facts_are():
    model = tiny_llada()
    many = replace(tiny_facts(2)[0], paraphrases=("where is kenya", "what is kenya", "the land kenya"))
    one = replace(tiny_facts(2)[1], paraphrases=("where is peru",))
    found = evaluate(model, [many, one], wording="paraphrase", samples=2, decode=False)
    values = [s.log_prob for s in found.scores]
    assert len(values) == 4
    assert found.mean("log_prob") == pytest.approx((sum(values[:3]) / 3 + values[3]) / 2)
    assert found.summary()["log_prob"]["n"] == 2


def test_the_same_model_compared_with_itself_has_not_changed(backbone):
    before, after = (evaluate(backbone, tiny_facts(3), **HOW) for _ in range(2))
    found = compare(before, after)
    assert (found.mean, found.lowest, found.highest, found.unchanged) == (0.0, 0.0, 0.0, 1.0)


def test_an_edit_shows_as_paired_differences(backbone, memory):
    before = evaluate(backbone, tiny_facts(3), **HOW)
    after = evaluate(backbone, tiny_facts(3), memory=memory, **HOW)
    found = compare(before, after)
    deltas = [a.log_prob - b.log_prob for a, b in zip(after.scores, before.scores, strict=True)]
    assert list(found.deltas.values()) == pytest.approx(deltas)
    assert found.mean == pytest.approx(sum(deltas) / 3)
    assert (found.lowest, found.highest) == (min(deltas), max(deltas))
    assert deltas[0] < -1
    assert after.edited_rows > 0
    assert "2 edits" in after.memory
    assert found.unchanged == pytest.approx(1 / 3)


def test_the_memory_is_gone_afterwards_also_after_an_error(backbone, memory):
    clean = evaluate(backbone, tiny_facts(2), **HOW)
    evaluate(backbone, tiny_facts(2), memory=memory, **HOW)
    with pytest.raises(ValueError, match="samples"):
        evaluate(backbone, tiny_facts(2), memory=memory, samples=0)
    assert evaluate(backbone, tiny_facts(2), **HOW) == clean


def test_the_new_answer_is_the_one_the_memory_says(backbone, memory):
    asked = [replace(f, id=f.id, new_object="somewhere else") for f in tiny_facts(3)]
    before, after = evaluate(backbone, asked, **HOW), evaluate(backbone, asked, memory=memory, **HOW)
    assert [s.edit for s in after.scores] == ["tiny-0", "tiny-1", None]
    # The third is no edit's, so that its own new object is looked for.
    assert [s.exact_new for s in after.scores] == [1.0, 1.0, 0.0]
    assert [s.says_old for s in before.scores] == [1.0] * 3
    assert [s.says_old for s in after.scores] == [0.0, 0.0, 1.0]
    assert after.edits == {"tiny-0": True, "tiny-1": True}
    assert set(after.hits) == {"tiny-0", "tiny-1"} and after.edited_rows == sum(after.hits.values())
    found = compare(before, after)
    assert found.locality == 1.0
    assert found.to_dict()["edits"] == {"asked": 2, "silent": []}
    assert compare(before.only(["tiny-0"]), after.only(["tiny-0"])).locality is None


def test_an_edit_that_does_not_act_is_named(backbone):
    memory = tr.EditMemory(backbone)
    memory.replace(tiny_facts(1), "king", threshold=100.0)
    before, after = evaluate(backbone, tiny_facts(1), **HOW), evaluate(backbone, tiny_facts(1), memory=memory, **HOW)
    assert compare(before, after).to_dict()["edits"] == {"asked": 1, "silent": ["tiny-0"]}


def test_facts_are_asked_under_any_condition(backbone):
    told = evaluate(backbone, tiny_facts(1), memory=prompt_memory("the king of peru"), **HOW)
    plain = evaluate(backbone, [replace(f, prompt=f"the king of peru {f.prompt}") for f in tiny_facts(1)], **HOW)
    assert told.scores[0].log_prob == plain.scores[0].log_prob and told.texts() == plain.texts()


def test_a_row_has_the_edits_that_are_selected_for_it(backbone, memory):
    twice = [*tiny_facts(1), replace(tiny_facts(1)[0], id="again")]
    with memory.attached() as run:
        run.select([None, ()])
        found = evaluate(backbone, twice, **HOW)
        assert found.texts() == ["king", twice[1].object]
        assert found.scores[0].log_prob < found.scores[1].log_prob - 1
        run.select([(), None])
        assert evaluate(backbone, twice, **HOW).texts() == [twice[0].object, "king"]


def test_what_changed_is_written_as_a_report(backbone, memory, tmp_path):
    before, after = evaluate(backbone, tiny_facts(3), **HOW), evaluate(backbone, tiny_facts(3), memory=memory, **HOW)
    report = compare(before, after).report()
    report.write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "report.html"}
    moved = next(p for p in report.paired["edited"] if p.metric == "facts.log_prob")
    assert moved.difference == pytest.approx(compare(before, after).mean)
    assert {p.metric for p in report.paired["edited"]} >= {"facts.exact", "facts.says_old"}


def test_exact_match_with_the_new_object(backbone):
    right, wrong = tiny_facts(2)
    facts = [right.with_new_object(right.object.upper()), wrong.with_new_object("king")]
    assert [s.exact_new for s in evaluate(backbone, facts, **HOW).scores] == [1.0, 0.0]


def test_an_answer_that_rouge_cannot_read_has_none(backbone):
    facts = [tiny_facts(1)[0], replace(tiny_facts(2)[1], object="北京")]
    found = evaluate(backbone, facts, **HOW)
    assert [s.rouge_recall for s in found.scores] == [1.0, None]
    assert (found.mean("rouge_recall"), found.mean("exact")) == (1.0, 0.5)


def test_only_keeps_a_part(backbone):
    found = evaluate(backbone, tiny_facts(3), **HOW)
    part = found.only(["tiny-1"])
    assert [s.fact_id for s in part.scores] == ["tiny-1"]
    bare = found.only(["tiny-0", "tiny-1"], text=False)
    assert bare == evaluate(backbone, tiny_facts(2), **HOW, decode=False)


def test_everything_can_be_written_as_json(backbone, memory):
    before = evaluate(backbone, tiny_facts(1), **HOW)
    after = evaluate(backbone, tiny_facts(1), memory=memory, **HOW)
    for values in (before.to_dict(), compare(before, after).to_dict()):
        text = json.dumps(values, allow_nan=False)
        assert "elbo_sum, K = 4, seed 0" in text
    # One fact says nothing about spread.
    assert before.to_dict()["summary"]["log_prob"]["low"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 5}, "different protocols"),
        ({"seed": 1}, "different protocols"),
        ({"decode": False}, "different protocols"),
        ({"facts": 2}, "expected the same facts"),
    ],
)
def test_what_cannot_be_compared_is_refused(backbone, change, message):
    before = evaluate(backbone, tiny_facts(3), **HOW)
    rest = {k: v for k, v in change.items() if k != "facts"}
    after = evaluate(backbone, tiny_facts(change.get("facts", 3)), **HOW | rest)
    with pytest.raises(ValueError, match=message):
        compare(before, after)


def test_bad_arguments(backbone):
    with pytest.raises(ValueError, match="at least one fact"):
        evaluate(backbone, [])
    with pytest.raises(ValueError, match="none of the facts has paraphrases"):
        evaluate(backbone, tiny_facts(1), wording="paraphrase")
    with pytest.raises(ValueError, match="expected wording in"):
        evaluate(backbone, tiny_facts(1), wording="backwards")
    with pytest.raises(ValueError, match="expected one of"):
        evaluate(backbone, tiny_facts(1), decode=False).per_fact("beauty")


# Weights -------------------------------------------------------------------------------------------------------------


def test_backward_passes_are_counted_wherever_they_start():
    model = tiny_llada()
    originals = (torch.autograd.backward, torch.autograd.grad)
    with WeightsWatch(model) as watch:
        assert watch.backward_passes == 0
        x = torch.ones(2, requires_grad=True)
        x.sum().backward()
        assert watch.backward_passes == 1
        torch.autograd.grad(x.sum(), x)
        assert watch.backward_passes == 2
        torch.func.grad(lambda y: y.sum())(torch.ones(2))
        assert watch.backward_passes == 3
    assert (torch.autograd.backward, torch.autograd.grad) == originals
    x.sum().backward()
    assert watch.backward_passes == 3
    assert watch.weights_unchanged


def test_building_and_using_a_memory_takes_none_and_changes_nothing(backbone):
    with WeightsWatch(backbone) as watch:
        memory = tr.EditMemory.build(backbone, tiny_facts(2))
        evaluate(backbone, tiny_facts(2), memory=memory, **HOW)
    assert watch.backward_passes == 0
    assert watch.weights_unchanged


def test_a_changed_weight_or_buffer_is_seen():
    for kind in ("weight", "buffer"):
        model = tiny_llada()
        model.model.register_buffer("extra", torch.zeros(3))
        with WeightsWatch(model) as watch:
            target = model.model.extra if kind == "buffer" else next(model.model.parameters())
            with torch.no_grad():
                target.view(-1)[0] += 1e-3
        assert not watch.weights_unchanged


def test_autograd_is_as_before_also_after_an_error():
    originals = (torch.autograd.backward, torch.autograd.grad)
    watch = WeightsWatch(tiny_llada())
    with pytest.raises(KeyError), watch:
        assert torch.autograd.backward is not originals[0]
        raise KeyError
    assert (torch.autograd.backward, torch.autograd.grad) == originals
    assert watch.weights_unchanged


def test_no_verdict_before_the_end():
    with WeightsWatch(tiny_llada()) as watch, pytest.raises(RuntimeError, match="once the with-block"):
        _ = watch.weights_unchanged


# Progress ------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_lines_with_the_time_left():
    stream = io.StringIO()
    with Progress(stream=stream, interval=0.0).task("work", 3) as step:
        step(1)
        step(2)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("work: 1/3, about ")
    assert first.endswith(" s left")
    assert last.startswith("work: 3/3 in ")


def test_short_tasks_say_nothing_without_a_terminal():
    stream = io.StringIO()
    with Progress(stream=stream).task("work", 1) as step:
        step(1)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(stream=stream).task("work", 2) as step:
        step(2)
    assert "work" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_nothing_is_shown_where_it_is_switched_off():
    stream = Terminal()
    with Progress(enabled=False, stream=stream).task("work", 2) as step:
        step(2)
    assert stream.getvalue() == ""


def test_the_display_ends_with_an_interrupt():
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(stream=stream).task("work", 2):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\n\x1b[?25h")  # a line of its own comes next, and the cursor is back


def test_reports_of_done_and_total_become_tasks():
    stream = io.StringIO()
    with Progress(stream=stream, interval=0.0).reports("trace") as report:
        report(0, 4, "a")
        report(3, 4, "a")
        report(4, 4, "b")
        report(1, 1, "controls")
    lines = [re.sub(r"(, about| in) .*", "", line) for line in stream.getvalue().splitlines()]
    assert lines == ["trace: 0/4", "trace: 3/4", "trace: 4/4", "trace, part 2: 1/1"]


def test_evaluation_reports_progress(backbone):
    stream = io.StringIO()
    evaluate(backbone, tiny_facts(3), **HOW, progress=Progress(stream=stream, interval=0.0), label="before")
    assert [line.partition(" in ")[0] for line in stream.getvalue().splitlines()] == [
        "before: likelihood: 3/3", "before: text: 3/3",
    ]  # fmt: skip

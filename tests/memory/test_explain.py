"""Why an edit acts, or does not: as an object, a table, JSON and a page."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import timerome as tr
from tests.lightning.loops import gated_memory
from tests.tiny import decoded_facts, tiny_dream, tiny_facts, tiny_llada
from timerome.facts import FactError


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module")
def memory(backbone: tr.Backbone) -> tr.EditMemory:
    return gated_memory(backbone, slice(0, 3))


def test_what_it_says_is_what_the_first_step_does(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    for fact in decoded_facts(backbone, 5):
        for canvas in (3, 5, 8):
            found = memory.explain(fact.prompt, canvas=canvas)
            with memory.attached() as run:
                tr.generate(backbone, fact.prompt, canvas=canvas, config=tr.SamplerConfig(steps=1))
            assert set(found.acting) == set(run.hits)
            assert found.edits == 3
            assert [c.id for c in found.candidates] == ([fact.id] if fact.id in ("tiny-0", "tiny-1", "tiny-2") else [])
            for candidate in found.candidates:
                assert len(candidate.places) == canvas
                assert (candidate.how, candidate.by, candidate.id) == ("named", fact.subject, fact.id)
                assert candidate.score == candidate.places[candidate.place]
                assert candidate.acts == (candidate.why == "acts")


def test_in_its_own_question_an_edit_scores_what_it_scored_when_it_was_made(memory: tr.EditMemory) -> None:
    for edit in memory.edits:
        found = memory.explain(edit.fact.prompt, canvas=8)
        own = {w.text: w for w in edit.gate.watches}[found.candidates[0].watched]
        assert max(s for s in found.candidates[0].places if s is not None) == pytest.approx(own.own, abs=1e-4)
        assert found.candidates[0].threshold == own.threshold
        assert found.acting == (edit.id,)


def test_why_not(backbone: tr.Backbone) -> None:
    fact = decoded_facts(backbone, 1)[0]
    memory = tr.EditMemory(backbone)
    memory.replace(fact, "kex", threshold=0.5)  # never
    [candidate] = memory.explain(fact.prompt, canvas=3).candidates
    assert (candidate.acts, candidate.why) == (False, "the model is not about to say it")
    short = memory.explain(fact.prompt, canvas=1).candidates[0]
    assert (short.acts, short.why, short.places) == (False, "the answer does not fit", (None,))
    both = tr.EditMemory(backbone)
    both.replace([fact, replace(fact, id="other", prompt="where is kenya ?")], "kex", threshold=-90.0)
    whys = {c.id: c.why for c in both.explain(fact.prompt, canvas=3).candidates}
    assert sorted(whys.values()) == ["acts", "another edit already answers there"]


def test_nobody_is_named(memory: tr.EditMemory) -> None:
    found = memory.explain("the river of chad")
    assert (found.candidates, found.acting, found.rows()) == ((), (), [])
    assert str(found) == "'the river of chad' names none of the 3 edits in force; none acts."
    with pytest.raises(FactError, match="0 tokens"):
        memory.explain("")
    empty = tr.EditMemory(memory.model)
    assert "none of the 0 edits" in str(empty.explain("the river"))


def test_table_json_and_page(backbone: tr.Backbone) -> None:
    fact = replace(decoded_facts(backbone, 1)[0], id="<b>&x</b>")
    memory = tr.EditMemory(backbone)
    memory.replace(fact, "kex")
    found = memory.explain(fact.prompt, canvas=8)
    head, titles, line = str(found).splitlines()
    assert head == f"{fact.prompt!r}: 1 of 1 edits act"
    assert titles.split() == ["edit", "named", "watched", "for", "score", "threshold"]
    assert line.startswith("<b>&x</b>  named: kenya") and line.endswith("acts")
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["prompt"] == fact.prompt and values["candidates"][0]["id"] == fact.id
    assert set(values) == {"prompt", "edits", "candidates"}
    for page in (found._repr_html_(), memory._repr_html_()):
        assert "&lt;b&gt;&amp;x&lt;/b&gt;" in page and "<b>" not in page


def test_what_does_not_fit_is_json_too(backbone: tr.Backbone) -> None:
    """A score of minus infinity is no JSON."""
    memory = gated_memory(backbone)
    values = memory.explain(tiny_facts(1)[0].prompt, canvas=1).to_dict()
    json.loads(json.dumps(values, allow_nan=False))


def test_it_leaves_the_model_alone(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    """Asked while the memory is attached it says the same, and counts nothing."""
    before, prompt = backbone.state_digest(), tiny_facts(1)[0].prompt
    wanted = memory.explain(prompt)
    with memory.attached() as run:
        assert memory.explain(prompt) == wanted
        assert not run.hits
    assert backbone.state_digest() == before


def test_what_was_taught_is_told_by_its_question(backbone: tr.Backbone) -> None:
    memory = tr.EditMemory(backbone)
    memory.teach(tr.Fact(id="new", prompt="the river of oman is", subject="oman", object="old north king"))
    for prompt in ("the river of oman is", "who is the king of oman ?", "was oman born in the old land ?"):
        [candidate] = memory.explain(prompt, canvas=3).candidates
        with memory.attached() as run:
            said = tr.generate(backbone, prompt, canvas=3, config=tr.SamplerConfig(steps=3))
        assert candidate.acts == (candidate.score > 0) == bool(run.hits) == (said == "old north king")
        assert candidate.why == ("acts" if candidate.acts else "it is another question")
        assert candidate.watched == "its question"
    assert memory.explain("the river of oman is").acting == ("new",)

"""What is reported on was never used to build, protect or choose."""

from dataclasses import fields
from itertools import combinations

import pytest

from timerome.datasets import bundled
from timerome.splits import demo_split, scaling_split

SPLIT = demo_split()
NAMES = [field.name for field in fields(SPLIT)]


@pytest.mark.parametrize(("a", "b"), list(combinations(NAMES, 2)))
def test_no_two_sets_share_a_fact_a_wording_or_an_author(a, b):
    first, second = getattr(SPLIT, a), getattr(SPLIT, b)
    assert not set(first.ids) & set(second.ids)
    texts = [{t for fact in facts for t in (fact.prompt, *fact.paraphrases)} for facts in (first, second)]
    assert not texts[0] & texts[1]
    authors = [{fact.group for fact in facts if fact.group} for facts in (first, second)]
    assert not authors[0] & authors[1]


def test_sizes():
    assert {name: len(getattr(SPLIT, name)) for name in NAMES} == {
        "forget": 40,
        "protect": 80,
        "retain": 277,
        "validation_forget": 40,
        "validation_retain": 40,
        "held_out": 100,
        "held_out_relations": 137,
        "held_out_unknown": 100,
    }


def test_what_the_model_was_never_asked_is_held_out():
    assert SPLIT.held_out_unknown.ids == bundled("unknown").ids[200:300]


def test_every_forget_fact_has_an_unseen_wording():
    assert all(len(fact.paraphrases) == 1 and fact.paraphrases[0] != fact.prompt for fact in SPLIT.forget)


@pytest.mark.parametrize("n", [40, 200, 400])
def test_scaling_sets_are_nested_and_apart_from_what_is_held_out(n):
    split, demo = scaling_split(n), demo_split()
    assert len(split.forget) == n and split.forget[:40] == demo.forget
    assert split.forget == scaling_split(400).forget[:n]
    for others in (split.held_out, split.held_out_relations, demo.validation_forget, demo.validation_retain):
        assert not set(split.forget.ids) & set(others.ids)
        assert not {f.group for f in split.forget if f.group} & {f.group for f in others if f.group}
    assert set(split.reported.ids) <= set(split.forget.ids)
    assert len(split.reported) == min(n, 320)


def test_more_facts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="1 to 400"):
        scaling_split(401)

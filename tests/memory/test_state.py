"""The state of a memory and its changes, without any model: against a list of what was done and not undone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import timerome as tr
from timerome.errors import TimeromeError
from timerome.memory import AnswerGate, Edit, EditConflictError, MemoryMismatchError, MemoryState, Placed, Watch
from timerome.memory.edit_file import digest
from timerome.memory.edits import about, conflict, free_id, in_force
from timerome.memory.naming import plain
from timerome.memory.state import Planned, added, merged, plan, undone

EMPTY = MemoryState("model", "tokenizer")


def fact(subject: str, answer: str = "new", name: str | None = None, **more: str) -> tr.Fact:
    prompt = more.pop("prompt", f"The capital of {subject} is")
    return tr.Fact(id=name or subject, prompt=prompt, subject=subject, object="old", new_object=answer, **more)


def edit(item: Planned) -> Edit:
    says = item.fact.new_object
    gate = AnswerGate((Watch("old", ((3,),), -0.1),), (item.fact.subject,))
    change = Placed(((0,),), torch.full((1, 2), float(len(says or ""))), 1, False)
    return Edit(item.id, item.fact, says, "replace", change, gate, item.supersedes)


def done(state: MemoryState, *facts: tr.Fact, on_conflict: str = "replace") -> MemoryState:
    planned = plan(state, facts, on_conflict)  # type: ignore[arg-type]
    return added(state, [edit(item) for item in planned if not item.kept])


def said(state: MemoryState) -> dict[str, str | None]:
    return {e.id: e.says for e in state.edits}


# Conflicts -------------------------------------------------------------------------------------------------------


def test_conflicts_are_of_subject_and_relation_or_prompt() -> None:
    peru = fact("Peru", relation="capital")
    assert conflict(peru, fact("PERU", prompt="Of PERU the seat is", relation=" Capital"))
    assert conflict(peru, fact("Perú", prompt="the  capital of Perú is"))
    assert not conflict(peru, fact("Peru", prompt="The river of Peru is", relation="river"))
    assert not conflict(peru, fact("Chad", relation="capital"))
    # The prompt stands for a relation that one of them does not name.
    assert not conflict(peru, fact("Peru", prompt="Peru's capital is"))


topics = st.builds(
    fact, st.sampled_from(["Peru", "peru", "Chad"]), relation=st.sampled_from(["a", "A", "b"]) | st.none(),
    prompt=st.sampled_from(["Peru, peru, Chad: x", "PERU, Peru, peru,  Chad: X", "Peru, peru and Chad"]),
)  # fmt: skip


@given(topics, topics)
def test_what_facts_are_about_says_whether_they_conflict(a: tr.Fact, b: tr.Fact) -> None:
    same = plain(a.subject) == plain(b.subject)
    relation = None not in (a.relation, b.relation) and plain(a.relation) == plain(b.relation)
    assert conflict(a, b) == conflict(b, a) == (same and (relation or plain(a.prompt) == plain(b.prompt)))
    assert conflict(a, a) and about(a)


def test_every_door_refuses_two_of_one_kind() -> None:
    twins = [fact("Peru", "Lima"), fact("Peru", "Cusco", name="two")]
    for mode in ("error", "replace", "keep"):
        with pytest.raises(EditConflictError, match="1 of 2 facts.*'two' with 'Peru'.*Nothing was changed") as caught:
            plan(EMPTY, twins, mode)  # type: ignore[arg-type]
        assert caught.value.conflicts == [("two", ("Peru",))]
    one = done(EMPTY, twins[0])
    with pytest.raises(EditConflictError, match="'two' with 'Peru'"):
        plan(one, twins[1:], "error")
    with pytest.raises(EditConflictError):
        merged(one, done(EMPTY, twins[1]), "error")
    with pytest.raises(TimeromeError, match="expected on_conflict in"):
        plan(one, twins[1:], "newest")  # type: ignore[arg-type]


def test_the_last_one_says_whatever_is_undone() -> None:
    """F11: Moscow, then Lagos, then Cairo; whichever of them are undone, one is in force, the last that is left."""
    full = EMPTY
    for answer in ("Moscow", "Lagos", "Cairo"):
        full = done(full, fact("Peru", answer))
    names = [e.id for e in full.history]
    assert names == ["Peru", "Peru.2", "Peru.3"]
    for n in range(4):
        for gone in itertools.permutations(names, n):
            state = full
            for name in gone:
                state = undone(state, [name])
            left = [e.says for e in full.history if e.id not in gone]
            assert [e.says for e in state.edits] == left[-1:]
            assert state.gone == gone
            assert said(undone(full, gone)) == said(state)


def test_kept_ids_are_those_in_force() -> None:
    state = done(EMPTY, fact("Peru", "Lima"), fact("Chad", "Doba"))
    planned = plan(state, [fact("Peru", "Cusco"), fact("Mali", "Kayes")], "keep")
    assert planned == [Planned(fact("Peru", "Cusco"), "Peru", kept=True), Planned(fact("Mali", "Kayes"), "Mali")]
    assert added(state, [edit(planned[1])]).history[:2] == state.history


def test_ids_are_never_given_twice() -> None:
    state = done(EMPTY, fact("Peru"))
    for n in range(2, 5):
        state = done(undone(state, [e.id for e in state.edits]), fact("Peru"))
        assert [e.id for e in state.edits] == [f"Peru.{n}"]
    assert state.gone == ("Peru", "Peru.2", "Peru.3")
    assert free_id("Peru", {"Peru", "Peru.2", "Peru.4"}) == "Peru.3"


def test_what_is_not_there_cannot_be_undone() -> None:
    state = undone(done(EMPTY, fact("Peru"), fact("Chad")), ["Chad"])
    for name in ("Chad", "nobody"):
        with pytest.raises(KeyError, match=f"no edit '{name}'.*Peru.*Nothing was changed"):
            undone(state, ["Peru", name])
    assert undone(state, ["Peru", "Peru"]).gone == ("Chad", "Peru")


def test_gated_and_other_edits_are_not_mixed() -> None:
    state = done(EMPTY, fact("Peru"))
    with pytest.raises(TimeromeError, match="make two and attach both"):
        added(state, [replace(edit(Planned(fact("Chad"), "Chad")), gate=None)])


def test_a_state_is_a_value() -> None:
    state = done(EMPTY, fact("Peru"))
    before = digest(state)
    done(state, fact("Peru", "other")), undone(state, ["Peru"])
    assert digest(state) == before
    assert EMPTY.history == ()
    with pytest.raises(AttributeError):
        state.gone = ("x",)  # type: ignore[misc]


# Merging ---------------------------------------------------------------------------------------------------------


def test_merged_is_both() -> None:
    one, other = done(EMPTY, fact("Peru"), fact("Chad")), done(EMPTY, fact("Mali"), fact("Chad"))
    both, taken = merged(one, other, "error")
    assert [e.id for e in taken] == ["Mali"]
    assert digest(both) == digest(done(EMPTY, fact("Peru"), fact("Chad"), fact("Mali")))
    assert merged(both, other, "error") == (both, ())
    assert digest(replace(undone(both, ["Mali"]), gone=())) == digest(one)


def test_merging_settles_conflicts_as_changes_do() -> None:
    one, other = done(EMPTY, fact("Peru", "Lima")), done(EMPTY, fact("Peru", "Cusco"))
    with pytest.raises(EditConflictError):
        merged(one, other, "error")
    assert merged(one, other, "keep") == (one, ())
    both, _ = merged(one, other, "replace")
    assert said(both) == {"Peru.2": "Cusco"}
    assert said(undone(both, ["Peru.2"])) == {"Peru": "Lima"}
    only, _ = merged(EMPTY, done(one, fact("Peru", "Cusco")), "error")  # what is superseded stays behind
    assert [e.says for e in only.history] == ["Cusco"]
    assert said(undone(only, [e.id for e in only.edits])) == {}


@pytest.mark.parametrize("what", ["fingerprint", "tokenizer"])
def test_memories_of_other_models_are_not_merged(what: str) -> None:
    one = done(EMPTY, fact("Peru"))
    with pytest.raises(MemoryMismatchError, match="Nothing was changed"):
        merged(one, replace(done(EMPTY, fact("Chad")), **{what: "another"}), "error")


# At random -------------------------------------------------------------------------------------------------------

Step = tuple[str, list[int], str, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["change", "change", "undo", "merge"]), st.lists(st.integers(0, 3), min_size=1, max_size=3),
        st.sampled_from(["error", "replace", "replace", "keep"]), st.integers(0, 9),
    ), max_size=12,
)  # fmt: skip
SUBJECTS = ["Peru", "Chad", "Mali", "Fiji"]


@settings(max_examples=200, deadline=None)
@given(steps)
def test_what_is_in_force_is_the_last_of_its_kind_that_was_not_undone(drawn: list[Step]) -> None:
    state = EMPTY
    kept: list[tuple[str, str, str | None]] = []
    ever: set[str] = set()
    for what, numbers, mode, n in drawn:
        if what == "undo":
            gone = {kept[i % len(kept)][0] for i in numbers} if kept else set()
            state = undone(state, gone)
            kept = [k for k in kept if k[0] not in gone]
        else:
            facts = [fact(SUBJECTS[i], f"{n} of {i}") for i in numbers]
            present = {k[1] for k in kept}
            try:
                if what == "merge":
                    facts = list({f.subject: f for f in facts}.values())
                    after, _ = merged(state, done(EMPTY, *facts), mode)  # type: ignore[arg-type]
                else:
                    after = done(state, *facts, on_conflict=mode)
            except EditConflictError:
                # Of what both have, with the same id, merging says nothing.
                assert len(set(numbers)) < len(numbers) or (mode == "error" and {f.subject for f in facts} & present)
                continue
            fresh = after.history[len(state.history) :]
            assert not {e.id for e in fresh} & ever
            kept += [(e.id, e.fact.subject, e.says) for e in fresh]
            ever |= {e.id for e in fresh}
            if mode == "keep":
                assert not {e.fact.subject for e in fresh} & present
            elif what == "change":
                assert len(fresh) == len(facts)
            state = after
        last = {subject: (name, says) for name, subject, says in kept}
        assert said(state) == dict(last.values())
        assert [e.id for e in state.history] == [k[0] for k in kept]
        assert set(state.gone) == ever - {k[0] for k in kept}
        assert state.edits == in_force(state.history)


@settings(max_examples=60, deadline=None)
@given(st.permutations(SUBJECTS), st.sets(st.sampled_from(SUBJECTS)), st.randoms(use_true_random=False))
def test_undone_in_any_order_is_never_having_been(order: list[str], gone: set[str], drawn) -> None:
    state = done(EMPTY, *map(fact, order))
    shuffled = sorted(gone)
    drawn.shuffle(shuffled)
    for name in shuffled:
        state = undone(state, [name])
    never = done(EMPTY, *(fact(name) for name in order if name not in gone))
    assert digest(replace(state, gone=())) == digest(never)
    assert (digest(state) == digest(never)) == (not gone)

"""Operations drawn at random: at all times a memory is what would have been built from the edits that are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor

import timerome as tr
from tests.tiny import MASK, tiny_facts, tiny_llada
from timerome.facts import FactError
from timerome.functional.solve import null_space_of
from timerome.memory import Attachment, Edit, EditConflictError, Ledger
from timerome.memory.background import Background
from timerome.memory.edit import Spared

BACKBONE = tiny_llada(layers=2)
BANK = tr.BankConfig(canvases=(None,), reveal=(0.0, 0.5))
AWAY = tr.FactSet(tiny_facts(8)[4:])

# Two relations each of two subjects; "seat" and "town" name one relation in two wordings, "tiny" names none.
POOL = [
    tr.Fact(id=f"{name}-{subject}", prompt=prompt.format(subject), subject=subject, object=answer, relation=relation)
    for subject in ("kenya", "peru")
    for name, prompt, answer, relation in (
        ("tiny", "the capital city of {}", "old king", None),
        ("town", "where is the capital of {}", "old king", "capital"),
        ("seat", "the city of {} ?", "old king", "Capital "),
        ("river", "the river of {}", "new north", "river"),
    )
]
TOO_LONG = tr.Fact(id="long", prompt="cuba " * 127, subject="cuba", object="old king")
ANSWERS = ("born", "old north king", "kex key")
STATES = torch.stack(
    [torch.tensor((BACKBONE.encode(f.prompt) + [MASK] * 9)[:9]) for f in (*POOL, *AWAY)]  # one length, so one batch
)

KINDS = {
    "paper": {},
    "protected": {"protect": AWAY[2:], "gate": tr.Gate(AWAY, address=False, token=True, layer=1)},
    "addressed": {"protect": AWAY[2:], "gate": tr.Gate(AWAY, layer=1)},
    "addressed, shared": {"protect": AWAY[2:], "gate": tr.Gate(AWAY, layer=1), "shared": True},
    "null space": {"protect": AWAY[2:], "null_space": 0.9},
}


def built(kind: str, fact: tr.Fact) -> tr.EditMemory:
    more = {"coordinate": tr.Coordinate(0), "bank": BANK, "rank": 3, **KINDS[kind]}
    return tr.EditMemory.build(BACKBONE, [fact], **more)


def empty_like(memory: tr.EditMemory) -> tr.EditMemory:
    about = {"fingerprint": memory.fingerprint, "tokenizer": memory.tokenizer}
    return tr.EditMemory(memory.settings, background=Background(memory.background.gate, memory.protect, BANK), **about)


@cache
def reference(kind: str) -> tr.EditMemory:
    """A memory of its own, which never holds more than one edit."""
    return empty_like(built(kind, POOL[0]))


@cache
def alone(kind: str, operation: str, fact: tr.Fact) -> Edit:
    """The edit of a fact in a memory that knows of no other."""
    memory = reference(kind)
    assert not memory.history
    answer = {"answer": fact.new_object} if operation == "forget" else {}
    [name] = getattr(memory, operation)(fact, backbone=BACKBONE, **answer)
    [edit] = memory.edits
    memory.undo(name, spare=False)
    memory.retired = ()
    return edit


def logits(memory: tr.EditMemory | tr.memory.Attachment, select: list[list[str] | None] | None = None) -> Tensor:
    if isinstance(memory, tr.EditMemory):
        attachment = memory.attached(BACKBONE)
        attachment.select(select)
    else:
        attachment = memory
    with attachment, torch.inference_mode():
        return BACKBONE.logits(STATES)


def response(system: tr.memory.systems.System, h: Tensor) -> Tensor:
    """What a system adds to rows, from what it holds."""
    mean, keys, coef, values = (t.double() for t in system.solved[:4])
    return (h - mean) @ keys.T @ coef @ values


def refit(memory: tr.EditMemory, place: object, edits: list[Edit], h: Tensor) -> Tensor:
    """The same from the design's formula, all keys at once, in float64."""
    parts = [p for e in edits for p in e.parts if tr.memory.settings.Place.of(p.coordinate) == place]
    K, D = (torch.cat([getattr(p, name) for p in parts]).double() for name in ("keys", "targets"))
    frame = memory.background.frames.get(place)  # type: ignore[call-overload]
    own = edits[0].settings
    mean = K.mean(0) if frame is None and own.shared else torch.zeros(1) if frame is None else frame.mean.double()
    K = K - mean
    if own.null_space is not None:
        held = frame.protect.double() - mean
        free = null_space_of(held, own.null_space)
        A = K @ free @ K.T + own.ridge * (held @ free).square().sum(1).mean() * torch.eye(len(K), dtype=torch.float64)
        return (h - mean) @ free @ K.T @ torch.linalg.inv(A) @ D
    if frame is not None and frame.protect is not None:
        K = torch.cat([K, own.beta**0.5 * (frame.protect.double() - mean)])
    scale = K.square().sum(1).mean() if frame is None or not own.shared else frame.scale
    A = torch.linalg.inv(K @ K.T + own.ridge * scale * torch.eye(len(K), dtype=torch.float64))
    return ((h - mean) @ K.T @ A)[:, : len(D)] @ D


@dataclass(frozen=True)
class Known:
    """What the test remembers of an edit."""

    id: str
    fact: tr.Fact
    operation: str
    supersedes: tuple[str, ...] = ()


def about_the_same(a: tr.Fact, b: tr.Fact) -> bool:
    one_relation = a.relation and b.relation and a.relation.strip().lower() == b.relation.strip().lower()
    return a.id == b.id or (a.subject == b.subject and bool(one_relation or a.prompt == b.prompt))


class Machine(RuleBasedStateMachine):
    """The memory, beside a list of what was done to it and not undone."""

    kind = "paper"
    names = Bundle("names")

    @initialize(fact=st.sampled_from(POOL), target=names)
    def build(self, fact: tr.Fact) -> str:
        self.memory = built(self.kind, fact)
        self.attachment = self.memory.attached(BACKBONE)
        self.known = [Known(fact.id, fact, "forget")]
        self.retired: set[str] = set()
        self.spared: list[Known] = []
        self.selected: list[list[str] | None] | None = None
        return fact.id

    # What should be there --------------------------------------------------------------------------------------------

    def in_force(self) -> list[Known]:
        hidden = {name for known in self.known for name in known.supersedes}
        return [known for known in self.known if known.id not in hidden]

    def settled(self, operation: str, facts: list[tr.Fact], mode: str) -> tuple[list[Known], list[str]] | None:
        """The edits a batch adds, and the id in force for each of its facts; None where it is refused."""
        there, added, ids = self.in_force(), [], []
        used = self.retired | {known.id for known in self.known}
        for fact in facts:
            against = [known for known in there if about_the_same(fact, known.fact)]
            if against and mode == "error":
                return None
            if against and mode == "keep":
                ids.append(against[-1].id)
                continue
            name = next(n for n in (fact.id, *(f"{fact.id}.{i}" for i in range(2, 99))) if n not in used)
            new = Known(name, fact, operation, tuple(known.id for known in against))
            used.add(name)
            there = [known for known in there if known not in against] + [new]
            added.append(new)
            ids.append(name)
        return added, ids

    def becomes(self, known: list[Known], spare: bool = True) -> None:
        """Take a change over; questions of undone edits are spared until an edit is about them again."""
        before, gone = {k.id for k in self.in_force()}, [k for k in self.known if k not in known]
        self.known = known
        there = self.in_force()
        fresh = [k for k in there if k.id not in before]
        self.spared = [s for s in self.spared if not any(about_the_same(s.fact, k.fact) for k in fresh)]
        if spare and "addressed" in self.kind:
            self.spared += [s for s in gone if not any(about_the_same(s.fact, k.fact) for k in there)]

    # Operations ------------------------------------------------------------------------------------------------------

    @rule(
        operation=st.sampled_from(["insert", "update", "forget"]),
        facts=st.lists(st.sampled_from(POOL), min_size=1, max_size=3),
        answer=st.sampled_from([None, *ANSWERS]),
        mode=st.sampled_from(["error", "replace", "replace", "keep"]),
        fault=st.sampled_from([None, None, None, "too long", "interrupted", "ledger", "attachment"]),
        at=st.integers(0, 8),
    )
    def change(
        self, operation: str, facts: list[tr.Fact], answer: str | None, mode: str, fault: str | None, at: int
    ) -> None:
        answer = ANSWERS[0] if answer is None and operation == "update" else answer
        wanted = [fact.with_new_object(answer) for fact in facts]
        settled = self.settled(operation, wanted, mode)

        def run(batch: list[tr.Fact]) -> tuple[str, ...]:
            extra = {"answer": answer} if operation == "forget" else {}
            return getattr(self.memory, operation)(batch, on_conflict=mode, **extra)

        if settled is None:
            with self.nothing_changes(), pytest.raises(EditConflictError, match="Nothing was changed"):
                run(wanted)
            return
        added, ids = settled
        if fault == "too long":
            with self.nothing_changes(), pytest.raises((FactError, ValueError), match="context of 128"):
                run([*wanted, TOO_LONG.with_new_object(answer)])
        elif fault and added:
            with self.nothing_changes():
                self.failing(fault, at % len(added), lambda: run(wanted))
        else:
            assert run(wanted) == tuple(ids)
            # An insert without an answer states the present one.
            stated = [replace(k, fact=k.fact.with_new_object(k.fact.object)) for k in added] if (
                operation == "insert" and answer is None
            ) else added  # fmt: skip
            self.becomes(self.known + stated)

    def failing(self, fault: str, at: int, run: object) -> None:
        """Run a change that something outside brings to a fall."""
        if fault == "interrupted" and at == 0:  # while it reads the model
            with patch.object(BACKBONE, "forward", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                run()
        elif fault == "interrupted":  # while it puts one edit after another together
            original, calls = Background.token_scores, iter(range(99))

            def token_scores(*args: object) -> Tensor | None:
                if next(calls) == at:
                    raise KeyboardInterrupt
                return original(*args)

            with patch.object(Background, "token_scores", token_scores), pytest.raises(KeyboardInterrupt):
                run()
        elif fault == "ledger":
            with TemporaryDirectory() as folder:
                self.memory.ledger = Ledger(folder + "/ledger.jsonl")
                with patch("os.fsync", side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
                    run()
                assert Ledger(folder + "/ledger.jsonl").entries == self.memory.ledger.entries == []
                self.memory.ledger = None
        else:  # while what is attached takes the change over
            original, calls = Attachment.refresh, iter(range(99))

            def refresh(attachment: Attachment) -> None:
                original(attachment)
                if next(calls) == 0:
                    raise MemoryError

            with patch.object(Attachment, "refresh", refresh), pytest.raises(MemoryError):
                run()

    @rule(
        data=st.data(), fault=st.sampled_from([None, None, "unknown", "ledger", "attachment"]),
        spare=st.sampled_from([True, True, False]),
    )  # fmt: skip
    def undo(self, data: st.DataObject, fault: str | None, spare: bool) -> None:
        names = [known.id for known in self.known]
        if not names:
            return
        gone = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        if fault == "unknown":
            with self.nothing_changes(), pytest.raises(KeyError, match="Nothing was changed"):
                self.memory.undo(*gone, "nobody")
        elif fault:
            with self.nothing_changes():
                self.failing(fault, 0, lambda: self.memory.undo(*gone))
        else:
            self.memory.undo(*gone, spare=spare)
            self.becomes([known for known in self.known if known.id not in gone], spare)
            self.retired |= set(gone)

    @rule(fact=st.sampled_from(POOL), answer=st.sampled_from(ANSWERS), mode=st.sampled_from(["replace", "keep"]))
    def merge(self, fact: tr.Fact, answer: str, mode: str) -> None:
        fact = fact.with_new_object(answer)
        other = tr.EditMemory(
            self.memory.settings, [alone(self.kind, "update", fact)], background=reference(self.kind).background,
            fingerprint=self.memory.fingerprint, tokenizer=self.memory.tokenizer,
        )  # fmt: skip
        there = [k for k in self.known if k.id == fact.id and k.id in {known.id for known in self.in_force()}]
        same = any(k.fact == fact for k in there)
        added, _ = ([], []) if same else self.settled("update", [fact], mode) or ([], [])
        assert self.memory.merge(other, on_conflict=mode) == tuple(known.id for known in added)  # type: ignore[arg-type]
        self.becomes(self.known + added)

    @rule()
    def save_and_load(self) -> None:
        with TemporaryDirectory() as folder:
            self.memory.save(Path(folder) / "edit.safetensors")
            self.memory = tr.EditMemory.load(Path(folder) / "edit.safetensors", BACKBONE)
        self.attachment, self.selected = self.memory.attached(BACKBONE), None

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        names = st.lists(st.sampled_from([known.id for known in self.in_force()] or ["-"]), max_size=2)
        self.selected = data.draw(
            st.none() | st.lists(st.none() | names, min_size=len(STATES), max_size=len(STATES))
        ) if self.in_force() else None  # fmt: skip
        self.attachment.select(self.selected)

    # What must hold --------------------------------------------------------------------------------------------------

    def nothing_changes(self) -> patch:
        machine = self

        class Unchanged:
            def __enter__(self) -> None:
                memory = machine.memory
                self.before = memory.history, memory.retired, memory.spared, logits(machine.attachment)

            def __exit__(self, kind: object, *_: object) -> None:
                if kind is None:
                    history, retired, spared, seen = self.before
                    assert machine.memory.history == history
                    assert machine.memory.retired == retired
                    assert machine.memory.spared == spared
                    assert torch.equal(logits(machine.attachment), seen)

        return Unchanged()  # type: ignore[return-value]

    @invariant()
    def equals_a_refit(self) -> None:
        memory, left = self.memory, self.in_force()
        assert [edit.id for edit in memory.history] == [known.id for known in self.known]
        assert [edit.id for edit in memory.edits] == [known.id for known in left]
        assert set(memory.retired) == self.retired
        assert [one.id for one in memory.spared] == [known.id for known in self.spared]
        assert [edit.fact for edit in memory.edits] == [known.fact for known in left]
        edits = [replace(alone(self.kind, known.operation, known.fact), id=known.id) for known in left]
        undone = [replace(alone(self.kind, known.operation, known.fact), id=known.id) for known in self.spared]
        fresh = tr.EditMemory(
            memory.settings, edits, background=reference(self.kind).background, spared=map(Spared.of, undone),
            fingerprint=memory.fingerprint, tokenizer=memory.tokenizer,
        )  # fmt: skip
        # The gates.
        assert (memory.book is None) == (fresh.book is None)
        if memory.book is not None and fresh.book is not None:
            torch.testing.assert_close(memory.book.vectors, fresh.book.vectors, rtol=1e-5, atol=1e-5)
            assert torch.equal(memory.book.owner, fresh.book.owner)
            assert memory.book.subjects == fresh.book.subjects
            assert memory.book.threshold == pytest.approx(fresh.book.threshold, abs=1e-5)
        assert memory.token_threshold == pytest.approx(fresh.token_threshold, abs=1e-5)
        # The systems.
        h = torch.randn(5, BACKBONE.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for system in memory.systems:
            owners = [edits[i] for i in dict.fromkeys(system.owner.tolist())]
            wanted = refit(reference(self.kind), system.place, owners, h)
            found, largest = response(system, h), float(wanted.abs().max())
            twin = next(s for s in fresh.systems if (s.place, s.owner[0]) == (system.place, system.owner[0]))
            torch.testing.assert_close(found, response(twin, h), rtol=1e-5, atol=1e-5 * largest)
            # Nothing protected, nothing to centre on: nearly parallel keys cancel in the float32 of what is applied.
            error = 2e-3 if self.kind == "paper" else 1e-5
            torch.testing.assert_close(found, wanted, rtol=error, atol=error * largest)
        # What the model says.
        select = self.selected and [
            names if names is None else [n for n in names if n in {known.id for known in left}]
            for names in self.selected
        ]
        torch.testing.assert_close(logits(self.attachment), logits(fresh, select), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", ["cholesky_append", "cholesky_delete", "ridge_cholesky"])
def test_interrupted_while_systems_are_solved(broken: str) -> None:
    """What is attached takes a change over within the transaction; the factor is brought up to date or left alone."""
    memory = built("addressed, shared", POOL[0])
    attachment = memory.attached(BACKBONE)
    memory.forget(POOL[4], rank=1)
    before = logits(attachment)
    change = {
        "cholesky_append": lambda: memory.forget(POOL[3]),
        "cholesky_delete": lambda: memory.undo(POOL[0].id),
        "ridge_cholesky": lambda: memory.forget([POOL[3], *POOL[5:]], on_conflict="replace"),
    }[broken]
    original, calls = getattr(tr.memory.systems, broken), iter(range(99))

    def interrupted(*args: object, **more: object) -> object:
        if next(calls) == (broken != "ridge_cholesky"):  # in the middle of its rows
            raise KeyboardInterrupt
        return original(*args, **more)

    with patch.object(tr.memory.systems, broken, interrupted), pytest.raises(KeyboardInterrupt):
        change()
    assert torch.equal(logits(attachment), before)
    change()
    fresh = tr.EditMemory(
        memory.settings, memory.history, background=memory.background, fingerprint=memory.fingerprint,
        tokenizer=memory.tokenizer,
    )  # fmt: skip
    torch.testing.assert_close(logits(attachment), logits(fresh), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(attachment), before)


@pytest.mark.parametrize("kind", ["addressed", "addressed, shared"])
def test_the_id_of_an_edit_that_failed_may_be_given_to_another(kind: str) -> None:
    """Systems that were solved within the failed change are not taken for those of the next."""
    memory, fact = built(kind, POOL[0]), POOL[4]
    attachment = memory.attached(BACKBONE)
    memory.undo(POOL[0].id)
    with patch.object(Ledger, "record", side_effect=OSError), pytest.raises(OSError):
        memory.ledger = Ledger("never")
        memory.forget(fact, rank=1)
    memory.ledger = None
    memory.forget(fact)
    twin = built(kind, POOL[0])
    twin.undo(POOL[0].id)
    twin.forget(fact)
    assert torch.equal(logits(attachment), logits(twin))


def test_frames_do_not_depend_on_the_bank_of_the_first_edit() -> None:
    """An edit made over another bank leaves no trace in those that come after it."""
    kind, fact = "addressed, shared", POOL[1].with_new_object(ANSWERS[0])
    memory = built(kind, POOL[0])
    with patch.object(Ledger, "record", side_effect=OSError), pytest.raises(OSError):
        memory.ledger = Ledger("never")
        memory.update(fact, bank=tr.BankConfig(canvases=(8,), reveal=(0.0,)))
    memory.ledger = None
    memory.update(fact)
    twin = built(kind, POOL[0])
    twin.update(fact)
    assert torch.equal(logits(memory), logits(twin))


def test_a_merged_memory_brings_what_it_was_solved_in() -> None:
    """Edits at a place that the first memory has none at: their system is centred and protected there as well."""
    kind, fact = "addressed, shared", POOL[5].with_new_object(ANSWERS[0])
    one, other, both = built(kind, POOL[0]), built(kind, POOL[1]), built(kind, POOL[0])
    other.update(fact)
    other.undo(POOL[1].id)
    assert one.merge(other) == both.update(fact)
    assert torch.equal(logits(one), logits(both))


def test_an_edit_that_is_gone_may_still_be_selected() -> None:
    memory = built("paper", POOL[0])
    memory.forget(POOL[4])
    attachment = memory.attached(BACKBONE)
    attachment.select([[POOL[0].id, POOL[4].id]] * len(STATES))
    memory.undo(POOL[4].id)
    assert torch.equal(logits(attachment), logits(built("paper", POOL[0])))


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_operations_equals_a_refit(kind: str) -> None:
    machine = type("Machine", (Machine,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12, stateful_step_count=10, deadline=None,
            phases=[Phase.reuse, Phase.generate],  # shrinking takes minutes, and these are short as they are
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )  # fmt: skip

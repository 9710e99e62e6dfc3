"""Edits by place of the answer, and addresses that also read the subject's name."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import timerome as tr
from tests.tiny import tiny_dream, tiny_facts, tiny_llada
from timerome.memory.address import AddressBook, Gate, Reading, floor_of, related_cosines
from timerome.memory.apply import ByPlace
from timerome.splits import bundled_facts


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream])
def test_each_place_of_the_answer_says_its_token(make):
    backbone = make()
    facts = [f.with_new_object("kex key kez") for f in tiny_facts(1)]
    memory = tr.EditMemory.build(
        backbone, facts, estimator="lens", gate=tr.Gate(tr.FactSet(tiny_facts(8)[4:])), bank=tr.BankConfig((None,))
    )
    assert memory.settings.by_place
    assert memory.edits[0].keys.numel() == 0
    before = backbone.state_digest()
    with memory.attached(backbone) as attachment:
        texts = tr.generate(backbone, [facts[0].prompt], canvas=3, config=tr.SamplerConfig(steps=3))
    assert attachment.hits
    assert texts == ["kex key kez"]
    assert backbone.state_digest() == before


def test_saved_and_loaded_it_is_the_same(tmp_path):
    backbone, facts = tr.load("testbed"), bundled_facts("relations")
    memory = tr.EditMemory.build(
        backbone, facts[:2].with_new_object("Lagos"), estimator="lens", gate=Gate(facts[10:40], related=facts[10:40]),
        bank=tr.BankConfig((None, 8)),
    )  # fmt: skip
    memory.forget(facts[2], bank=tr.BankConfig((None, 8)))  # one with keys beside those without
    memory.save(tmp_path / "edit.safetensors")
    again = tr.EditMemory.load(tmp_path / "edit.safetensors", backbone)
    prompts = [fact.prompt for fact in facts[:6]]
    found = []
    for one in (memory, again):
        with one.attached(backbone):
            found.append(tr.generate(backbone, prompts, canvas=8))
    assert found[0] == found[1]
    assert found[0][:2] == ["Lagos", "Lagos"]
    assert again.background.floor == memory.background.floor
    memory.undo(*[edit.id for edit in memory.edits])
    with memory.attached(backbone):
        assert tr.generate(backbone, prompts, canvas=8) == tr.generate(tr.load("testbed"), prompts, canvas=8)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_each_row_gets_the_lines_of_its_edits_one_after_the_other(data):
    batch, length, d = 3, 6, 4
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))  # 0: nothing at this site
    tables = [torch.randn(n, d, generator=generator) if n else None for n in sizes]
    some = st.lists(st.integers(0, len(sizes) - 1), unique=True).map(tuple)
    chosen = data.draw(st.none() | st.lists(some, min_size=batch, max_size=batch))
    whole = torch.randn(batch, length, d, generator=generator)
    masked = torch.rand(batch, length, generator=generator) < 0.5
    places = torch.randint(-1, length, (batch, length), generator=generator)
    apply = ByPlace(tables)
    for _ in range(3):  # after the first time nothing but the masks changes, and perhaps the precision
        h = whole.to(data.draw(st.sampled_from([torch.float32, torch.half])))
        wanted, kept = h.clone(), h.clone()
        for row in range(batch):
            for i in range(len(sizes)) if chosen is None else chosen[row]:
                for column in masked[row].nonzero().flatten().tolist():
                    if (table := tables[i]) is not None:
                        line = min(max(int(places[row, column]), 0), len(table) - 1)
                        wanted[row, column] += table[line].to(h.dtype)
        assert torch.equal(apply(h, chosen, SimpleNamespace(masked=masked, places=places)), wanted)
        assert torch.equal(h, kept)
        masked = masked & (torch.rand(batch, length, generator=generator) < 0.5)


def test_it_needs_lens_targets_of_its_own_and_no_token_gate():
    backbone, facts = tiny_llada(), tiny_facts(2)
    with pytest.raises(ValueError, match="by_place needs lens targets"):
        tr.EditMemory.build(backbone, facts[:1], by_place=True)
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), token=True)
    replaced = [facts[0].with_new_object("kex")]
    with pytest.raises(ValueError, match="token gate"):
        tr.EditMemory.build(backbone, replaced, estimator="lens", gate=gate, by_place=True)


def test_later_edits_are_made_as_the_first_were_unless_said_otherwise():
    backbone, facts = tiny_llada(), [f.with_new_object("kex") for f in tiny_facts(4)]
    negatives, bank = tr.FactSet(tiny_facts(8)[4:]), tr.BankConfig((None,))
    how = {"estimator": "lens", "bank": bank}
    for first in (True, False):
        memory = tr.EditMemory.build(backbone, facts[:1], gate=tr.Gate(negatives), by_place=first, **how)
        memory.update(facts[1])
        memory.update(facts[2], by_place=not first)
        assert [edit.settings.by_place for edit in memory.edits] == [first, first, not first]
    gated = tr.EditMemory.build(backbone, facts[:1], gate=tr.Gate(negatives, token=True), **how)
    with pytest.raises(ValueError, match="token gate"):
        gated.update(facts[1], by_place=True)
    assert len(gated.edits) == 1


def test_a_name_tells_two_subjects_with_one_answer_apart():
    facts = tr.FactSet(tiny_facts(4))
    vector, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    named, unnamed = frozenset({5, 6, 7}), frozenset({1, 2, 7})
    found = Reading(torch.stack([vector, vector, other]), (named, unnamed, named))

    def book(naming, floor=-1.0):
        gate = Gate(facts, naming=naming, layer=0)
        return AddressBook(gate, torch.zeros(2), floor, vector[None], torch.tensor([0]), (((5, 6),),), 0.6, vector)

    assert book(0.5).lookup(found).tolist() == [0, -1, -1]
    assert book(0.0).lookup(found).tolist() == [0, 0, -1]
    assert book(0.9).lookup(found).tolist() == [0, -1, 0]
    assert book(0.9, floor=0.5).lookup(found).tolist() == [0, -1, -1]  # another question about the subject


def test_the_floor_is_exceeded_at_the_promised_rate():
    cosines = torch.arange(99.0) / 100
    assert round(floor_of(cosines, 0.05), 4) == 0.94  # five of a hundred gaps are above it
    assert floor_of(cosines, 0.01) == -1  # too few to promise it
    assert floor_of(torch.empty(0), 0.5) == -1


def test_related_facts_are_compared_with_others_of_their_subject_or_group():
    backbone = tiny_llada()
    one, two, three = tiny_facts(3)
    facts = [
        tr.Fact(id="a", prompt=one.prompt, subject=one.subject, object="a", paraphrases=(two.prompt,), group="g"),
        tr.Fact(id="b", prompt=three.prompt, subject=three.subject, object="old", group="g"),
        tr.Fact(id="c", prompt=one.prompt, subject=one.subject, object="north"),
    ]
    gate = Gate(tr.FactSet(tiny_facts(8)[4:]), layer=1, related=tr.FactSet(facts))
    mean = torch.zeros(backbone.hidden_size)

    def found(*canvases):
        return related_cosines(backbone, gate, mean, tr.BankConfig(canvases))

    assert len(found(None)) == 2 + 1  # both wordings of a with b, and b with a; c has no other
    short, long, both = found(None), found(6), found(None, 6)
    assert len(both) == 3 and (both >= torch.maximum(short, long) - 1e-6).all()  # a canvas more is no pair more

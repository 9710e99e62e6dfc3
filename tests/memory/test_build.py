"""What EditMemory.build computes, against the same written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.callbacks.loops import count_hooks
from tests.tiny import MASK, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import encode
from timerome.facts import FactError
from timerome.functional.solve import null_space_of
from timerome.hooks import capture
from timerome.memory.bank import activations, positions_of, sequences_of, states_of

BANK = tr.BankConfig(canvases=(None,), reveal=(0.0, 0.5))


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def build(backbone: tr.Backbone, facts: list[tr.Fact] | None = None, **more: object) -> tr.EditMemory:
    given = {"coordinate": tr.Coordinate(1), "bank": BANK, **more}
    return tr.EditMemory.build(backbone, tiny_facts(3) if facts is None else facts, **given)  # type: ignore[arg-type]


def hidden(backbone: tr.Backbone, ids: Tensor, site: tr.Site) -> Tensor:
    with torch.no_grad(), capture(backbone, [site]) as found:
        backbone.forward(ids)
    return found[site].double()


def largest(R: Tensor, q: float) -> Tensor:
    """S_q: the ceil((1 - q) d) largest entries of each row, the others zero."""
    keep = math.ceil((1 - q) * R.shape[-1])
    return R.scatter(-1, R.abs().argsort(-1, descending=True)[..., keep:], 0.0)


def by_hand(
    backbone: tr.Backbone, facts: list[tr.Fact], ids: Tensor, *, site: tr.Site, alpha: float, ridge: float, q: float
) -> Tensor:
    """The site's edited output, from the formula: H + a S_q((H - mu) K_c' (K_c K_c' + lambda s I)^-1 D)."""
    keys, targets = [], []
    for fact in facts:
        sequence = encode(backbone, fact)
        asked, unasked = sequence.masked(MASK), torch.full_like(sequence.ids, MASK)
        first = int(sequence.canvas.int().argmax()) - backbone.shift
        rows = slice(first, first + int(sequence.canvas.sum()))
        keys.append(hidden(backbone, asked[None], site)[0, rows])
        targets.append(hidden(backbone, unasked[None], site)[0, rows] - keys[-1])
    K, D = torch.cat(keys), torch.cat(targets)
    mu = K.mean(0)
    K_c = K - mu
    s = K_c.square().sum(1).mean()
    A = torch.linalg.inv(K_c @ K_c.T + ridge * s * torch.eye(len(K), dtype=torch.float64))
    H = hidden(backbone, ids, site)
    R = (H - mu) @ K_c.T @ A @ D
    return H + alpha * largest(R, q)


@pytest.mark.parametrize("site", [tr.Site(1), tr.Site(0, "attn"), tr.Site(2, "mlp")])
@pytest.mark.parametrize(("alpha", "q"), [(1.0, 0.0), (0.7, 0.5), (2.0, 0.9)])
def test_paper_mode_is_the_formula(backbone: tr.Backbone, site: tr.Site, alpha: float, q: float) -> None:
    """No gate, nothing protected: one system over all facts, added at every token of every forward."""
    facts = tiny_facts(3)
    memory = build(
        backbone, facts, coordinate=tr.Coordinate(*site), alpha=alpha, ridge=0.05, sparsity=q,
        bank=tr.BankConfig(canvases=(None,), reveal=(0.0,)),
    )  # fmt: skip
    ids = torch.tensor([[9, 10, 40, 41, MASK, MASK], [3, 4, 5, 6, 7, 8]])  # no fact's
    wanted = by_hand(backbone, facts, ids, site=site, alpha=alpha, ridge=0.05, q=q)
    before = hidden(backbone, ids, site)
    # The edit's hook runs before those that are registered inside.
    with memory.attached(backbone), capture(backbone, [site]) as found:
        backbone.forward(ids)
    assert (wanted - before).abs().max() > 0.05
    # Scores and coefficients are float32, and nearly parallel keys cancel: no worse than plain float32 products.
    system, h = memory.systems[0].solved, before.float()
    plain = h + alpha * largest((h - system.mean) @ system.keys.T @ system.coef @ system.values, q)
    error, error_of_plain = ((x.double() - wanted).abs().max() for x in (found[site], plain))
    assert error <= 2 * error_of_plain + 1e-5
    assert error < 2e-3


def test_memory_answers_its_keys_with_its_targets(backbone: tr.Backbone) -> None:
    """With little ridge, an edited fact's activation becomes what the model has when it is not asked."""
    fact = tiny_facts(1)[0]
    bank = tr.BankConfig(canvases=(None,), reveal=(0.0,))
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), layer=1)
    memory = build(backbone, [fact], ridge=1e-8, sparsity=0.0, bank=bank, gate=gate)
    sequence = encode(backbone, fact)
    where = backbone.reads_from(sequence.canvas)
    unasked = hidden(backbone, torch.full((1, len(where)), MASK), tr.Site(1))[0, where]
    with memory.attached(backbone), capture(backbone, [tr.Site(1)]) as found:
        backbone.forward(sequence.masked(MASK)[None])
    torch.testing.assert_close(found[tr.Site(1)][0, where].double(), unasked, rtol=1e-3, atol=1e-3)


def test_protected_keys_are_left_alone(backbone: tr.Backbone) -> None:
    """Written-out beta: protected activations get target zero, more exactly the more they weigh."""
    protect = tr.FactSet(tiny_facts(8)[5:])
    sequence = encode(backbone, protect[0])
    where, ids = backbone.reads_from(sequence.canvas), sequence.masked(MASK)[None]
    before = hidden(backbone, ids, tr.Site(1))[0, where]
    bank = tr.BankConfig(canvases=(None,), reveal=(0.0,))

    def moved(**more: object) -> float:
        memory = build(backbone, sparsity=0.0, bank=bank, **more)
        with memory.attached(backbone), capture(backbone, [tr.Site(1)]) as found:
            backbone.forward(ids)
        return float((found[tr.Site(1)][0, where].double() - before).norm())

    free, held, more = moved(), moved(protect=protect), moved(protect=protect, beta=100.0)
    assert held < 0.6 * free
    assert more < 0.2 * held
    assert moved(protect=protect, beta=0.0) > held
    assert moved(protect=protect, null_space=0.99999) < 0.05 * free


def test_a_shared_memory_in_the_null_space_is_the_solved_system(backbone: tr.Backbone) -> None:
    """Brought up to date row by row it is what one solution of all keys gives, but for the fixed scale of the ridge."""
    facts, protect = tiny_facts(4)[:3], tr.FactSet(tiny_facts(8)[5:])
    bank = tr.BankConfig(canvases=(None,), reveal=(0.0,))
    memory = build(backbone, facts[:1], protect=protect, null_space=0.9, shared=True, bank=bank)
    memory.forget(facts[1:])
    again = build(backbone, facts, protect=protect, null_space=0.9, shared=True, bank=bank)
    for one, two in zip(memory.systems[0].solved, again.systems[0].solved, strict=True):
        torch.testing.assert_close(one, two)
    memory.undo(facts[0].id)
    again = build(backbone, facts[1:], protect=protect, null_space=0.9, shared=True, bank=bank)
    for one, two in zip(memory.systems[0].solved, again.systems[0].solved, strict=True):
        torch.testing.assert_close(one, two)
    frame = memory.background.frames[next(iter(memory.background.frames))]
    assert frame.protect is not None
    held = frame.protect.double() - frame.mean.double()
    projected = memory.systems[0].solved.keys.double() @ null_space_of(held, 0.9)
    torch.testing.assert_close(projected.float(), memory.systems[0].solved.keys)


def test_null_space_needs_facts_to_protect(backbone: tr.Backbone) -> None:
    with pytest.raises(ValueError, match="pass protect"):
        build(backbone, null_space=0.9)
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), token=True)
    with pytest.raises(ValueError, match="token gate"):
        build(backbone, null_space=0.9, protect=tr.FactSet(tiny_facts(4)[3:]), gate=gate)


def test_keys_are_the_banks_states(backbone: tr.Backbone) -> None:
    fact = tiny_facts(1)[0]
    memory = build(backbone, [fact], rank=64)
    states = states_of(backbone, fact, BANK)
    assert [int((s.ids == MASK).sum()) for s in states] == [3, 1]  # 0 and half of three tokens revealed
    rows = activations(
        backbone, [s.ids for s in states], tr.Site(1), [positions_of(backbone, s, "object") for s in states]
    )
    torch.testing.assert_close(memory.edits[0].keys, torch.cat(rows))
    few = build(backbone, [fact], rank=2)
    assert few.edits[0].keys.shape == few.edits[0].targets.shape == (2, 32)
    for key in few.edits[0].keys:
        assert (torch.cat(rows) == key).all(1).any()


def test_a_facts_states_depend_on_nothing_but_itself(backbone: tr.Backbone) -> None:
    alone, among = build(backbone, tiny_facts(3)[1:2]), build(backbone)
    torch.testing.assert_close(alone.edits[0].keys, among.edits[1].keys)
    torch.testing.assert_close(alone.edits[0].targets, among.edits[1].targets)
    torch.manual_seed(9)
    again = build(backbone)
    assert torch.equal(again.systems[0].solved.coef, among.systems[0].solved.coef)


def test_canvases_that_cannot_be_used_are_left_out(backbone: tr.Backbone) -> None:
    fact = tiny_facts(1)[0]
    assert [int(s.canvas.sum()) for s, _ in sequences_of(backbone, fact, tr.BankConfig(canvases=(None, 2, 8)))] == [
        3,
        8,
    ]
    assert len(sequences_of(backbone, fact, tr.BankConfig(canvases=(2,)))) == 1


@pytest.mark.parametrize("estimator", ["corrupt", "donor", "lens"])
def test_other_estimators_change_what_they_should(backbone: tr.Backbone, estimator: str) -> None:
    facts = [fact.with_new_object("old north king") for fact in tiny_facts(2)]
    memory = build(backbone, facts, estimator=estimator, coordinate=tr.Coordinate(2), sparsity=0.0)
    assert all(torch.isfinite(edit.targets).all() and (edit.targets != 0).any() for edit in memory.edits)
    ids = encode(backbone, facts[0]).masked(MASK)[None]
    before = backbone.logits(ids)
    with memory.attached(backbone):
        assert not torch.allclose(backbone.logits(ids), before)
    if estimator == "lens":  # at the last block, the wanted tokens win
        gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), layer=1)
        memory = build(
            backbone, facts, estimator="lens", coordinate=tr.Coordinate(2), sparsity=0.0, ridge=1e-6, gate=gate
        )
        with memory.attached(backbone):
            assert backbone.decode(backbone.logits(ids)[0, -3:].argmax(-1)) == "old north king"


def test_building_leaves_the_model_as_it_was(backbone: tr.Backbone) -> None:
    digest = backbone.state_digest()
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), token=True)
    build(backbone, gate=gate, protect=tr.FactSet(tiny_facts(4)[3:]))
    assert backbone.state_digest() == digest
    assert count_hooks(backbone.model) == 0
    assert all(p.grad is None for p in backbone.model.parameters())


# What cannot be built --------------------------------------------------------------------------------------------


def test_duplicate_facts(backbone: tr.Backbone) -> None:
    [fact] = tiny_facts(1)
    with pytest.raises(FactError, match="share their id.*tiny-0"):
        build(backbone, [fact, fact])
    twin = tr.Fact(id="twin", prompt=fact.prompt, subject=fact.subject, object=fact.object)
    with pytest.raises(FactError, match="share their prompt and object"):
        build(backbone, [fact, twin])
    with pytest.raises(FactError, match="at least one fact"):
        build(backbone, [])


def test_facts_that_cannot_be(backbone: tr.Backbone) -> None:
    with pytest.raises(FactError, match="subject 'peru' is not in the prompt"):
        tr.Fact(id="a", prompt="the capital of kenya", subject="peru", object="old")
    for empty in ("", " "):
        with pytest.raises(FactError, match="non-empty text for 'object'"):
            tr.Fact(id="a", prompt="the capital of kenya", subject="kenya", object=empty)
    long = tr.Fact(id="long", prompt="kenya " * 127, subject="kenya", object="old king")
    with pytest.raises(ValueError, match="fact 'long' needs 129 tokens.*context of 128"):
        build(backbone, [*tiny_facts(2), long])
    with pytest.raises(FactError, match=r"'lens' replaces answers, but \['tiny-0'"):
        build(backbone, estimator="lens", coordinate=tr.Coordinate(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ridge": 0.0}, "ridge > 0"),
        ({"ridge": float("nan")}, "ridge > 0"),
        ({"sparsity": 1.0}, "sparsity < 1"),
        ({"rank": 0}, "rank >= 1"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"null_space": 1.5}, "0 < null_space < 1"),
        ({"estimator": "gradient"}, "expected estimator in"),
        ({"coordinate": tr.Coordinate(3)}, "layers 0 to 2, got layer 3"),
    ],
)
def test_hyperparameters_out_of_range(backbone: tr.Backbone, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(backbone, **wrong)
    assert count_hooks(backbone.model) == 0


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream])
def test_activations_that_are_not_finite(make) -> None:
    backbone, good = make(), build(make())
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), layer=1)
    with torch.no_grad():
        backbone.embedding.weight[backbone.encode("peru"), 3] = torch.nan  # one fact's subject
    for more in ({}, {"gate": gate}):
        with pytest.raises(FloatingPointError, match=r"fact 'tiny-1' at block\.1 are not finite"):
            build(backbone, **more)
    with pytest.raises(FloatingPointError, match=r"fact 'tiny-1'"):
        build(backbone, tiny_facts(1), protect=tr.FactSet(tiny_facts(2)[1:]))
    assert count_hooks(backbone.model) == 0
    # A model spoilt after the memory was built: found when it runs.
    victim = make()
    attached = good.attached(victim)
    with torch.no_grad():
        victim.embedding.weight[backbone.encode("peru"), 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"activations at block\.1 are not finite"), attached:
        victim.logits(torch.tensor([victim.encode("the capital of peru") + [MASK]]))
    assert count_hooks(victim.model) == 0

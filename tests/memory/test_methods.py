"""What methods compute, against the same written out in float64, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import timerome as tr
from tests.lightning.loops import count_hooks
from tests.tiny import EOS, MASK, decoded_facts, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import encode
from timerome.errors import TimeromeError
from timerome.facts import FactError
from timerome.hooks import capture
from timerome.memory import Edit, EditConflictError, Keyed, Placed
from timerome.memory.methods import coordinates_of
from timerome.memory.states import activations, positions_of, sequences_of, states_of
from timerome.memory.systems import Systems

ONE = tr.BankConfig(canvases=(None,), reveal=(0.0,))
BANK = tr.BankConfig(canvases=(None,), reveal=(0.0, 0.5))


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def hidden(backbone: tr.Backbone, ids: Tensor, site: tr.Site) -> Tensor:
    with torch.no_grad(), capture(backbone, [site]) as found:
        backbone.forward(ids)
    return found[site].double()


# By place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.5, 12.0])
@pytest.mark.parametrize("answer", ["kex", "old north king", "king king ?"])
def test_each_target_is_its_token_by_the_margin(backbone: tr.Backbone, answer: str, margin: float) -> None:
    edit = tr.EditMemory(backbone).replace(tiny_facts(1)[0], answer, method=tr.ByPlace(margin))
    change = edit.change
    assert isinstance(change, Placed)
    with torch.no_grad():
        logits = backbone.head(backbone.final_norm(change.targets)).double()
    tokens = torch.full((len(logits),), -1)
    for numbers, spelling in zip(
        change.tokens, {tuple(backbone.encode(t)) for t in (" " + answer, answer)}, strict=True
    ):
        tokens[list(numbers)] = torch.tensor(spelling)
    assert change.ends
    tokens[-1] = EOS
    own = logits.gather(1, tokens[:, None])
    rivals = logits.scatter(1, tokens[:, None], -torch.inf)
    rivals[:, MASK] = -torch.inf  # never said
    assert (own[:, 0] - rivals.amax(1)).min() > 0.998 * margin  # by a few fixed-point rounds
    assert change.layer == backbone.n_layers - 1
    assert len(set(tokens.tolist())) == len(tokens)  # each token once


def test_a_larger_margin_is_a_larger_change(backbone: tr.Backbone) -> None:
    memory, fact = tr.EditMemory(backbone), tiny_facts(1)[0]
    small, large = (
        memory.replace(fact, "old north king", method=tr.ByPlace(m)).change.targets for m in (2.0, 20.0)
    )  # fmt: skip
    plain = memory.forget(fact, answer="old north king", method=tr.ByPlace(2.0)).change.targets
    assert torch.equal(small, plain)
    assert not torch.equal(small, large)


@pytest.mark.parametrize("canvas", [3, 5, 8, 20])
def test_what_is_said_does_not_depend_on_canvas_or_state(backbone: tr.Backbone, canvas: int) -> None:
    fact = decoded_facts(backbone, 1, canvas)[0]
    with (memory := tr.EditMemory(backbone)).attached() as run:
        memory.replace(fact, "old king", threshold=-50.0)
        for steps in (1, canvas):
            said = tr.generate(backbone, fact.prompt, canvas=canvas, config=tr.SamplerConfig(steps=steps))
            assert said.startswith("old king")
    assert run.hits["tiny-0"] > 0


def test_it_is_refused_where_it_cannot_be(backbone: tr.Backbone) -> None:
    memory, fact = tr.EditMemory(backbone), tiny_facts(1)[0]
    for at in (0, tr.Site(0), tr.Coordinate(2, "mlp"), [1, 2]):
        with pytest.raises(TimeromeError, match="last block"):
            memory.replace(fact, "kex", at=at)
    assert memory.replace(fact, "kex", at=2).change.layer == 2
    with pytest.raises(TimeromeError, match="expected margin > 0"):
        tr.ByPlace(0.0)
    with pytest.raises(TimeromeError, match=r"use method=Ridge\(targets='null'\)"):
        memory.forget(fact, answer=None, method=tr.ByPlace())
    with pytest.raises(FactError, match="holds the mask token"):
        memory.replace(fact, "old <mask>")
    assert [e.says for e in memory.edits] == ["kex"]


# Ridge -----------------------------------------------------------------------------------------------------------


def largest(R: Tensor, q: float) -> Tensor:
    """S_q: the ceil((1 - q) d) largest entries of each row, the others zero."""
    keep = math.ceil((1 - q) * R.shape[-1])
    return R.scatter(-1, R.abs().argsort(-1, descending=True)[..., keep:], 0.0)


def keys_and_targets(backbone: tr.Backbone, facts: list[tr.Fact], site: tr.Site) -> tuple[Tensor, Tensor]:
    """Of the fully masked states; towards what the model says unasked."""
    keys, targets = [], []
    for fact in facts:
        sequence = encode(backbone, fact)
        first = int(sequence.canvas.int().argmax()) - backbone.shift
        rows = slice(first, first + int(sequence.canvas.sum()))
        keys.append(hidden(backbone, sequence.masked(MASK)[None], site)[0, rows])
        targets.append(hidden(backbone, torch.full_like(sequence.ids, MASK)[None], site)[0, rows] - keys[-1])
    return torch.cat(keys), torch.cat(targets)


def response(
    H: Tensor, K: Tensor, D: Tensor, *, ridge: float, mean: Tensor, protect: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """(H - mu) K_c' (K_c K_c' + lambda s I)^-1 D_c, in float64; s of the protected keys where there are some."""
    K_c, P_c = K - mean, None if protect is None else protect - mean
    scale = (K_c if P_c is None else P_c).square().sum(1).mean()
    if P_c is not None:
        K_c, D = torch.cat([K_c, beta**0.5 * P_c]), torch.cat([D, torch.zeros_like(P_c)])
    A = torch.linalg.inv(K_c @ K_c.T + ridge * scale * torch.eye(len(K_c), dtype=torch.float64))
    return (H - mean) @ K_c.T @ A @ D


@pytest.mark.parametrize("site", [tr.Site(1), tr.Site(0, "attn"), tr.Site(2, "mlp")])
@pytest.mark.parametrize(("alpha", "q"), [(1.0, 0.0), (0.7, 0.5), (2.0, 0.9)])
def test_the_papers_form_is_the_formula(backbone: tr.Backbone, site: tr.Site, alpha: float, q: float) -> None:
    """No gate, nothing protected: one system over all facts, added at every token of every forward."""
    facts = tiny_facts(3)
    memory = tr.paper_memory(backbone, facts, at=site, method=tr.Ridge("null", 64, 0.05, q, alpha, states=ONE))
    ids = torch.tensor([[9, 10, 40, 41, MASK, MASK], [3, 4, 5, 6, 7, 8]])  # no fact's
    K, D = keys_and_targets(backbone, facts, site)
    H = hidden(backbone, ids, site)
    wanted = H + alpha * largest(response(H, K, D, ridge=0.05, mean=K.mean(0)), q)
    # The edit's hook runs before those that are registered inside.
    with memory.attached(), capture(backbone, [site]) as found:
        backbone.forward(ids)
    assert (wanted - H).abs().max() > 0.05
    # Scores and coefficients are float32, and nearly parallel keys cancel: no worse than plain float32 products.
    [system] = Systems().of(memory.edits)
    own, h = system.solved, H.float()
    plain = h + alpha * largest((h - own.mean) @ own.keys.T @ own.coef @ own.values, q)
    error, error_of_plain = ((x.double() - wanted).abs().max() for x in (found[site], plain))
    assert error <= 2 * error_of_plain + 1e-5
    assert error < 2e-3


def test_the_papers_form_edits_every_row_and_all_its_values_are_parameters(backbone: tr.Backbone) -> None:
    facts = tiny_facts(2)
    memory = tr.paper_memory(backbone, facts, at=1, alpha=0.5, ridge=0.02, sparsity=0.25, rank=3)
    change = memory.edits[0].change
    assert isinstance(change, Keyed) and change.together and memory.edits[0].gate is None
    assert (change.alpha, change.ridge, change.sparsity) == (0.5, 0.02, 0.25)
    assert [len(p.keys) for e in memory.edits for p in e.change.parts] == [3, 3]
    with pytest.raises(TimeromeError, match="not both"):
        tr.paper_memory(backbone, facts, alpha=0.5, method=tr.Ridge())
    said = tr.paper_memory(backbone, [f.with_new_object("old north king") for f in facts])
    assert [e.operation for e in said.edits] == ["replace"] * 2
    assert said.sites == (tr.Site(2),)
    with pytest.raises(TimeromeError, match="make two and attach both"):
        said.replace(tiny_facts(3)[2], "kex")
    with pytest.raises(EditConflictError):
        tr.paper_memory(backbone, [facts[0], replace(facts[0], id="twin")])


def test_a_gated_system_answers_its_keys_with_its_targets(backbone: tr.Backbone) -> None:
    """With little ridge, an edited fact's activation becomes what the model has when it is not asked; others stay."""
    facts = decoded_facts(backbone, 3)
    memory = tr.EditMemory(backbone)
    memory.forget(facts[0], answer=None, at=1, method=tr.Ridge(ridge=1e-8, sparsity=0.0, states=ONE))
    sequences = [encode(backbone, fact) for fact in facts]
    where = backbone.reads_from(sequences[0].canvas)
    unasked = hidden(backbone, torch.full((1, len(where)), MASK), tr.Site(1))[0, where]
    ids = torch.stack([s.masked(MASK) for s in sequences])
    plain = hidden(backbone, ids, tr.Site(1))
    with memory.attached() as run, capture(backbone, [tr.Site(1)]) as found:
        backbone.forward(ids)
    assert run.hits == {"tiny-0": 1}
    torch.testing.assert_close(found[tr.Site(1)][0, where].double(), unasked, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[tr.Site(1)][1:].double(), plain[1:])
    assert torch.equal(found[tr.Site(1)][0, ~where].double(), plain[0, ~where])


def test_keys_are_the_banks_states(backbone: tr.Backbone) -> None:
    fact = tiny_facts(1)[0]
    states = states_of(backbone, fact, BANK)
    assert [int((s.ids == MASK).sum()) for s in states] == [3, 1]  # 0 and half of three tokens revealed
    rows = torch.cat(
        activations(
            backbone, [s.ids for s in states], tr.Site(1), [positions_of(backbone, s, "object") for s in states]
        )
    )

    def keys(rank: int) -> Tensor:
        edit = tr.EditMemory(backbone).forget(fact, answer=None, at=1, method=tr.Ridge(rank=rank, states=BANK))
        return edit.change.parts[0].keys

    torch.testing.assert_close(keys(64), rows)
    assert keys(2).shape == (2, 32)
    for key in keys(2):
        assert (rows == key).all(1).any()


def test_a_facts_states_depend_on_nothing_but_itself(backbone: tr.Backbone) -> None:
    method = tr.Ridge(states=BANK)
    alone = tr.paper_memory(backbone, tiny_facts(3)[1:2], at=1, method=method)
    torch.manual_seed(9)
    among = tr.paper_memory(backbone, tiny_facts(3), at=1, method=method)
    assert torch.equal(alone.edits[0].change.parts[0].keys, among.edits[1].change.parts[0].keys)
    assert torch.equal(alone.edits[0].change.parts[0].targets, among.edits[1].change.parts[0].targets)
    assert tr.paper_memory(backbone, tiny_facts(3), at=1, method=method).digest() == among.digest()


def test_canvases_that_cannot_be_used_are_left_out(backbone: tr.Backbone) -> None:
    fact = tiny_facts(1)[0]
    found = sequences_of(backbone, fact, tr.BankConfig(canvases=(None, 2, 8)))
    assert [int(s.canvas.sum()) for s, _ in found] == [3, 8]
    assert len(sequences_of(backbone, fact, tr.BankConfig(canvases=(2,)))) == 1


@pytest.mark.parametrize("targets", ["corrupt", "donor", "lens"])
def test_other_targets_change_what_they_should(backbone: tr.Backbone, targets: str) -> None:
    facts = decoded_facts(backbone, 2)
    memory = tr.EditMemory(backbone)
    method = tr.Ridge(targets, ridge=1e-6, sparsity=0.0, states=BANK)  # type: ignore[arg-type]
    if targets == "corrupt":
        edits = memory.forget(facts, answer=None, method=method, at=2)
    else:
        edits = memory.replace(facts, "old north king", method=method, at=2)
    parts = [part for edit in edits for part in edit.change.parts]
    assert all(torch.isfinite(p.targets).all() and (p.targets != 0).any() for p in parts)
    ids = encode(backbone, facts[0]).masked(MASK)[None]
    before = backbone.logits(ids)
    with memory.attached():
        after = backbone.logits(ids)
    assert not torch.allclose(after, before)
    if targets == "lens":  # at the last block, the wanted tokens win
        assert backbone.decode(after[0, -3:].argmax(-1)) == "old north king"


def test_protected_keys_are_left_alone_the_more_they_weigh(backbone: tr.Backbone) -> None:
    protect = tr.FactSet(tiny_facts(8)[5:])
    sequence = encode(backbone, protect[0])
    where, ids = backbone.reads_from(sequence.canvas), sequence.masked(MASK)[None]
    before = hidden(backbone, ids, tr.Site(1))[0, where]

    def moved(**more: object) -> float:
        method = tr.Ridge(sparsity=0.0, states=ONE, **more)  # type: ignore[arg-type]
        with (
            tr.paper_memory(backbone, tiny_facts(3), at=1, method=method).attached(),
            capture(backbone, [tr.Site(1)]) as found,
        ):
            backbone.forward(ids)
        return float((found[tr.Site(1)][0, where].double() - before).norm())

    free, held, more = moved(), moved(protect=protect), moved(protect=protect, beta=100.0)
    assert held < 0.6 * free
    assert more < 0.2 * held
    assert moved(protect=protect, beta=0.0) > held


def test_several_places_share_the_strength(backbone: tr.Backbone) -> None:
    fact = tiny_facts(1)[0]
    method = tr.Ridge(alpha=3.0, states=ONE)
    edit = tr.EditMemory(backbone).forget(fact, answer=None, method=method, at=[0, tr.Site(1, "mlp"), tr.Coordinate(2)])
    assert edit.change.sites == (tr.Site(0), tr.Site(1, "mlp"), tr.Site(2))
    assert [system.alpha for system in Systems().of([edit])] == [1.0] * 3


# Row by row ------------------------------------------------------------------------------------------------------

BACKBONE = tiny_llada(layers=2)
POOL = tiny_facts(6)
PROTECT = tr.FactSet(tiny_facts(8)[6:])


@pytest.mark.parametrize("protect", [None, PROTECT])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_shared_system_brought_up_to_date_is_the_refit(protect: tr.FactSet | None, data: st.DataObject) -> None:
    """Whatever came and went, and in whatever order, in float64."""
    every = _every(protect is not None)
    systems, there = Systems(), list(data.draw(st.permutations(range(6)))[:3])
    h = torch.randn(7, BACKBONE.hidden_size, generator=torch.Generator().manual_seed(3))
    for _ in range(data.draw(st.integers(1, 6))):
        [system] = systems.of([every[i] for i in there])
        own = system.solved
        got = (h.double() - own.mean.double()) @ own.keys.double().T @ own.coef.double() @ own.values.double()
        parts = [every[i].change.parts[0] for i in there]
        K, D = (torch.cat([getattr(p, name) for p in parts]).double() for name in ("keys", "targets"))
        held = parts[0].protect
        mean = K.mean(0) if held is None else held.double().mean(0)
        wanted = response(
            h.double(), K, D, ridge=0.05, mean=mean, protect=None if held is None else held.double(), beta=0.5
        )
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
        assert [there[i] for i in sorted(set(system.owner.tolist()))] == there
        left = [i for i in range(6) if i not in there]
        what = data.draw(st.sampled_from(["gone", "new", "both", "order"]))
        if what in ("gone", "both") and len(there) > 1:
            there.remove(data.draw(st.sampled_from(there)))
        if what in ("new", "both") and left:
            there.append(data.draw(st.sampled_from(left)))
        if what == "order":
            there = list(data.draw(st.permutations(there)))


_MADE: dict[bool, list[Edit]] = {}


def _every(protected: bool) -> list[Edit]:
    if protected not in _MADE:
        method = tr.Ridge(rank=3, ridge=0.05, protect=PROTECT if protected else None, beta=0.5, states=BANK)
        _MADE[protected] = list(tr.paper_memory(BACKBONE, POOL, at=0, method=method).edits)
    return _MADE[protected]


@pytest.mark.parametrize("protect", [None, PROTECT])
def test_undone_and_attached_it_is_what_would_have_been_made(protect: tr.FactSet | None) -> None:
    method = tr.Ridge(rank=3, protect=protect, states=BANK)
    ids = torch.tensor([[5, 6, 7, MASK, MASK]])

    def logits(memory: tr.EditMemory) -> Tensor:
        with memory.attached():
            return BACKBONE.logits(ids)

    whole = tr.paper_memory(BACKBONE, POOL, at=0, method=method)
    logits(whole)
    whole.undo(whole.edits[4].id, whole.edits[1].id)
    few = tr.paper_memory(BACKBONE, [POOL[i] for i in (0, 2, 3, 5)], at=0, method=method)
    torch.testing.assert_close(logits(whole), logits(few), rtol=1e-3, atol=1e-3)
    whole.undo(*[e.id for e in whole.edits])
    assert torch.equal(logits(whole), BACKBONE.logits(ids))


# Doors -----------------------------------------------------------------------------------------------------------


def test_at_says_where_in_one_way_for_all() -> None:
    usual, fact = tr.Coordinate(2, role="object"), replace(tiny_facts(1)[0], group="cities")
    one = (tr.Coordinate(1),)
    for at in (
        1,
        tr.Site(1),
        tr.Coordinate(1),
        [1],
        {"tiny-0": 1},
        {"cities": tr.Site(1)},
        lambda f: len(f.subject) - 4,
    ):
        assert coordinates_of(at, fact, usual) == one
    assert coordinates_of(None, fact, usual) == (usual,)
    for wrong in ("1", True, 1.5, [], [1, tr.Site(1)], [[1]]):
        with pytest.raises(TimeromeError, match="at"):
            coordinates_of(wrong, fact, usual)
    with pytest.raises(TimeromeError, match=r"no place for fact 'tiny-0', nor for its group 'cities'.*peru"):
        coordinates_of({"peru": 1}, fact, usual)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ridge": 0.0}, "ridge > 0"),
        ({"ridge": float("nan")}, "ridge > 0"),
        ({"sparsity": 1.0}, "sparsity in"),
        ({"rank": 0}, "rank >= 1"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": 1e300}, "alpha"),
        ({"targets": "gradient"}, "expected targets in"),
    ],
)
def test_values_out_of_range(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tr.Ridge(**wrong)  # type: ignore[arg-type]


def test_what_cannot_be_made_changes_nothing(backbone: tr.Backbone) -> None:
    memory, (one, two) = tr.EditMemory(backbone), tiny_facts(2)
    memory.replace(one, "kex")
    before, weights = memory.state, backbone.state_digest()
    long = tr.Fact(id="long", prompt="kenya " * 127, subject="kenya", object="old king")
    full = replace(long, prompt="kenya " * 128)
    wrong: list[tuple[type[Exception], str, object]] = [
        (FactError, "have no new_object; give an answer, or forget", lambda: memory.replace([two])),
        (FactError, "expected a Fact or several, got 'Kenya'", lambda: memory.replace("Kenya", "kex")),
        (FactError, "expected a Fact or several, got {}", lambda: memory.forget({})),
        (FactError, "at least one fact", lambda: memory.forget([])),
        (FactError, "128 tokens", lambda: memory.replace([two, full], "kex")),
        (FactError, "expected a Fact or several, got 3", lambda: memory.replace(3, "kex")),
        (EditConflictError, "'twin' with 'tiny-1'", lambda: memory.forget([two, replace(two, id="twin")])),
        (EditConflictError, "Nothing was changed", lambda: memory.replace(one, "key", on_conflict="error")),
        (ValueError, "layers 0 to 2, got layer 3", lambda: memory.forget(two, answer=None, at=3)),
        (TimeromeError, "needs an answer to say", lambda: memory.forget(two, answer=None, method=tr.Ridge("lens"))),
        (TimeromeError, "says nothing; pass answer=None", lambda: memory.replace(two, "kex", method=tr.Ridge("null"))),
        (TimeromeError, "expected method ByPlace", lambda: memory.replace(two, "kex", method="lens")),
        (KeyError, "no edit 'nobody'", lambda: memory.undo("tiny-0", "nobody")),
    ]  # fmt: skip
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            change()  # type: ignore[operator]
        assert memory.state is before
    assert backbone.state_digest() == weights
    assert count_hooks(backbone.model) == 0
    assert all(p.grad is None for p in backbone.model.parameters())


def test_activations_that_are_not_finite() -> None:
    for make in (tiny_llada, tiny_dream):
        backbone = make()
        memory = tr.EditMemory(backbone)
        with torch.no_grad():
            backbone.embedding.weight[backbone.encode("peru"), 3] = torch.nan  # one fact's subject
        memory = tr.EditMemory(backbone)
        for change in (
            lambda m=memory: m.replace(tiny_facts(2), "kex"),
            lambda m=memory: m.forget(tiny_facts(2), answer=None, method=tr.Ridge(states=ONE)),
            lambda b=backbone: tr.paper_memory(b, tiny_facts(2), at=1),
            lambda b=backbone: tr.paper_memory(
                b, tiny_facts(1), method=tr.Ridge(protect=tr.FactSet(tiny_facts(2)[1:]))
            ),
        ):
            with pytest.raises(FloatingPointError, match="not finite"):
                change()
        assert not memory.state.history
        assert count_hooks(backbone.model) == 0

"""Likelihood estimators against sums over every mask, in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.tiny import MASK, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import Encoded, encode, log_likelihood, mask_draws
from timerome.hooks import Hooks


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    backbone = request.param()
    backbone.model.double()
    return backbone


@pytest.fixture(scope="module")
def sequence(backbone: tr.Backbone) -> Encoded:
    sequence = encode(backbone, tiny_facts(1)[0])
    assert int(sequence.canvas.sum()) == 3
    return sequence


def cost(backbone: tr.Backbone, sequence: Encoded, masked: tuple[int, ...]) -> dict[int, float]:
    """c_i(S) for i in S: one forward, written out."""
    start = int(sequence.canvas.int().argmax())
    ids = sequence.ids.clone()
    for i in masked:
        ids[start + i] = MASK
    with torch.no_grad():
        logits = backbone.model(ids[None]).logits[0]
    out = {}
    for i in masked:
        row = logits[start + i - backbone.shift]
        out[i] = float(torch.logsumexp(row, 0) - row[sequence.ids[start + i]])
    return out


def expectation(backbone: tr.Backbone, sequence: Encoded, length: int = 3) -> float:
    """-E_n E_S (L/n) sum of c_i(S), with n uniform on 1..L and S uniform among the sets of n."""
    total = 0.0
    for n in range(1, length + 1):
        sets = list(combinations(range(length), n))
        total += sum(length / n * sum(cost(backbone, sequence, s).values()) for s in sets) / len(sets) / length
    return -total


@pytest.mark.parametrize("estimator", ["elbo_sum", "recon_mean"])
def test_elbo_is_the_expectation_over_all_masks(backbone: tr.Backbone, sequence: Encoded, estimator: str) -> None:
    exact = expectation(backbone, sequence)
    found = log_likelihood(backbone, [sequence], estimator=estimator, samples=600, batch_size=600)
    assert 0 < float(found.standard_error) < abs(exact)
    assert abs(float(found.log_prob) - exact) < 4 * float(found.standard_error)
    assert float(found.nll_per_token) == pytest.approx(-float(found.log_prob) / 3)


def test_standard_error_is_the_spread_over_seeds(backbone: tr.Backbone, sequence: Encoded) -> None:
    runs = [log_likelihood(backbone, [sequence], estimator="recon_mean", samples=16, seed=s) for s in range(60)]
    values, errors = torch.cat([r.log_prob for r in runs]), torch.cat([r.standard_error for r in runs])
    assert float(values.std()) == pytest.approx(float(errors.square().mean().sqrt()), rel=0.35)
    # Without bias: the mean over seeds is the exact expectation.
    assert abs(float(values.mean()) - expectation(backbone, sequence)) < 4 * float(values.std()) / 60**0.5
    # Stratified counts of masked tokens can only help.
    ladder = torch.cat([log_likelihood(backbone, [sequence], samples=16, seed=s).log_prob for s in range(60)])
    assert ladder.std() < values.std()


def test_onestep_and_left_to_right(backbone: tr.Backbone, sequence: Encoded) -> None:
    onestep = log_likelihood(backbone, [sequence], estimator="onestep")
    assert float(onestep.log_prob) == pytest.approx(-sum(cost(backbone, sequence, (0, 1, 2)).values()), abs=1e-5)
    chain = log_likelihood(backbone, [sequence], estimator="l2r")
    wanted = sum(cost(backbone, sequence, tuple(range(i, 3)))[i] for i in range(3))
    assert float(chain.log_prob) == pytest.approx(-wanted, abs=1e-5)
    assert float(onestep.standard_error) == float(chain.standard_error) == 0
    assert onestep.samples == chain.samples == 1


def test_one_token_answers_are_the_same_for_all(backbone: tr.Backbone) -> None:
    fact = tr.Fact(id="one", prompt="the capital of kenya is", subject="kenya", object="old")
    one = encode(backbone, fact)
    exact = -cost(backbone, one, (0,))[0]
    for estimator in ("elbo_sum", "recon_mean", "onestep", "l2r"):
        found = log_likelihood(backbone, [one], estimator=estimator)
        assert float(found.log_prob) == pytest.approx(exact, abs=1e-5)
        assert float(found.standard_error) == 0


def test_order_and_batches_do_not_matter(backbone: tr.Backbone) -> None:
    facts = [*tiny_facts(5), tr.Fact(id="long", prompt="who was king of peru", subject="peru", object="the old king")]
    sequences = [encode(backbone, fact) for fact in facts]
    found = log_likelihood(backbone, sequences, samples=8)
    for batch_size in (1, 3, 1000):
        again = log_likelihood(backbone, sequences[::-1], samples=8, batch_size=batch_size)
        torch.testing.assert_close(again.log_prob.flip(0), found.log_prob, rtol=1e-6, atol=1e-6)
    assert found.tokens.tolist() == [3] * 6
    assert found.log_prob.dtype == torch.float64


def test_common_random_numbers() -> None:
    first, second = tiny_llada(), tiny_llada(seed=1)
    seen: list[list[Tensor]] = []
    for backbone in (first, second):
        seen.append([])
        with Hooks(backbone, embedding=lambda ids, h: seen[-1].append(ids.clone())):
            log_likelihood(backbone, [encode(backbone, fact) for fact in tiny_facts(3)], samples=8, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    draws = mask_draws(6, "elbo_sum", 16, seed=5)
    torch.rand(3)
    assert torch.equal(draws, mask_draws(6, "elbo_sum", 16, seed=5))
    assert not torch.equal(draws, mask_draws(6, "elbo_sum", 16, seed=6))
    # An answer's draws do not depend on which other answers are measured.
    backbone = tiny_llada()
    sequences = [encode(backbone, fact) for fact in tiny_facts(3)]
    alone = log_likelihood(backbone, sequences[1:2], samples=8)
    assert float(alone.log_prob) == pytest.approx(float(log_likelihood(backbone, sequences, samples=8).log_prob[1]))


@pytest.mark.parametrize("length", [2, 3, 7])
def test_draws(length: int) -> None:
    stratified = mask_draws(length, "elbo_sum", 14 * length, seed=0)
    counts = stratified.sum(1)
    assert stratified.shape == (14 * length, length)
    assert torch.equal(counts.bincount(minlength=length + 1), torch.tensor([0] + [14] * length))
    independent = mask_draws(length, "recon_mean", 200, seed=0).sum(1)
    assert (independent.min(), independent.max()) == (1, length)
    assert mask_draws(length, "onestep", 9, 0).tolist() == [[True] * length]
    assert torch.equal(mask_draws(length, "l2r", 9, 0), torch.ones(length, length).bool().triu())
    # Every position is masked equally often, given enough draws.
    share = mask_draws(length, "elbo_sum", 4000, seed=1).float().mean(0)
    torch.testing.assert_close(share, torch.full((length,), (length + 1) / 2 / length), atol=0.04, rtol=0)


def test_edited_tokens_only_are_scored(backbone: tr.Backbone) -> None:
    """A prompt of another wording changes the likelihood through the model alone."""
    fact = tiny_facts(1)[0]
    first, second = encode(backbone, fact), encode(backbone, fact, prompt="the old city of kenya")
    assert torch.equal(first.answer, second.answer)
    found = log_likelihood(backbone, [first, second], estimator="onestep").log_prob
    assert float(found[1]) == pytest.approx(-sum(cost(backbone, second, (0, 1, 2)).values()), abs=1e-5)


def test_wrong_arguments(backbone: tr.Backbone, sequence: Encoded) -> None:
    with pytest.raises(ValueError, match="expected estimator in .*got 'exact'"):
        log_likelihood(backbone, [sequence], estimator="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples >= 1, got 0"):
        log_likelihood(backbone, [sequence], samples=0)
    empty = Encoded(torch.tensor([5, 6]), torch.zeros(2).bool(), torch.zeros(2).bool())
    with pytest.raises(ValueError, match="sequence 1 has no answer"):
        log_likelihood(backbone, [sequence, empty])
    nothing = log_likelihood(backbone, [])
    assert len(nothing.log_prob) == len(nothing.tokens) == 0


@pytest.mark.parametrize("estimator", ["elbo_sum", "l2r"])
def test_logits_that_are_not_finite_name_the_fact(estimator: str) -> None:
    backbone = tiny_llada()
    sequences = [encode(backbone, fact) for fact in tiny_facts(3)]
    with torch.no_grad():
        backbone.embedding.weight[backbone.encode("peru")] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite for tiny-1; "):
        log_likelihood(backbone, sequences, estimator=estimator, samples=2)  # type: ignore[arg-type]


def test_no_gradient_is_kept(backbone: tr.Backbone, sequence: Encoded) -> None:
    assert not log_likelihood(backbone, [sequence], samples=2).log_prob.requires_grad
    assert all(p.grad is None for p in backbone.model.parameters())


def test_pll_hides_each_token_alone(backbone: tr.Backbone, sequence: Encoded) -> None:
    found = log_likelihood(backbone, [sequence], estimator="pll")
    wanted = -sum(cost(backbone, sequence, (i,))[i] for i in range(3))
    assert float(found.log_prob) == pytest.approx(wanted, rel=1e-5)
    assert (found.samples, float(found.standard_error)) == (1, 0.0)


def test_traj_goes_the_way_low_confidence_decoding_goes(backbone: tr.Backbone, sequence: Encoded) -> None:
    """The sampler itself, one token a step, with the answer's tokens put where it would put its own."""
    ids, total = sequence.masked(MASK), 0.0
    while bool((ids == MASK).any()):
        with torch.no_grad():
            logits = backbone.logits(ids[None])[0]
        log_p, guess = logits.log_softmax(-1), logits.clone()
        guess[:, MASK] = -torch.inf
        sure = (guess.amax(-1) - torch.logsumexp(logits, -1)).masked_fill(ids != MASK, -torch.inf)
        place = int(sure.argmax())
        total += float(log_p[place, sequence.ids[place]])
        ids[place] = sequence.ids[place]
    found = log_likelihood(backbone, [sequence, sequence], estimator="traj")
    assert found.log_prob.tolist() == pytest.approx([total, total], rel=1e-5)


def test_antithetic_draws_pair_up_and_keep_the_expectation(backbone: tr.Backbone, sequence: Encoded) -> None:
    plain, paired = (mask_draws(6, "elbo_sum", 16, 0, antithetic=a) for a in (False, True))
    assert torch.equal(plain.sum(1), paired.sum(1))
    assert torch.equal(plain[::2], paired[::2])
    both = paired[::2] & paired[1::2]  # two of them overlap only as far as they must
    assert (both.sum(1) == (paired[::2].sum(1) + paired[1::2].sum(1) - 6).clamp_min(0)).all()
    found = log_likelihood(backbone, [sequence], samples=600, batch_size=600, antithetic=True)
    assert abs(float(found.log_prob) - expectation(backbone, sequence)) < 4 * float(found.standard_error)


def test_states_that_answers_share_are_run_once(backbone: tr.Backbone) -> None:
    fact = tiny_facts(1)[0]
    sequences = [encode(backbone, fact, answer=answer) for answer in ("kex key kez", "fix fiy fiz", "kex fiy kez")]
    rows: list[int] = []
    with Hooks(backbone, begin=lambda ids, called: rows.append(len(ids))):
        together = log_likelihood(backbone, sequences, estimator="onestep")
    alone = [float(log_likelihood(backbone, [s], estimator="onestep").log_prob) for s in sequences]
    assert rows == [1]
    assert together.log_prob.tolist() == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("estimator", ["elbo_sum", "traj"])
def test_half_precision_is_near(estimator: str) -> None:
    whole, half = tiny_llada(), tiny_llada()
    half.model.bfloat16()
    sequence = encode(whole, tiny_facts(1)[0])
    found = [log_likelihood(b, [sequence], estimator=estimator, samples=16).log_prob for b in (whole, half)]
    assert float(found[1]) == pytest.approx(float(found[0]), rel=0.05)

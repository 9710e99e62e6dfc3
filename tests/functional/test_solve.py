"""The ridge system."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.functional.solve import null_space_of, solve
from timerome.ops import sparse_lowrank_residual


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answer(memory, h):
    """What a memory adds to rows, by the op."""
    return sparse_lowrank_residual(h, memory.keys, memory.coef, memory.values, mean=memory.mean) - h


@given(st.integers(0, 99), st.integers(1, 6), st.integers(0, 5), st.floats(1e-3, 1.0), st.floats(0.0, 4.0))
@settings(deadline=None, max_examples=40)
def test_answers_equal_the_formula_in_float64(seed, n, p, ridge, beta):
    d = 16
    keys, targets, protect, mean = draw(seed, n, d), draw(seed + 1, n, d), draw(seed + 2, p, d), draw(seed + 3, d)
    memory = solve(keys, targets, ridge=ridge, mean=mean, protect=protect, beta=beta)
    h = draw(seed + 4, 7, d)
    shifted = [(keys - mean).double()] + ([beta**0.5 * (protect - mean).double()] if p and beta > 0 else [])
    k = torch.cat(shifted)
    scale = (k**2).sum(1).mean()
    a = torch.linalg.inv(k @ k.T + ridge * scale * torch.eye(len(k), dtype=torch.float64))
    full = torch.cat([targets.double(), torch.zeros(len(k) - n, d, dtype=torch.float64)])
    wanted = (h - mean).double() @ k.T @ a @ full
    assert torch.allclose(answer(memory, h).double(), wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-5)


def test_with_little_ridge_each_key_gets_its_target_and_protected_keys_nothing():
    keys, targets, protect = draw(0, 4, 32), draw(1, 4, 32), draw(2, 5, 32)
    memory = solve(keys, targets, ridge=1e-6, protect=protect)
    assert torch.allclose(answer(memory, keys), targets, atol=1e-3)
    assert answer(memory, protect).abs().max() < 1e-3
    free = solve(keys, targets, ridge=1e-6)
    assert answer(free, protect).abs().max() > 0.1


@given(st.integers(0, 99), st.integers(1, 8), st.floats(0.05, 0.999))
@settings(deadline=None, max_examples=40)
def test_null_space_is_a_projection_that_leaves_less_than_the_rest_of_the_energy(seed, p, energy):
    protect = draw(seed, p, 16).double()
    free = null_space_of(protect, energy)
    torch.testing.assert_close(free, free.T)
    torch.testing.assert_close(free @ free, free)
    assert (protect @ free).square().sum() <= (1 - energy + 1e-9) * protect.square().sum()
    # No more is taken out than is needed: with one direction fewer, more energy would be left.
    taken = 16 - round(float(free.trace()))
    assert torch.linalg.svdvals(protect)[: taken - 1].square().sum() < energy * protect.square().sum() + 1e-9


def test_in_the_null_space_protected_keys_get_nothing_and_keys_outside_their_span_are_answered():
    keys, targets, protect = draw(0, 4, 32), draw(1, 4, 32), draw(2, 5, 32)
    memory = solve(keys, targets, ridge=1e-6, protect=protect, null_space=0.9999)
    assert answer(memory, protect).abs().max() < 1e-4
    assert torch.allclose(answer(memory, keys), targets, atol=1e-3)
    assert len(memory.keys) == 4  # protected keys cost nothing when the memory is used


def test_null_space_refuses_what_leaves_nothing():
    keys = draw(0, 3, 4)
    with pytest.raises(ValueError, match="needs protected keys"):
        solve(keys, keys, ridge=0.1, null_space=0.5)
    with pytest.raises(ValueError, match="fill all 4 dimensions"):
        null_space_of(draw(1, 20, 4), 0.999)
    with pytest.raises(ValueError, match="0 < energy < 1"):
        null_space_of(keys, 1.0)


def test_more_ridge_answers_less():
    keys, targets = draw(0, 4, 32), draw(1, 4, 32)
    sizes = [float(answer(solve(keys, targets, ridge=r), keys).norm()) for r in (0.01, 0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_ridge_does_not_depend_on_the_scale_of_the_keys():
    keys, targets, h = draw(0, 4, 32), draw(1, 4, 32), draw(2, 3, 32)
    one = answer(solve(keys, targets, ridge=0.1), h)
    assert torch.allclose(answer(solve(100 * keys, targets, ridge=0.1), 100 * h), one, rtol=1e-3, atol=1e-4)


def test_bad_input_is_refused():
    keys = draw(0, 3, 4)
    with pytest.raises(ValueError, match="one shape"):
        solve(keys, keys[:2], ridge=0.1)
    with pytest.raises(ValueError, match="ridge > 0"):
        solve(keys, keys, ridge=0.0)
    with pytest.raises(ValueError, match="beta >= 0"):
        solve(keys, keys, ridge=0.1, beta=-1)
    with pytest.raises(ValueError, match=r"expected protect of shape \(P, 4\)"):
        solve(keys, keys, ridge=0.1, protect=draw(0, 2, 5))
    broken = keys.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"targets must be finite, but rows \[1\]"):
        solve(keys, broken, ridge=0.1)

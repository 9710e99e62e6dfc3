"""Errors of the ops against a truth in higher precision, at planted condition numbers."""

import random

import numpy as np
import pytest
import torch

from timerome.ops import (
    _lowrank,
    cholesky_append,
    cholesky_append_reference,
    cholesky_delete,
    cholesky_delete_reference,
    ridge_cholesky,
    sparse_lowrank_residual,
)


def keys_of_condition(n, d, condition, ridge, seed=0):
    """Keys with singular values from 1 down, for which K Kᵀ + ridge I has the condition number."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(d, n, generator=generator).double()).Q
    smallest = max(0.0, (1 + ridge) / condition - ridge) ** 0.5
    singular = torch.logspace(0, np.log10(max(smallest, 1e-6)), n).double()
    return (left * singular) @ right.T


def condition_of(keys, ridge):
    keys = keys.double().cpu()
    return float(torch.linalg.cond(keys @ keys.T + ridge * torch.eye(len(keys)).double()))


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


# --- sparse_lowrank_residual.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["nothing to select", "one pass", "products, expansion", "products"])
@pytest.mark.parametrize("condition", [4e1, 5e2, 2e3, 2e4, 4e4])
def test_residual_is_as_accurate_as_float32_products(condition, way, dtype, monkeypatch, device):
    """At most twice the error of float32 PyTorch, both against float64 on the same stored tensors."""
    if way != "nothing to select":
        monkeypatch.setattr(_lowrank, "_all_of_it", lambda *a: False)
    if way != "one pass":
        monkeypatch.setattr(_lowrank, "few_keys", lambda *a: False)
    if way == "products":
        monkeypatch.setattr(_lowrank, "_FEW_VALUES", 0)
    n, d = 40, 1024
    ridge = 1 / condition
    keys = keys_of_condition(n, d, condition, ridge / 2).to(device, dtype)
    assert condition / 2 < condition_of(keys, ridge / 2) < 2 * condition
    generator = torch.Generator().manual_seed(1)
    h = (
        torch.randn(200, n, generator=generator) @ keys.cpu().float() + 0.1 * torch.randn(200, d, generator=generator)
    ).to(device, dtype)
    values = torch.randn(n, d, generator=generator).to(device, dtype)
    coef = ridge_cholesky(keys, ridge=ridge / 2, relative=False).inverse.float()
    exact = h.double() @ keys.double().T @ coef.double() @ values.double()
    # A float32 copy of h: the rounding of the sum to half precision would hide what is measured.
    found = sparse_lowrank_residual(h.float(), keys, coef, values).double() - h.double()
    single = h.float() @ keys.float().T @ coef @ values.float()
    single = (h.float() + single).double() - h.double()
    assert relative_error(found, exact) <= 2 * relative_error(single, exact)


# --- ridge_cholesky and the factor's rows, against an inverse in extended precision.


def extended_inverse(keys, ridge):
    """(K Kᵀ + ridge I)⁻¹ by elimination with 64-bit mantissas: 2000 times finer than float64."""
    assert np.finfo(np.longdouble).eps < 1e-18
    k = keys.double().cpu().numpy().astype(np.longdouble)
    n = len(k)
    work = np.concatenate([k @ k.T + np.longdouble(ridge) * np.eye(n, dtype=np.longdouble), np.eye(n)], axis=1)
    for i in range(n):  # positive definite: no pivoting
        work[i] /= work[i, i]
        others = np.arange(n) != i
        work[others] -= work[others, i : i + 1] * work[i]
    return work[:, n:]


def error_of(inverse, exact):
    difference = inverse.double().cpu().numpy().astype(np.longdouble) - exact
    return float(np.linalg.norm(difference.astype(np.float64)) / np.linalg.norm(exact.astype(np.float64)))


needs_long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 1e-18, reason="needs a long double with more digits than float64"
)


@needs_long_double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("condition", [5e1, 4e4, 4e5, 4e6])
def test_ridge_inverse_is_far_more_accurate_than_float32(condition, dtype, device):
    """At most twice the error of float32 PyTorch; in fact rounding A to float32 is all that is lost."""
    n, ridge = 60, 0.5 / condition
    keys = keys_of_condition(n, 128, condition, ridge).to(device, dtype)
    assert condition / 2 < condition_of(keys, ridge) < 2 * condition
    exact = extended_inverse(keys, ridge)
    k = keys.float()
    single = torch.linalg.inv(k @ k.mT + ridge * torch.eye(n, device=device))
    ours = ridge_cholesky(keys, ridge=ridge, relative=False).inverse
    assert error_of(ours, exact) <= 2 * error_of(single, exact)
    assert error_of(ours, exact) <= 1e-15 * condition
    assert error_of(ours.float(), exact) <= 1.2e-7


@needs_long_double
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("planted", [True, False])
@pytest.mark.parametrize("condition", [5e1, 4e4, 4e6])
def test_solutions_are_at_least_as_accurate_as_in_float32(condition, planted, dtype, device):
    """Values of which most cancels, because the solution was there first, and values of no relation to the keys."""
    n, ridge = 60, 0.5 / condition
    keys = keys_of_condition(n, 128, condition, ridge).to(device, torch.float32)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(n, 9, generator=generator).double().to(device)
    if planted:
        k = keys.double()
        values = (k @ k.mT + ridge * torch.eye(n, device=device)) @ values
    values = values.to(dtype)
    exact = extended_inverse(keys, ridge) @ values.double().cpu().numpy().astype(np.longdouble)
    single = torch.linalg.solve(keys @ keys.mT + ridge * torch.eye(n, device=device), values.float())
    ours = ridge_cholesky(keys, values, ridge=ridge, relative=False).solution
    assert ours.dtype == dtype
    assert error_of(ours, exact) <= 2 * error_of(single, exact)


@needs_long_double
@pytest.mark.parametrize("condition", [1e3, 1e5, 4e6])
@pytest.mark.parametrize(
    ("append", "delete"), [(cholesky_append, cholesky_delete), (cholesky_append_reference, cholesky_delete_reference)]
)
def test_a_thousand_random_appends_and_deletes(append, delete, condition):
    """Within ten times of a factor computed afresh from the same keys."""
    ridge = 0.5 / condition
    pool = keys_of_condition(64, 80, condition, ridge)
    rng = random.Random(0)
    kept: list[int] = []
    factor = torch.zeros(0, 0, dtype=torch.float64)
    seen = 0
    for step in range(1, 1001):
        free = [i for i in range(len(pool)) if i not in kept]
        if len(kept) > 30 and (not free or rng.random() < 0.5):
            j = rng.randrange(len(kept))
            factor = delete(factor, j)
            del kept[j]
        else:
            new = rng.choice(free)
            factor = append(factor, pool[kept] @ pool[new], float(pool[new] @ pool[new]) + ridge)
            kept.append(new)
        if step % 100 == 0:
            keys = pool[kept]
            exact = extended_inverse(keys, ridge)
            fresh = torch.linalg.cholesky(keys @ keys.T + ridge * torch.eye(len(kept)).double())
            errors = [error_of(torch.cholesky_inverse(x), exact) for x in (factor, fresh)]
            assert errors[0] <= 10 * errors[1], (step, errors)
            seen = max(seen, condition_of(keys, ridge))
    assert seen > condition / 100 and len(kept) > 20

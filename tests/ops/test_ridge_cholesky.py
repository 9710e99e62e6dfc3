import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.ops import NotPositiveDefiniteError, ridge_cholesky, ridge_cholesky_reference


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (16, 64), (40, 33), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_solves_the_ridge_system(batch, n, d, dtype, device):
    keys = torch.randn(*batch, n, d).to(device, dtype)
    x = torch.randn(*batch, n, 6, dtype=torch.float64, device=device)
    for relative in (True, False):
        k = keys.double()
        scale = k.square().sum(-1).mean(-1) if relative and n else torch.ones(batch, device=device).double()
        system = k @ k.mT + 0.1 * scale[..., None, None] * torch.eye(n, device=device)
        factor = ridge_cholesky(keys, system @ x, ridge=0.1, relative=relative)  # x first, then b = system x
        assert factor.inverse.dtype == factor.cholesky.dtype == factor.scale.dtype == torch.float64
        torch.testing.assert_close(factor.scale, scale)
        torch.testing.assert_close(factor.solution, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factor.inverse @ system, torch.eye(n, device=device).double().expand_as(system))
        torch.testing.assert_close(factor.cholesky @ factor.cholesky.mT, system)
        assert torch.equal(factor.cholesky, factor.cholesky.tril())
        assert factor.info.dtype == torch.int32 and factor.info.shape == batch and not factor.info.any()


def test_equals_linalg_solve_in_float64(device):
    keys, values = torch.randn(4, 20, 64, device=device), torch.randn(4, 20, 8, device=device)
    k = keys.double()
    system = k @ k.mT + 0.01 * torch.eye(20, device=device)
    exact = torch.linalg.solve(system, values.double())
    factor = ridge_cholesky(keys, values.double(), ridge=0.01, relative=False)
    torch.testing.assert_close(factor.solution, exact, rtol=1e-11, atol=1e-11)
    rounded = ridge_cholesky(keys, values, ridge=0.01, relative=False).solution
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("ridge", [1e-2, 1e-4, 1e-6])
def test_float32_keys_lose_nothing(ridge, device):
    """Forward error 1e-12 times the condition number at most; a float32 Gram matrix would give 1e-7 times it."""
    shared = torch.randn(512, device=device)
    keys = shared + 0.1 * torch.randn(60, 512, device=device)
    factor = ridge_cholesky(keys, ridge=ridge)
    k = keys.double()
    system = k @ k.mT + ridge * factor.scale * torch.eye(60, device=device).double()
    x = torch.randn(60, 3, device=device).double()
    error = (factor.inverse @ (system @ x) - x).norm() / x.norm()
    assert error < 1e-12 * torch.linalg.cond(system)


def test_relative_ridge_does_not_depend_on_scale(device):
    keys = torch.randn(6, 10, device=device)
    a, b = ridge_cholesky(keys, ridge=0.1), ridge_cholesky(1000 * keys, ridge=0.1)
    torch.testing.assert_close(a.inverse, 1e6 * b.inverse, rtol=1e-5, atol=1e-8)


def test_failing_entries_are_named(device):
    keys = torch.randn(2, 3, 4, 8, device=device)
    keys[0, 1, 2, 3] = math.nan
    keys[1, 2, 0, 0] = math.inf
    keys[1, 0] = 0.0  # nothing to scale the ridge by
    with pytest.raises(NotPositiveDefiniteError) as caught:
        ridge_cholesky(keys, ridge=0.1)
    assert caught.value.entries == [(0, 1), (1, 0), (1, 2)]
    message = str(caught.value)
    assert message.startswith("ridge_cholesky: 3 of 6 systems are not positive definite")
    assert "entry (0, 1): not finite" in message and "entry (1, 0): leading minor 1 is not positive" in message
    assert "Likely causes" in message and "raise it tenfold" in message


def test_single_failing_system(device):
    with pytest.raises(NotPositiveDefiniteError, match=r"1 of 1 systems .* \(not finite\)") as caught:
        ridge_cholesky(torch.full((2, 3), math.nan, device=device), ridge=0.1)
    assert caught.value.entries == [()]
    assert isinstance(caught.value, RuntimeError)


def test_failure_does_not_touch_other_entries(device):
    gram = torch.stack([torch.eye(3), -torch.eye(3), torch.full((3, 3), math.nan), 3 * torch.eye(3)]).double()
    gram[1, 0, 0] = 1.0
    ridge = torch.full((4,), 0.5, dtype=torch.float64)
    inverse, cholesky, info = ridge_cholesky_reference(gram.to(device), ridge.to(device))
    assert info.tolist() == [0, 2, -1, 0]
    assert inverse[1:3].isnan().all() and cholesky[1:3].isnan().all()
    torch.testing.assert_close(inverse[0].cpu(), torch.eye(3).double() / 1.5)
    torch.testing.assert_close(inverse[3].cpu(), torch.eye(3).double() / 3.5)


def test_first_failure_is_named(device):
    """A pivot that is all rounding error, before one that is negative."""
    gram = torch.eye(4).double()
    gram[1, 0] = gram[0, 1] = 1.0
    gram[1, 1] += torch.finfo(torch.float64).eps
    gram[3, 3] = -1.0
    systems = torch.stack([gram, torch.eye(4).double()]).to(device)
    assert torch.ops.timerome.ridge_cholesky(systems, systems.new_zeros(2), None)[2].tolist() == [2, 0]


@pytest.mark.parametrize("batch", [(), (3,)])
def test_opcheck(batch, device):
    k = torch.randn(*batch, 4, 6, dtype=torch.float64, device=device)
    arguments = (k @ k.mT, torch.ones(batch, dtype=torch.float64, device=device), None)
    torch.library.opcheck(torch.ops.timerome.ridge_cholesky.default, arguments)
    for lengths in (None, torch.full(batch, 2, device=device)):
        torch.library.opcheck(torch.ops.timerome.gram.default, (k.float(), lengths))


def test_compiles_without_graph_break(device):
    k = torch.randn(2, 4, 6, dtype=torch.float64, device=device)

    def f(k):
        return torch.ops.timerome.ridge_cholesky(k @ k.mT, k.new_ones(2), None)[0]

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(k), f(k))


@pytest.mark.parametrize(
    ("keys", "values", "ridge", "error", "message"),
    [
        (torch.ones(2, 3).int(), None, 0.1, TypeError, "keys of a floating dtype, got torch.int32"),
        (torch.ones(3), None, 0.1, ValueError, r"keys of shape \(\*batch, N, d\), got \(3,\)"),
        (torch.ones(2, 3), None, -0.1, ValueError, "finite ridge >= 0, or a sequence of them, got -0.1"),
        (torch.ones(2, 3), None, math.nan, ValueError, "finite ridge >= 0, .*, got nan"),
        (torch.ones(2, 3), None, [0.1, math.inf], ValueError, "finite ridge >= 0"),
        (torch.ones(2, 3), None, [[0.1]], ValueError, "finite ridge >= 0"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), 0.1, TypeError, "values of a floating dtype"),
        (torch.ones(2, 3), torch.ones(3, 3), 0.1, ValueError, r"values of shape \(2, 'dv'\), .* got \(3, 3\)"),
    ],
)
def test_errors(keys, values, ridge, error, message):
    with pytest.raises(error, match="^ridge_cholesky: expected .*" + message):
        ridge_cholesky(keys, values, ridge=ridge)


def test_op_checks_its_arguments():
    eye = torch.eye(2, dtype=torch.float64)
    for gram, ridge, error in (
        (eye.float(), torch.ones(()).double(), TypeError),
        (eye[:1], torch.ones(()).double(), ValueError),
        (eye, torch.ones(1, 1).double(), ValueError),
    ):
        with pytest.raises(error, match="^ridge_cholesky: expected"):
            torch.ops.timerome.ridge_cholesky(gram, ridge, None)


def test_ridges_share_a_gram_matrix(device):
    keys, values = torch.randn(3, 2, 7, 20, device=device), torch.randn(3, 2, 7, 4, device=device)
    ridges = [0.0, 1e-3, 0.5]
    together = ridge_cholesky(keys, values, ridge=ridges)
    assert together.inverse.shape == (3, 3, 2, 7, 7) and together.info.shape == (3, 3, 2)
    for i, ridge in enumerate(ridges):
        alone = ridge_cholesky(keys, values, ridge=ridge)
        for name in ("inverse", "cholesky"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.solution[i], alone.solution)
        assert torch.equal(together.scale, alone.scale)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_ragged_entries_equal_their_own_systems(lengths, relative, several):
    torch.manual_seed(1)
    keys, values = torch.randn(len(lengths), 9, 12), torch.randn(len(lengths), 9, 3)
    for b, length in enumerate(lengths):
        keys[b, length:], values[b, length:] = math.nan, math.inf  # padding may hold anything
    ridge = [0.1, 0.3] if several else 0.1
    factor = ridge_cholesky(keys, values, ridge=ridge, relative=relative, lengths=torch.tensor(lengths))
    for b, length in enumerate(lengths):
        alone = ridge_cholesky(keys[b, :length], values[b, :length], ridge=ridge, relative=relative)
        for name in ("inverse", "cholesky"):
            whole = getattr(factor, name)[..., b, :, :]
            torch.testing.assert_close(whole[..., :length, :length], getattr(alone, name))
            assert not whole[..., length:, :].any() and not whole[..., length:].any()
        torch.testing.assert_close(factor.solution[..., b, :length, :], alone.solution)
        assert not factor.solution[..., b, length:, :].any()
        if length:
            torch.testing.assert_close(factor.scale[b], alone.scale)


def test_status_instead_of_an_error(device):
    keys = torch.randn(3, 4, 8, device=device)
    keys[1, 0, 0], keys[2, 3] = math.nan, keys[2, 1]
    factor = ridge_cholesky(keys, torch.ones(3, 4, 2, device=device), ridge=[0.0, 0.1], check=False)
    assert factor.info.tolist() == [[0, -1, 4], [0, -1, 0]]
    assert factor.failures() == {
        (0, 1): "not finite",
        (0, 2): "leading minor 4 is not positive",
        (1, 1): "not finite",
    }
    assert factor.solution.isnan().all(-1).all(-1).tolist() == [[False, True, True], [False, True, False]]
    with pytest.raises(NotPositiveDefiniteError) as caught:
        ridge_cholesky(keys, ridge=[0.0, 0.1])
    assert caught.value.entries == [(0, 1), (0, 2), (1, 1)]


@pytest.mark.parametrize("n", [2, 30, 200])
def test_a_singular_gram_matrix_without_ridge_is_noticed(n, device):
    """Rounding leaves a tiny positive pivot as often as not."""
    for seed in range(5):
        keys = torch.randn(n, 300, generator=torch.Generator().manual_seed(seed)).to(device)
        keys[-1] = keys[:-1].mean(0)
        assert ridge_cholesky(keys.double(), ridge=0.0, check=False).info == n


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1.0, 2.0]), TypeError, "lengths in int64"),
        (torch.tensor([1]), ValueError, r"lengths of shape \(2,\), .* got \(1,\)"),
        (torch.tensor([1, 4]), ValueError, "lengths from 0 to N = 3, got 1 to 4"),
        (torch.tensor([-1, 2]), ValueError, "got -1 to 2"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match="^ridge_cholesky: expected .*" + message):
        ridge_cholesky(torch.ones(2, 3, 4), ridge=0.1, lengths=lengths)

import random

import pytest
import torch

from timerome.ops import (
    NotPositiveDefiniteError,
    cholesky_append,
    cholesky_append_reference,
    cholesky_delete,
    cholesky_delete_reference,
)

APPENDS = [cholesky_append, cholesky_append_reference]
DELETES = [cholesky_delete, cholesky_delete_reference]


def gram_of(keys, ridge):
    keys = keys.double()
    return keys @ keys.T + ridge * torch.eye(len(keys), dtype=torch.float64)


@pytest.mark.parametrize("n", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("append", APPENDS)
def test_append_equals_refactoring(append, n):
    gram = gram_of(torch.randn(n + 1, 16), 0.1)
    factor = torch.linalg.cholesky(gram[:n, :n])
    before = factor.clone()
    new = append(factor, gram[n, :n], float(gram[n, n]))
    torch.testing.assert_close(new, torch.linalg.cholesky(gram), rtol=1e-10, atol=1e-10)
    assert torch.equal(new, new.tril()) and torch.equal(factor, before)


@pytest.mark.parametrize("n", [1, 2, 9, 40])
@pytest.mark.parametrize("delete", DELETES)
def test_delete_equals_refactoring(delete, n):
    gram = gram_of(torch.randn(n, 16), 0.1)
    factor = torch.linalg.cholesky(gram)
    before = factor.clone()
    for j in sorted({0, n // 2, n - 1}):
        keep = [i for i in range(n) if i != j]
        new = delete(factor, j)
        torch.testing.assert_close(new, torch.linalg.cholesky(gram[keep][:, keep]), rtol=1e-10, atol=1e-10)
        assert new.shape == (n - 1, n - 1) and torch.equal(new, new.tril()) and (new.diagonal() > 0).all()
    assert torch.equal(factor, before)


@pytest.mark.parametrize("spread", [1.0, 0.05])  # 0.05: keys that share a direction, condition number about 1e5
@pytest.mark.parametrize(("append", "delete"), list(zip(APPENDS, DELETES, strict=True)))
def test_random_edits_are_as_good_as_refactoring(append, delete, spread):
    rng = random.Random(0)
    shared = torch.randn(64)
    pool = (shared + spread * torch.randn(200, 64)).double()
    ridge = 1e-3
    kept: list[int] = []
    factor = torch.zeros(0, 0, dtype=torch.float64)
    for step in range(200):
        if kept and rng.random() < 0.4:
            j = rng.randrange(len(kept))
            factor = delete(factor, j)
            del kept[j]
        else:
            new = pool[step]
            factor = append(factor, pool[kept] @ new, float(new @ new) + ridge)
            kept.append(step)
    gram = gram_of(pool[kept], ridge)
    wanted = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    error = (torch.cholesky_inverse(factor) - wanted).norm() / wanted.norm()
    assert len(kept) > 20
    assert error < 1e-14 * torch.linalg.cond(gram)


@pytest.mark.parametrize("append", APPENDS)
@pytest.mark.parametrize(("g", "gnn"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (0.0, -1.0)])
def test_append_refuses_what_is_not_positive_definite(append, g, gnn):
    factor = torch.eye(3, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="^cholesky_append: the matrix of order 4 .*Likely causes") as e:
        append(factor, torch.tensor([g, 0.0, 0.0]).double(), gnn)
    assert e.value.entries == [()]
    assert torch.equal(factor, torch.eye(3).double())


def test_strided_factor():
    gram = gram_of(torch.randn(6, 16), 0.1)
    factor = torch.linalg.cholesky(gram)
    strided = factor.T.contiguous().T
    g = torch.randn(12).double()[::2]
    torch.testing.assert_close(cholesky_append(strided, g, 99.0), cholesky_append(factor, g.contiguous(), 99.0))
    torch.testing.assert_close(cholesky_delete(strided, 2), cholesky_delete(factor, 2))


def test_upper_triangle_is_not_read():
    factor = torch.linalg.cholesky(gram_of(torch.randn(5, 8), 0.1))
    dirty = factor + torch.full((5, 5), 7.0).triu(1)
    g = torch.randn(5).double()
    for append in APPENDS:
        torch.testing.assert_close(append(dirty, g, 99.0), append(factor, g, 99.0))
    for delete in DELETES:
        torch.testing.assert_close(delete(dirty, 1), delete(factor, 1))


@pytest.mark.parametrize("append", APPENDS)
@pytest.mark.parametrize(
    ("factor", "g", "error", "message"),
    [
        (torch.eye(2), torch.zeros(2).double(), TypeError, "cholesky in float64, got torch.float32"),
        (torch.eye(2).double(), torch.zeros(2), TypeError, "g in float64"),
        (torch.zeros(2, 3).double(), torch.zeros(2).double(), ValueError, r"shape \(n, n\), got \(2, 3\)"),
        (torch.eye(2).double(), torch.zeros(3).double(), ValueError, r"g of shape \(2,\), .* got \(3,\)"),
    ],
)
def test_append_errors(append, factor, g, error, message):
    with pytest.raises(error, match="^cholesky_append: expected .*" + message):
        append(factor, g, 1.0)


@pytest.mark.parametrize("delete", DELETES)
@pytest.mark.parametrize(
    ("factor", "j", "error", "message"),
    [
        (torch.eye(2), 0, TypeError, "cholesky in float64"),
        (torch.zeros(2, 3).double(), 0, ValueError, r"shape \(n, n\)"),
        (torch.eye(2).double(), 2, ValueError, "0 <= j < n = 2, got 2"),
        (torch.eye(2).double(), -1, ValueError, "got -1"),
        (torch.zeros(0, 0).double(), 0, ValueError, "n = 0"),
    ],
)
def test_delete_errors(delete, factor, j, error, message):
    with pytest.raises(error, match="^cholesky_delete: expected .*" + message):
        delete(factor, j)


def test_a_factor_grows_inside_a_larger_tensor():
    keys = torch.randn(7, 20, dtype=torch.float64)
    gram = keys @ keys.T
    room = torch.full((9, 9), torch.nan, dtype=torch.float64)
    for n in range(7):
        factor = cholesky_append(room[:n, :n], gram[n, :n], float(gram[n, n]), out=room[: n + 1, : n + 1])
        assert factor.data_ptr() == room.data_ptr()
    torch.testing.assert_close(room[:7, :7], torch.linalg.cholesky(gram))
    assert room[7:].isnan().all() and room[:, 7:].isnan().all()
    apart = torch.empty(8, 10, dtype=torch.float64)[:, :8]
    again = cholesky_append(room[:7, :7], torch.zeros(7).double(), 4.0, out=apart)
    assert again is apart and torch.equal(again[:7, :7], room[:7, :7]) and again[7, 7] == 2.0


def test_a_failed_append_leaves_the_corner():
    room = torch.eye(4, dtype=torch.float64)
    before = room[:3, :3].clone()
    with pytest.raises(NotPositiveDefiniteError):
        cholesky_append(room[:3, :3], torch.ones(3).double(), 1.0, out=room)
    assert torch.equal(room[:3, :3], before)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.eye(4), "out in float64"),
        (torch.eye(3).double(), r"out of shape \(4, 4\)"),
        (torch.eye(4, 8).double()[:, ::2], "contiguous rows"),
    ],
)
def test_bad_out_is_refused(out, message):
    with pytest.raises(ValueError, match=message):
        cholesky_append(torch.eye(3).double(), torch.zeros(3).double(), 1.0, out=out)


def test_out_may_not_overlap_otherwise():
    room = torch.eye(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="overlap"):
        cholesky_append(room[1:4, 1:4], torch.zeros(3).double(), 1.0, out=room[:4, :4])

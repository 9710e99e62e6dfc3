import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timerome.ops import (
    _lowrank,
    kept_count,
    ridge_cholesky,
    sparse_lowrank_residual,
    sparse_lowrank_residual_reference,
    sparsify_add_reference,
)
from timerome.ops._lowrank_cuda import product

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(shape=(2, 7, 24), n=5, m=5, dtype=torch.float32, device="cpu"):
    d = shape[-1]
    h, keys, values = torch.randn(shape).to(dtype), torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    coef = torch.linalg.inv(keys.double() @ keys.double().T + torch.eye(n))[:, :m].float()
    return [x.to(device) for x in (h, keys, coef, values)]


def edited(out, h):
    """Which rows are not what they were."""
    return (out.nan_to_num(7) != h.nan_to_num(7)).any(-1)


def exact(h, keys, coef, values, mean=None):
    x = h.double() if mean is None else h.double() - mean.double()
    return x @ keys.double().T @ coef.double() @ values.double()


@given(st.integers(0, 9000), st.integers(0, 999))
def test_kept_count_is_exact_for_decimal_fractions(d, thousandths):
    wanted = -(-(1000 - thousandths) * d // 1000)
    assert kept_count(d, thousandths / 1000) == wanted
    assert kept_count(d, float(torch.tensor(thousandths / 1000))) == wanted  # a fraction that was stored in float32


def test_kept_count_examples():
    assert [kept_count(10, q) for q in (0.0, 0.7, 0.9, 0.95)] == [10, 3, 1, 1]
    for q in (-0.1, 1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^kept_count: expected sparsity in \[0, 1\)"):
            kept_count(10, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8), (2, 7, 24), (2, 1, 3, 33)])
def test_dense_value(shape, dtype, device):
    h, keys, coef, values = case(shape, 5, 3, dtype, device)
    mean = torch.randn(shape[-1], device=device)
    for mu in (None, mean):
        out = sparse_lowrank_residual(h, keys, coef, values, mean=mu, alpha=0.5)
        wanted = h.double() + 0.5 * exact(h, keys, coef, values, mu)
        eps = torch.finfo(dtype).eps
        assert out.shape == h.shape and out.dtype == dtype
        torch.testing.assert_close(out.double(), wanted, rtol=eps, atol=20 * (eps if device == "cuda" else 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(dtype, device):
    h, keys, coef, values = case((2, 30, 200), 9, 6, dtype, device)
    options = {
        "mean": torch.randn(200, device=device) / 10,
        "alpha": 0.7,
        "sparsity": 0.9,
        "row_mask": torch.rand(2, 30, device=device) < 0.8,
        "gate_threshold": 0.05,
    }
    out = sparse_lowrank_residual(h, keys, coef, values, **options)
    wanted = sparse_lowrank_residual_reference(h, keys, coef, values, **options)
    assert torch.equal(edited(out, h), edited(wanted, h))
    assert 0 < edited(out, h).sum() < options["row_mask"].sum()
    # Another order of summation may flip an entry at the threshold; everything else is equal to rounding.
    close = torch.isclose(out.float(), wanted.float(), rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert close.float().mean() > (0.999 if device == "cpu" else 0.98)


def test_exact_on_integers(device):
    h = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], device=device)
    keys = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], device=device)
    coef = torch.tensor([[1.0], [2.0]], device=device)
    values = torch.tensor([[1.0, -3.0, 2.0, 0.0]], device=device)
    out = sparse_lowrank_residual(h, keys, coef, values, alpha=2.0, sparsity=0.5)
    assert out.tolist() == [[1.0, 2.0 - 30.0, 20.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", ["plain", "autocast", "medium"])
@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 2e-3), (0.3, 2e-3), (0.1, 3e-3), (0.03, 5e-3)])
def test_correlated_keys(spread, tolerance, context, dtype, device):
    """Keys that share a direction: where scores rounded to bfloat16, or V = A D folded in it, are wrong by 100 %."""
    n, d = 40, 1024
    shared = torch.randn(d)
    keys = (shared + spread * torch.randn(n, d)).to(device, dtype)
    h = (shared + spread * torch.randn(64, d)).to(device, dtype)
    values = torch.randn(n, d).to(device, dtype)
    coef = ridge_cholesky(keys, ridge=1e-4).inverse.float()
    residual = exact(h, keys, coef, values)

    # out - h with h = 0 would change the scores, so read the residual off a float32 copy of h.
    before = torch.get_float32_matmul_precision()
    try:
        if context == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, dtype=torch.bfloat16, enabled=context == "autocast"):
            out = sparse_lowrank_residual(h.float(), keys, coef, values)
        assert torch.get_float32_matmul_precision() == ("medium" if context == "medium" else before)
    finally:
        torch.set_float32_matmul_precision(before)
    assert out.dtype == torch.float32
    error = (out.double() - h.double() - residual).norm() / residual.norm()
    eager = (h.float() @ keys.float().T @ coef @ values.float() - residual).norm() / residual.norm()
    assert error < max(tolerance, 2 * eager)  # at the largest condition number eager float32 itself loses 5e-3

    if dtype == torch.bfloat16 and spread <= 0.1:  # the trap is real: the obvious bfloat16 code fails this test
        naive = (h @ keys.T).float() @ coef @ values.float()
        assert (naive.double() - residual).norm() / residual.norm() > 0.3


def test_mean_is_taken_off_before_theproduct(device):
    """A mean far larger than what is left: h Kᵀ − μ Kᵀ would cancel."""
    h, keys, coef, values = case((3, 256), device=device)
    mean = 1e4 * torch.randn(256, device=device)
    shifted = h + mean
    wanted = exact(shifted, keys, coef, values, mean)
    out = sparse_lowrank_residual(shifted, keys, coef, values, mean=mean)
    assert ((out - shifted).double() - wanted).abs().max() < 4e-3  # one rounding of h, which is about 1e4


def test_protected_keys_open_no_gate(device):
    keys, h = torch.eye(2, 3, device=device), torch.tensor([[0.0, 2.0, 0.0]], device=device)
    coef, values = torch.ones(2, 1, device=device), torch.ones(1, 3, device=device)  # the second key has no value
    for function in (sparse_lowrank_residual, sparse_lowrank_residual_reference):
        assert torch.equal(function(h, keys, coef, values, gate_threshold=0.5), h)


def test_gate_follows_cosine_similarity(device):
    keys = torch.tensor([[3.0, 0.0], [0.0, 0.0]], device=device)  # the second has no direction and never matches
    h = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [0.0, 0.0], [-1.0, 0.0], [math.nan, 1.0]], device=device)
    values, coef = torch.ones(2, 2, device=device), torch.eye(2, device=device)

    def passing(tau, **options):
        out = sparse_lowrank_residual(h, keys, coef, values, gate_threshold=tau, **options)
        return edited(out, h).nonzero().flatten().tolist()

    assert passing(0.99) == [0]
    assert passing(0.7) == [0, 1]
    assert passing(0.7, row_mask=torch.tensor([0, 1, 1, 1, 1, 1], device=device) > 0) == [1]
    assert passing(1.1) == []
    assert passing(-1.0) == [0, 1, 4]  # not the row of norm zero or the row with NaN; the third is at right angles
    # The angle is taken from the mean, too.
    out = sparse_lowrank_residual(
        h[2:3], keys, coef, values, gate_threshold=0.99, mean=torch.tensor([-9.0, 5.0], device=device)
    )
    assert not torch.equal(out, h[2:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_out_are_bit_identical(dtype, device):
    h, keys, coef, values = case((2, 9, 65), dtype=dtype, device=device)
    h[0, 0] = -0.0
    mask = torch.rand(2, 9, device=device) < 0.5
    mask[0, 0] = False
    mask[1, 1] = True
    out = sparse_lowrank_residual(h, keys, coef, values, row_mask=mask)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits)[~mask], h.view(bits)[~mask])
    assert (out[mask] != h[mask]).any(-1).all()


def test_sparsity_limits_the_changed_entries(device):
    h, keys, coef, values = case((4, 5, 50), device=device)
    for q, k in ((0.0, 50), (0.5, 25), (0.9, 5)):
        out = sparse_lowrank_residual(h, keys, coef, values, sparsity=q)
        assert ((out != h).sum(-1) == k).all()


@pytest.mark.parametrize(("shape", "n", "m"), [((0, 8), 3, 3), ((2, 0, 8), 3, 3), ((2, 4, 8), 0, 0), ((4, 8), 3, 0)])
@pytest.mark.parametrize("gate", [None, 0.1])
def test_empty(shape, n, m, gate, device):
    h, keys, coef, values = case(shape, n, m, device=device)
    out = sparse_lowrank_residual(h, keys, coef, values, gate_threshold=gate)
    assert torch.equal(out, h) and out.data_ptr() != h.data_ptr() or h.numel() == 0
    assert torch.equal(out, sparse_lowrank_residual_reference(h, keys, coef, values, gate_threshold=gate))


def test_inputs_are_not_modified(device):
    for dtype in DTYPES:
        arguments = case(dtype=dtype, device=device)
        copies = [x.clone() for x in arguments]
        sparse_lowrank_residual(*arguments, sparsity=0.5, gate_threshold=0.0)
        assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


def test_non_contiguous(device):
    h, keys, coef, values = case((6, 4, 24), device=device)
    wanted = sparse_lowrank_residual(h.transpose(0, 1).contiguous(), keys, coef, values, sparsity=0.5)
    strided = [x.t().contiguous().t() for x in (keys, coef, values)]
    torch.testing.assert_close(sparse_lowrank_residual(h.transpose(0, 1), *strided, sparsity=0.5), wanted)
    rows = torch.stack([h[0], -h[0]], dim=-1)[..., 0]  # two dimensions, every other element
    wanted = sparse_lowrank_residual(h[0], keys, coef, values, sparsity=0.5)
    torch.testing.assert_close(sparse_lowrank_residual(rows, keys, coef, values, sparsity=0.5), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    h, keys, coef, values = case((2, 3, 8), 4, 2, dtype, device)
    mask, mean = torch.rand(2, 3, device=device) < 0.5, torch.randn(8, device=device)
    op = torch.ops.timerome.sparse_lowrank_residual.default
    torch.library.opcheck(op, (h, keys, coef, values, None, None, None, None, 0, None, 1.0, 4))
    torch.library.opcheck(op, (h, keys, coef, values, mean, mask, None, None, 0, 0.1, 0.5, 4))


def test_compiles_without_graph_break(device):
    h, keys, coef, values = case((2, 3, 8), device=device)
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)

    def f(h):
        return sparse_lowrank_residual(h * 2, keys, coef, values, sparsity=0.5, row_mask=mask, gate_threshold=0.0) + 1

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(h), f(h))


@pytest.mark.slow
def test_compiles_with_the_default_backend(device):
    h, keys, coef, values = case((2, 3, 8), device=device)

    def f(h):
        return sparse_lowrank_residual(h * 2, keys, coef, values, sparsity=0.5, gate_threshold=0.0) + 1

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(h), f(h))


def test_product_of_half_precision_matrices_is_float32():
    """Also on fake tensors of a GPU, where the product takes another route."""
    a = torch.full((1, 2), 256.0, dtype=torch.bfloat16)
    b = torch.tensor([[1.0], [2**-8]], dtype=torch.bfloat16)
    assert product(a, b).item() == 257.0  # bfloat16 would round to 256 or 258
    with torch._subclasses.FakeTensorMode():
        for dtype in DTYPES:
            x = torch.empty(3, 4, dtype=dtype, device="cuda")
            assert product(x, x.mT).dtype == torch.float32


def test_gradient_is_refused_not_wrong():
    h, keys, coef, values = case()
    out = sparse_lowrank_residual(h.requires_grad_(), keys, coef, values)
    with pytest.raises(RuntimeError, match="no gradient"):
        out.sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(sparse_lowrank_residual(h, keys, coef, values), out.detach())


@pytest.mark.parametrize("function", [sparse_lowrank_residual, sparse_lowrank_residual_reference])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.zeros(3, 8).double()}, TypeError, "h in float32, float16 or bfloat16, got torch.float64"),
        ({"keys": torch.zeros(5, 8).int()}, TypeError, "keys in"),
        ({"coef": torch.zeros(5, 4).bfloat16()}, TypeError, "coef in float32, got torch.bfloat16"),
        ({"mean": torch.zeros(8).half()}, TypeError, "mean in float32"),
        ({"row_mask": torch.zeros(3)}, TypeError, "row_mask in bool"),
        ({"h": torch.zeros(8)}, ValueError, r"h of shape \(\*batch, T, d\), got \(8,\)"),
        ({"keys": torch.zeros(5, 7)}, ValueError, r"keys of shape \(N, 8\), .* got \(5, 7\)"),
        ({"values": torch.zeros(4, 9)}, ValueError, r"values of shape \(M, 8\)"),
        ({"coef": torch.zeros(4, 5)}, ValueError, r"coef of shape \(N, M\) = \(5, 4\), .* got \(4, 5\)"),
        ({"coef": torch.zeros(5, 6), "values": torch.zeros(6, 8)}, ValueError, "at most one value per key"),
        ({"mean": torch.zeros(1, 8)}, ValueError, r"mean of shape \(8,\)"),
        ({"row_mask": torch.zeros(1, 3).bool()}, ValueError, r"row_mask of shape \(3,\)"),
    ],
)
def test_errors(function, change, error, message):
    arguments = {
        "h": torch.zeros(3, 8),
        "keys": torch.zeros(5, 8),
        "coef": torch.zeros(5, 4),
        "values": torch.zeros(4, 8),
        **change,
    }
    with pytest.raises(error, match="^sparse_lowrank_residual: expected .*" + message):
        function(**arguments)


def test_bad_sparsity():
    with pytest.raises(ValueError, match="sparsity in"):
        sparse_lowrank_residual(*case(), sparsity=1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n", "m"), [((3, 9, 40), 5, 3), ((70, 1030), 64, 64), ((17, 4100), 1, 1), ((9, 7), 16, 2)]
)
@pytest.mark.parametrize("gate", [None, 0.02])
def test_ways_of_the_cpu(shape, n, m, gate, dtype, monkeypatch):
    """One compiled pass, products and expansion or products alone, in blocks, and the definition agree.

    Also where a vector does not divide a row, or a block the rows.
    """
    h, keys, coef, values = case(shape, n, m, dtype)
    options = {"mean": torch.randn(shape[-1]) / 10, "gate_threshold": gate, "row_mask": torch.rand(shape[:-1]) < 0.7}
    options |= {"sparsity": 0.5}
    wanted = sparse_lowrank_residual_reference(h, keys, coef, values, **options)
    ways = [sparse_lowrank_residual(h, keys, coef, values, **options)]
    few = _lowrank._few_keys_cpu
    monkeypatch.setattr(_lowrank, "_few_keys_cpu", lambda *a: pytest.fail("not the way that was meant"))
    monkeypatch.setattr(_lowrank, "few_keys", lambda *a: False)
    for block in (_lowrank._BLOCK, 40 * shape[-1]):
        for most in (0, 64):
            monkeypatch.setattr(_lowrank, "_BLOCK", block)
            monkeypatch.setattr(_lowrank, "_FEW_VALUES", most)
            ways.append(sparse_lowrank_residual(h, keys, coef, values, **options))
    monkeypatch.setattr(_lowrank, "_few_keys_cpu", few)
    eps = torch.finfo(dtype).eps
    for out in ways:
        assert torch.equal(edited(out, h), edited(wanted, h))
        close = torch.isclose(out.float(), wanted.float(), rtol=eps, atol=1e-4)
        assert close.float().mean() > 0.999
    assert 0 < edited(wanted, h).sum() < torch.tensor(shape[:-1]).prod()


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("chosen", [(), ("row_mask",), ("gate_threshold",), ("row_mask", "gate_threshold")])
@pytest.mark.parametrize(("shape", "n", "m"), [((3, 9, 40), 5, 3), ((70, 1030), 40, 33)])
def test_nothing_to_select(shape, n, m, chosen, mean, few, monkeypatch):
    """Every entry of every row, or of some: one pass or, with many keys, one product more does it all."""
    if not few:
        monkeypatch.setattr(_lowrank, "few_keys", lambda *a: False)
    h, keys, coef, values = case(shape, n, m)
    options = {"alpha": 0.7, "mean": torch.randn(shape[-1]) / 10 if mean else None}
    choices = {"row_mask": torch.rand(shape[:-1]) < 0.7, "gate_threshold": 0.02}
    options |= {name: choices[name] for name in chosen}
    wanted = sparse_lowrank_residual_reference(h, keys, coef, values, **options)
    out = sparse_lowrank_residual(h, keys, coef, values, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(edited(out, h), edited(wanted, h))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_sum_is_rounded_as_in_pytorch(sparsity):
    """The strength's product and the sum are rounded one by one: the same entry is the same on every way here."""
    h, values = torch.randn(32, 1030), torch.randn(1, 1030)
    keys = torch.eye(1, 1030)
    residual = h[:, :1] * values
    out = sparse_lowrank_residual(h, keys, torch.eye(1), values, alpha=0.7, sparsity=sparsity)
    assert torch.equal(out, sparsify_add_reference(h, residual, kept_count(1030, sparsity), 0.7))


def test_result_on_large_pages():
    """Results of 32 MiB and more are asked for on large pages, from inside of what was allocated."""
    h = torch.randn(2049, 4100)
    keys, coef, values = torch.randn(2, 4100), torch.randn(2, 2), torch.randn(2, 4100)
    out = sparse_lowrank_residual(h, keys, coef, values)
    torch.testing.assert_close(out, sparse_lowrank_residual_reference(h, keys, coef, values), rtol=1e-4, atol=1e-2)

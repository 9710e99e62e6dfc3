import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.ops import sparsify_add, sparsify_add_, sparsify_add_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Nice and ugly: powers of two, odd, one, longer than one block of CUDA threads, longer than the kernel takes (8192).
SHAPES = [(4, 64), (3, 5), (1, 1), (7, 1), (2, 3, 33), (257, 130), (5, 1025), (3, 4096), (2, 8195)]

same = {"rtol": 0, "atol": 0, "equal_nan": True}


def oracle(h, r, k, alpha, mask):
    """The definition, entry by entry: sort by magnitude (NaN first), then by index."""
    out = h.clone()
    magnitude = r.abs().nan_to_num(nan=math.inf, posinf=math.inf).numpy().astype(np.float64)
    nan = r.isnan().numpy()
    for row in np.ndindex(*h.shape[:-1]):
        if mask is None or mask[row]:
            order = sorted(range(h.shape[-1]), key=lambda i: (not nan[row][i], -magnitude[row][i], i))
            for i in order[:k]:
                out[row][i] = (h[row][i].float() + torch.tensor(alpha, dtype=torch.float32) * r[row][i]).to(h.dtype)
    return out


def random_case(shape, dtype, device="cpu", levels=None):
    h = torch.randn(shape).to(dtype)
    r = torch.randn(shape) if levels is None else torch.randint(-levels, levels + 1, shape).float()
    return h.to(device), r.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype, device):
    d = shape[-1]
    for levels in (None, 2):  # distinct values, then almost nothing but ties
        h, r = random_case(shape, dtype, device, levels)
        mask = torch.rand(shape[:-1], device=device) < 0.7
        for k in sorted({0, 1, d // 10, d // 2, d - 1, d}):
            for m in (None, mask):
                wanted = sparsify_add_reference(h, r, k, 0.7, m)
                torch.testing.assert_close(sparsify_add(h, r, k, 0.7, m), wanted, **same)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_definition(data):
    d = data.draw(st.integers(1, 40))
    rows = data.draw(st.integers(0, 3))
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1e-45, 3e38])
    values = st.one_of(special, st.floats(width=32))
    entries = data.draw(st.lists(values, min_size=rows * d, max_size=rows * d))
    r = torch.tensor(entries, dtype=torch.float32).reshape(rows, d)
    k = data.draw(st.integers(0, d))
    mask = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=rows, max_size=rows)))
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    dtype = data.draw(st.sampled_from(DTYPES))
    h = torch.randn(rows, d).to(dtype)
    wanted = oracle(h, r, k, 0.5, mask)
    torch.testing.assert_close(sparsify_add_reference(h, r, k, 0.5, mask), wanted, **same)
    torch.testing.assert_close(sparsify_add(h, r, k, 0.5, mask), wanted, **same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_like_torch_on_every_half_value(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    h = every[every.isfinite()]
    # Residuals that land the sum between two neighbours, halfway included, and far outside the range.
    for r in (torch.zeros(h.shape), h.float() * 2**-9, h.float() * 2**-12, torch.full(h.shape, 3e38), h.float() * 1e-4):
        torch.testing.assert_close(sparsify_add(h, r, len(h), 1.0), (h.float() + r).to(dtype), **same)


def test_keeps_exactly_k_of_equal_values(device):
    h, r = torch.zeros(2, 1000, device=device), torch.full((2, 1000), -1.0, device=device)
    r[1, 500] = 2.0
    out = sparsify_add(h, r, 10)
    assert out[0].nonzero().flatten().tolist() == list(range(10))
    assert out[1].nonzero().flatten().tolist() == [*range(9), 500]


def test_entries_not_kept_are_copied_bit_for_bit(device):
    h = torch.tensor([[-0.0, -0.0, 1.0]], device=device)
    out = sparsify_add(h, torch.tensor([[0.0, 0.0, 5.0]], device=device), 1)
    assert torch.signbit(out[0, :2]).all() and out[0, 2] == 6


def test_nan_is_selected_first_and_propagates(device):
    r = torch.tensor([[math.inf, math.nan, 1.0, -math.nan]], device=device)
    out = sparsify_add(torch.zeros(1, 4, device=device), r, 2)
    assert out.isnan().tolist() == [[False, True, False, True]] and out[0, 0] == 0


def test_all_nan_row(device):
    out = sparsify_add(torch.zeros(1, 600, device=device), torch.full((1, 600), math.nan, device=device), 7)
    assert out.isnan().sum() == 7 and out[0, :7].isnan().all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4), (0,)])
def test_empty(shape, device):
    h = torch.randn(shape, device=device)
    assert sparsify_add(h, h.clone(), 0).shape == shape
    assert sparsify_add(h, h.clone(), shape[-1]).shape == shape
    assert sparsify_add_(h, h.clone(), shape[-1]) is h


def test_input_is_not_modified_and_output_is_new(device):
    h, r = random_case((3, 50), torch.float32, device)
    h0, r0 = h.clone(), r.clone()
    for k in (0, 10, 50):
        out = sparsify_add(h, r, k)
        assert out.data_ptr() != h.data_ptr()
        assert torch.equal(h, h0) and torch.equal(r, r0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype, device):
    h, r = random_case((9, 130), dtype, device)
    mask = torch.arange(9, device=device) % 2 == 0
    wanted = sparsify_add_reference(h, r, 13, 0.5, mask)
    assert sparsify_add_(h, r, 13, 0.5, mask) is h
    assert torch.equal(h, wanted)


def test_strided_and_offset_inputs(device):
    h, r = torch.randn(40, 8, device=device).t(), torch.randn(8, 80, device=device)[:, ::2]
    mask = torch.tensor([True, False] * 8, device=device)[::2]
    wanted = sparsify_add_reference(h, r, 4, 0.5, mask)
    assert torch.equal(sparsify_add(h, r, 4, 0.5, mask), wanted)
    sparsify_add_(h, r, 4, 0.5, mask)
    assert torch.equal(h, wanted)
    flat = torch.randn(1 + 3 * 8, device=device)  # rows that start off every vector boundary
    h, r = flat[1:].view(3, 8), torch.randn(3, 8, device=device)
    assert torch.equal(sparsify_add(h, r, 3), sparsify_add_reference(h, r, 3))


@pytest.mark.parametrize("d", [7, 64, 1023])
def test_nothing_is_written_outside_the_rows(d, device):
    guard = 1234.5
    memory = torch.full((32 + 3 * d + 32,), guard, device=device)
    h = memory[32:-32].view(3, d)
    h.copy_(torch.randn(3, d))
    untouched = h[1].clone()
    sparsify_add_(h, torch.randn(3, d, device=device), max(1, d // 3), 1.0, torch.tensor([1, 0, 1], device=device) > 0)
    assert (memory[:32] == guard).all() and (memory[-32:] == guard).all()
    assert torch.equal(h[1], untouched)


def test_same_result_for_any_number_of_threads():
    h, r = random_case((300, 1000), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(sparsify_add(h, r, 100))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("with_mask", [False, True])
def test_opcheck(with_mask, device):
    h, r = random_case((3, 10), torch.bfloat16, device)
    mask = torch.tensor([True, False, True], device=device) if with_mask else None
    torch.library.opcheck(torch.ops.timerome.sparsify_add.default, (h, r, mask, 0.5, 3))
    torch.library.opcheck(torch.ops.timerome.sparsify_add_.default, (h, r, mask, 0.5, 3))


def test_compiles_without_graph_break(device):
    h, r = random_case((3, 10), torch.float32, device)

    def f(h, r):
        return sparsify_add_(sparsify_add(h * 2, r, 3, 0.5) + 1, r, 2)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(h, r), f(h, r))


def test_fake_tensors_of_a_gpu_that_is_not_there():
    with torch._subclasses.FakeTensorMode():
        h = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="cuda").transpose(0, 1)
        out = sparsify_add(h, torch.empty(3, 2, 8, device="cuda"), 2)
    assert (out.shape, out.dtype, out.device.type) == (h.shape, torch.bfloat16, "cuda") and out.is_contiguous()


def test_gradient_is_refused_not_wrong():
    h, r = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="no gradient"):
        sparsify_add(h, r, 2).sum().backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        sparsify_add_(h * 1, r, 2)
    with torch.inference_mode():
        assert sparsify_add(h, r, 2).shape == (2, 4)


@pytest.mark.parametrize("function", [sparsify_add, sparsify_add_, sparsify_add_reference])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"h": torch.zeros(2, 4, dtype=torch.float64)},
            TypeError,
            "h in float32, float16 or bfloat16, got torch.float",
        ),
        ({"r": torch.zeros(2, 4).half()}, TypeError, "r in float32, got torch.float16"),
        ({"r": torch.zeros(2, 5)}, ValueError, r"one shape .* got \(2, 4\) and \(2, 5\)"),
        ({"h": torch.zeros(()), "r": torch.zeros(())}, ValueError, r"\(\*batch, d\)"),
        ({"k": 5}, ValueError, "0 <= k <= d = 4, got k = 5"),
        ({"k": -1}, ValueError, "got k = -1"),
        ({"mask": torch.zeros(2)}, TypeError, "bool mask, got torch.float32"),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, ValueError, r"mask of shape \(2,\), .* got \(4,\)"),
        ({"r": torch.zeros(2, 4, device="meta")}, ValueError, "one device, got cpu and meta"),
    ],
)
def test_errors(function, change, error, message):
    arguments = {"h": torch.zeros(2, 4), "r": torch.zeros(2, 4), "k": 2, **change}
    if arguments["r"].is_meta and function is not sparsify_add_reference:
        pytest.skip("a meta tensor makes the dispatcher choose the shape-only kernel")
    with pytest.raises(error, match="^sparsify_add: .*" + message):
        function(**arguments)

"""Each sequence of a batch with an edit set of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.ops import (
    Segments,
    pack_edit_sets,
    sparse_lowrank_residual,
    sparse_lowrank_residual_reference,
)
from timerome.ops._lowrank import Edit
from timerome.ops._lowrank_cuda import _gathered, _on_cuda, product

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = [sparse_lowrank_residual, sparse_lowrank_residual_reference]


def system(n, m, d, dtype=torch.float32, mean=True):
    keys, values = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    coef = torch.linalg.inv(keys.double() @ keys.double().T + torch.eye(n))[:, :m].float()
    return keys, coef, values, torch.randn(d) / 10 if mean else None


def one_by_one(h, systems, ids, **options):
    """What edit sets must equal: each sequence by itself, with its own unpacked system."""
    outs = []
    mask = options.pop("row_mask", None)
    for b, s in enumerate(ids.tolist()):
        if s == -1:
            outs.append(h[b])
            continue
        keys, coef, values, mean = systems[s]
        row_mask = None if mask is None else mask[b]
        outs.append(
            sparse_lowrank_residual_reference(h[b], keys, coef, values, mean=mean, row_mask=row_mask, **options)
        )
    return torch.stack(outs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [None, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_one_by_one(function, masked, gate, dtype, device):
    systems = [
        system(n, m, 40, dtype, mean) for n, m, mean in ((5, 5, True), (1, 1, False), (9, 3, True), (0, 0, True))
    ]
    h = torch.randn(7, 6, 40).to(dtype)
    ids = torch.tensor([2, 0, 0, -1, 1, 2, 3])
    options = {"alpha": 0.7, "sparsity": 0.5, "gate_threshold": gate}
    if masked:
        options["row_mask"] = torch.rand(7, 6) < 0.6
    wanted = one_by_one(h, systems, ids, **options)
    sets = pack_edit_sets(systems).to(device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = function(
        h.to(device),
        sets.keys,
        sets.coef,
        sets.values,
        mean=sets.mean,
        edit_set=ids.to(device),
        segments=sets.segments,
        **options,
    )
    torch.testing.assert_close(out.cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(out[3].cpu(), h[3])


def test_ids_have_the_shape_of_the_batch(device):
    sets = pack_edit_sets([system(2, 2, 8), system(3, 1, 8)]).to(device)
    arguments = (sets.keys, sets.coef, sets.values)
    options = {"mean": sets.mean, "segments": sets.segments}
    h = torch.randn(2, 3, 4, 8, device=device)
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]], device=device)
    out = sparse_lowrank_residual(h, *arguments, edit_set=ids, **options)
    assert torch.equal((out != h).any(-1).all(-1), ids >= 0)
    flat = sparse_lowrank_residual(h.flatten(0, 1), *arguments, edit_set=ids.flatten(), **options)
    torch.testing.assert_close(out.flatten(0, 1), flat)
    single = sparse_lowrank_residual(h[0, 0], *arguments, edit_set=ids[0, 0], **options)
    torch.testing.assert_close(single, out[0, 0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_batches(function, device):
    sets = pack_edit_sets([system(2, 2, 8), system(3, 1, 8)]).to(device)
    for shape in ((0, 4, 8), (3, 0, 8), (0, 0, 8)):
        h = torch.randn(shape, device=device)
        ids = torch.zeros(shape[:1], dtype=torch.int64, device=device)
        out = function(h, sets.keys, sets.coef, sets.values, edit_set=ids, segments=sets.segments)
        assert out.shape == shape


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_packing(data):
    """Sizes, ids and batch drawn at random; also the way a GPU takes, which gathers padded sets."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    d = data.draw(st.integers(1, 20))
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4))
    systems = [system(max(n, m), m, d, mean=data.draw(st.booleans())) for n, m in sizes]
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, len(systems) - 1), min_size=1, max_size=5)))
    h = torch.randn(len(ids), data.draw(st.integers(1, 4)), d)
    options = {"gate_threshold": data.draw(st.sampled_from([None, 0.0, 0.3])), "alpha": 0.5}
    wanted = one_by_one(h, systems, ids, **options)
    sets = pack_edit_sets(systems)
    out = sparse_lowrank_residual(h, *sets[:3], mean=sets.mean, edit_set=ids, segments=sets.segments, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    edit = Edit(*sets[:3], sets.mean, None, ids, *sets.segments, options["gate_threshold"], 0.5, d)
    torch.testing.assert_close(_on_cuda(h, *edit), wanted, rtol=1e-4, atol=1e-4)


def test_padding_of_gathered_sets_is_zero():
    systems = [system(3, 2, 4), system(1, 1, 4)]
    sets = pack_edit_sets(systems)
    edit = Edit(*sets[:3], sets.mean, None, torch.tensor([1, 0, -1]), *sets.segments, None, 1.0, 4)
    found = _gathered(edit)
    assert found.keys.shape == (3, 3, 4) and not found.keys[0, 1:].any() and not found.values[0, 1:].any()
    assert torch.equal(found.keys[1], systems[0][0]) and torch.equal(found.coef[1], systems[0][1])
    assert found.own.tolist()[:2] == [[True, False, False], [True, True, False]]


def test_opcheck(device):
    sets = pack_edit_sets([system(3, 2, 8), system(1, 1, 8)]).to(device)
    h, ids = torch.randn(2, 3, 8, device=device), torch.tensor([1, 0], device=device)
    arguments = (h, *sets[:3], sets.mean, None, ids, *sets.segments, 0.1, 0.5, 4)
    torch.library.opcheck(torch.ops.timerome.sparse_lowrank_residual.default, arguments)


def test_compiles_without_graph_break(device):
    sets = pack_edit_sets([system(3, 2, 8), system(1, 1, 8)]).to(device)
    ids = torch.tensor([1, -1], device=device)

    def f(h):
        options = {"mean": sets.mean, "edit_set": ids, "segments": sets.segments, "sparsity": 0.5}
        return sparse_lowrank_residual(h * 2, *sets[:3], **options) + 1

    h = torch.randn(2, 3, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(h), f(h))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"segments": None}, ValueError, "edit_set and segments together"),
        ({"edit_set": None}, ValueError, "edit_set and segments together"),
        ({"edit_set": torch.tensor([0, 2])}, ValueError, r"edit_set in -1 \(none\) to 1, one of 2 sets, got 2"),
        ({"edit_set": torch.tensor([0, -2])}, ValueError, "got -2"),
        ({"edit_set": torch.tensor([0.0, 1.0])}, TypeError, "edit_set in int64, got torch.float32"),
        ({"edit_set": torch.tensor([0])}, ValueError, r"edit_set of shape \(2,\), .* got \(1,\)"),
        ({"segments": Segments(torch.zeros(3, 2).int(), 3)}, TypeError, "segments.offsets in int64"),
        ({"segments": Segments(torch.zeros(3), 3)}, TypeError, "segments.offsets in int64"),
        ({"segments": Segments(torch.zeros(3, 3).long(), 3)}, ValueError, r"of shape \(S \+ 1, 2\)"),
        ({"segments": Segments(torch.tensor([[0, 0], [3, 2], [5, 3]]), 3)}, ValueError, "segments.offsets that rise"),
        ({"segments": Segments(torch.tensor([[0, 0], [5, 2], [4, 3]]), 3)}, ValueError, "segments.offsets that rise"),
        ({"segments": Segments(torch.tensor([[0, 0], [1, 2], [4, 3]]), 3)}, ValueError, "values a set, one per key"),
        ({"coef": torch.zeros(3, 2)}, ValueError, r"coef of shape \(4, largest M\)"),
        ({"mean": torch.zeros(3, 8)}, ValueError, r"mean of shape \(8,\) or \(2, 8\)"),
        ({"alpha": float("nan")}, ValueError, "a finite alpha"),
        ({"gate_threshold": float("nan")}, ValueError, "a gate_threshold that is a number"),
    ],
)
def test_errors(function, change, error, message):
    sets = pack_edit_sets([system(3, 2, 8), system(1, 1, 8)])
    arguments = {
        "h": torch.zeros(2, 3, 8),
        **{"keys": sets.keys, "coef": sets.coef, "values": sets.values, "segments": sets.segments},
        "edit_set": torch.tensor([0, 1]),
        **change,
    }
    with pytest.raises(error, match="^sparse_lowrank_residual: expected .*" + message):
        function(**arguments)


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ([], "at least one system"),
        ([system(2, 2, 8), system(2, 2, 7)], r"keys 1 of shape \('N', 8\), got \(2, 7\)"),
        ([(torch.zeros(2, 8), torch.zeros(2, 1), torch.zeros(2, 8), None)], r"coef 0 of shape \(2, 2\)"),
        ([(torch.zeros(2, 8), torch.zeros(2, 2), torch.zeros(2, 8), torch.zeros(7))], r"mean 0 of shape \(8,\)"),
        ([(torch.zeros(2, 8), torch.zeros(2, 2).half(), torch.zeros(2, 8), None)], "coef 0 in torch.float32"),
        ([system(2, 2, 8), system(2, 2, 8, torch.bfloat16)], "keys 1 in torch.float32, got torch.bfloat16"),
    ],
)
def test_packing_errors(systems, message):
    with pytest.raises(ValueError, match="^pack_edit_sets: expected .*" + message):
        pack_edit_sets(systems)


def test_fake_gpu_products():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(3, 4, dtype=torch.bfloat16, device="cuda")
        assert product(x, x.mT).dtype == torch.float32

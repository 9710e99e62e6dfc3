"""Bad input to every public op: refused with op, argument, wanted and got, or the documented status; never a crash."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome import _backend
from timerome.ops import (
    NotPositiveDefiniteError,
    Segments,
    cholesky_append,
    cholesky_append_reference,
    cholesky_delete,
    cholesky_delete_reference,
    kept_count,
    pack_edit_sets,
    ridge_cholesky,
    ridge_cholesky_reference,
    sparse_lowrank_residual,
    sparse_lowrank_residual_reference,
    sparsify_add,
    sparsify_add_,
    sparsify_add_reference,
)
from timerome.ops._lowrank_cuda import _on_cuda
from timerome.ops.sparse_lowrank_residual import _edit

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
NO_TENSOR = st.sampled_from([[1.0], "x", 3, np.zeros((2, 2), dtype=np.float32)])
NO_NUMBER = st.sampled_from(["0.5", [0.5], 0.5j, torch.ones(2)])
NO_INTEGER = st.sampled_from([0.5, "1", None, torch.ones(2)])
HUGE = 10**400

Arguments = dict[str, Any]


# --- Valid arguments, of any shape and layout: empty ones too.


def entries(shape, dtype, seed):
    """Small integers and halves: products and sums are exact, so that two orders of summation agree."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-6, 7, shape, generator=generator) / 2).to(dtype)


@st.composite
def layouts(draw, tensor):
    """The same entries: contiguous, transposed, every other element, or at an odd address."""
    how = draw(st.sampled_from(["contiguous", "contiguous", "transposed", "strided", "offset"]))
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "strided":
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    if how == "offset":
        memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        memory[1:] = tensor.flatten()
        return memory[1:].view(tensor.shape)
    return tensor


@st.composite
def tensors(draw, shape, dtypes=FLOATS):
    dtype = draw(st.sampled_from(dtypes))
    return draw(layouts(entries(shape, dtype, draw(st.integers(0, 9)))))


sizes = st.integers(0, 5)
batches = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@st.composite
def for_sparsify_add(draw):
    shape = (*draw(batches), draw(sizes))
    return {
        "h": draw(tensors(shape)),
        "r": draw(tensors(shape, [torch.float32])),
        "k": draw(st.integers(0, shape[-1])),
        "alpha": draw(st.sampled_from([1.0, 0.5, -2, 0.0, np.float32(0.5)])),
        "mask": draw(st.none() | tensors(shape[:-1], [torch.bool])),
    }


def one_set(draw, d, dtype):
    n = draw(st.integers(0, 20))
    m = draw(st.integers(0, n))
    keys, values = draw(tensors((n, d), [dtype])), draw(tensors((m, d), [dtype]))
    return keys, draw(tensors((n, m), [torch.float32])), values, draw(st.none() | tensors((d,), [torch.float32]))


@st.composite
def for_residual(draw, with_sets=None):
    batch, length, d = draw(batches), draw(sizes), draw(sizes)
    arguments = {
        "h": draw(tensors((*batch, length, d))),
        "alpha": draw(st.sampled_from([1.0, 0.5, 0])),
        "sparsity": draw(st.sampled_from([0.0, 0.5, 0.75, 0])),
        "row_mask": draw(st.none() | tensors((*batch, length), [torch.bool])),
        "gate_threshold": draw(st.sampled_from([None, -math.inf, 0.0, 0.3, 1.5, math.inf])),
    }
    dtype = draw(st.sampled_from(FLOATS))
    if draw(st.booleans()) if with_sets is None else with_sets:
        count = draw(st.integers(1, 3))
        sets = pack_edit_sets([one_set(draw, d, dtype) for _ in range(count)])
        ids = torch.randint(-1, count, batch, generator=torch.Generator().manual_seed(0))
        keys, coef, values, mean = sets[:4]
        arguments |= {"edit_set": ids, "segments": sets.segments}
    else:
        keys, coef, values, mean = one_set(draw, d, dtype)
    return {**arguments, "keys": keys, "coef": coef, "values": values, "mean": mean}


@st.composite
def for_ridge(draw):
    batch, n, d = draw(batches), draw(sizes), draw(st.integers(1, 5))
    lengths = torch.randint(0, n + 1, batch, generator=torch.Generator().manual_seed(0))
    return {
        "keys": draw(tensors((*batch, n, d), (*FLOATS, torch.float64))),
        "values": draw(st.none() | tensors((*batch, n, draw(sizes)))),
        "ridge": draw(st.sampled_from([0.1, 1, [0.1, 0.5], [], torch.tensor([0.5])])),
        "relative": draw(st.booleans()),
        "lengths": draw(st.none() | st.just(lengths)),
        "check": False,
    }


@st.composite
def for_ridge_reference(draw):
    batch, n = draw(batches), draw(sizes)
    several = draw(st.sampled_from([(), (2,)]))
    return {
        "gram": draw(layouts(torch.eye(n).double().expand(*batch, n, n).clone())),
        "ridge": torch.ones((*several, *batch)).double(),
        "lengths": draw(st.none() | st.just(torch.full(batch, n, dtype=torch.int64))),
    }


@st.composite
def for_append(draw):
    n = draw(sizes)
    factor = draw(layouts(torch.eye(n).double() + entries((n, n), torch.float64, 0).tril(-1)))
    return {"cholesky": factor, "g": draw(tensors((n,), [torch.float64])), "gnn": 1e6}


@st.composite
def for_delete(draw):
    n = draw(st.integers(1, 5))
    factor = draw(layouts(torch.eye(n).double() + entries((n, n), torch.float64, 0).tril(-1)))
    return {"cholesky": factor, "j": draw(st.integers(0, n - 1))}


@st.composite
def for_packing(draw):
    d, dtype = draw(sizes), draw(st.sampled_from(FLOATS))
    return {"systems": [one_set(draw, d, dtype) for _ in range(draw(st.integers(1, 3)))]}


# --- The ways of spoiling one argument.


def wrong_shapes(shape, also=()):
    """A dimension too many or too few, and sizes off by one; of a scalar only the first."""
    longer = [(*shape[:i], size + 1, *shape[i + 1 :]) for i, size in enumerate(shape)]
    return [(1, *shape), *([shape[1:], *longer] if shape else []), *also]


def spoiled(value, allowed, shapes, optional=False):
    """A tensor of another kind, dtype, shape or device in the place of ``value``."""
    wrong = [
        NO_TENSOR,
        st.sampled_from([t for t in DTYPES if t not in allowed]).map(lambda dtype: value.to(dtype)),
        st.just(torch.empty(value.shape, dtype=value.dtype, device="meta")),
        st.just(value.to_sparse()),
    ]
    if shapes:
        wrong.append(st.sampled_from(shapes).map(lambda shape: torch.zeros(shape, dtype=value.dtype)))
    if not optional:
        wrong.append(st.none())
    return st.one_of(wrong)


def numbers(*wrong):
    return NO_NUMBER | st.sampled_from(wrong)


def of_sparsify_add(a):
    h, r, mask = a["h"], a["r"], a["mask"]
    spoils = {
        "h": spoiled(h, FLOATS, wrong_shapes(h.shape)),
        "r": spoiled(r, [torch.float32], wrong_shapes(r.shape)),
        "k": NO_INTEGER | st.sampled_from([-1, h.shape[-1] + 1, 2**40, 2**70, -(2**70)]),
        "alpha": numbers(math.nan, math.inf, -math.inf, 1e39, HUGE, None),
    }
    if mask is not None:
        spoils["mask"] = spoiled(mask, [torch.bool], wrong_shapes(mask.shape), optional=True)
    return spoils


def of_residual(a):
    h, keys, coef, values, mean, mask = (a[x] for x in ("h", "keys", "coef", "values", "mean", "row_mask"))
    n, m, d = *coef.shape, h.shape[-1]
    spoils = {
        "h": spoiled(h, FLOATS, [(d,), (), (*h.shape[:-1], d + 1)]),
        "keys": spoiled(keys, FLOATS, [(n, d + 1), (d,), (1, n, d), ()]),
        "coef": spoiled(coef, [torch.float32], [(n + 1, m), (n, len(values) + 1), (n,), (1, n, m)]),
        "values": spoiled(values, FLOATS, [(len(values), d + 1), (d,), (1, *values.shape)]),
        "alpha": numbers(math.nan, math.inf, -math.inf, 1e39, HUGE, None),
        "sparsity": numbers(-0.1, 1, 1.5, math.nan, math.inf, HUGE, None),
        "gate_threshold": numbers(math.nan, HUGE),
    }
    if mean is not None:
        shapes = [(d + 1,), (1, 1, d), (), (9, d)]
        spoils["mean"] = spoiled(mean, [torch.float32], shapes, optional=True)
    if mask is not None:
        spoils["row_mask"] = spoiled(mask, [torch.bool], wrong_shapes(mask.shape), optional=True)
    if "segments" in a:
        spoils |= of_edit_sets(a)
    return spoils


def of_edit_sets(a):
    ids, (offsets, max_keys), sets = a["edit_set"], a["segments"], len(a["segments"].offsets) - 1
    wrong_ids = [torch.full(ids.shape, i, dtype=torch.int64) for i in (-2, sets, 2**62)]
    wrong_offsets = [
        torch.zeros(0, 2).long(),
        offsets + 1,
        torch.cat([offsets[:-1], offsets[-1:] - 1]),
        offsets.flip(-1) + 7,
    ]
    return {
        "edit_set": spoiled(ids, [torch.int64], wrong_shapes(ids.shape))
        | (st.sampled_from(wrong_ids) if ids.numel() else st.none()),
        "segments": st.one_of(
            st.sampled_from([None, offsets, (1, 2, 3), 7]),
            spoiled(offsets, [torch.int64], wrong_shapes(offsets.shape)[:2] + [(sets + 1, 3)]).map(
                lambda wrong: Segments(wrong, max_keys)
            ),
            st.sampled_from(wrong_offsets).map(lambda wrong: Segments(wrong, max_keys)),
            st.sampled_from([-1, len(a["keys"]) + 1, "x", 0.5, None, 2**70] + [max_keys - 1] * (max_keys > 0)).map(
                lambda wrong: Segments(offsets, wrong)
            ),
        ),
    }


def of_ridge(a):
    keys, values, lengths = a["keys"], a["values"], a["lengths"]
    floating = [t for t in DTYPES if t.is_floating_point]
    negative = [-1e-9, -math.inf, math.nan, math.inf, HUGE, [0.1, -1.0], [0.1, math.nan], [[0.1]], [[0.1], 0.1]]
    spoils = {
        "keys": spoiled(keys, floating, [keys.shape[-1:], ()]),
        "ridge": st.sampled_from([*negative, "0.1", None, 1j, ["x"], torch.ones(1, 1)]),
    }
    if values is not None:
        spoils["values"] = spoiled(values, floating, wrong_shapes(values.shape)[:-1], optional=True)
    if lengths is not None:
        spoils["lengths"] = spoiled(lengths, [torch.int64], wrong_shapes(lengths.shape), optional=True)
        if lengths.numel():
            spoils["lengths"] |= st.sampled_from([lengths - 9, lengths + 9])
    return spoils


def of_ridge_reference(a):
    gram, ridge, lengths = a["gram"], a["ridge"], a["lengths"]
    n = gram.shape[-1]
    spoils = {
        "gram": spoiled(gram, [torch.float64], [(*gram.shape[:-1], n + 1), (n,), ()]),
        "ridge": spoiled(ridge, [torch.float64], [(1, 1, *gram.shape[:-2])]),
    }
    if lengths is not None:
        spoils["lengths"] = spoiled(lengths, [torch.int64], wrong_shapes(lengths.shape), optional=True)
    return spoils


def bad_factors(factor):
    n = len(factor)
    wrong = spoiled(factor, [torch.float64], [(n, n + 1), (n,), (1, n, n), ()])
    if n:
        diagonals = [torch.diag(torch.full((n,), x)).double() for x in (0.0, -1.0, math.nan, math.inf)]
        wrong |= st.sampled_from(diagonals)
    return wrong


def of_append(a):
    return {
        "cholesky": bad_factors(a["cholesky"]),
        "g": spoiled(a["g"], [torch.float64], wrong_shapes(a["g"].shape)),
        "gnn": numbers(None, HUGE),
    }


def of_delete(a):
    n = len(a["cholesky"])
    return {"cholesky": bad_factors(a["cholesky"]), "j": NO_INTEGER | st.sampled_from([-1, n, 2**40, 2**70])}


def of_packing(a):
    keys, coef, values, mean = system = a["systems"][-1]
    n, d = keys.shape
    floating = [t for t in DTYPES if t.is_floating_point]
    position = {"keys": 0, "coef": 1, "values": 2}
    wrong = {
        "keys": spoiled(keys, floating, [(n + 1, d), (d,), ()]),
        "coef": spoiled(coef, [torch.float32], wrong_shapes(coef.shape)),
        "values": spoiled(
            values, floating if len(a["systems"]) == 1 else [keys.dtype], [(len(values), d + 1), (d,), ()]
        ),
    }
    if mean is not None:
        position["mean"] = 3
        wrong["mean"] = spoiled(mean, [torch.float32], [(d + 1,), (1, d), ()], optional=True)

    def put(name):
        return lambda bad: [*a["systems"][:-1], (*system[: position[name]], bad, *system[position[name] + 1 :])]

    return {"systems": st.sampled_from([[], [system[:3]], [keys], [None]])} | {
        name: bad.map(put(name)) for name, bad in wrong.items()
    }


class Op(NamedTuple):
    name: str
    functions: tuple[Callable[..., Any], ...]
    arguments: st.SearchStrategy[Arguments]
    spoils: Callable[[Arguments], dict[str, st.SearchStrategy[Any]]]


OPS = [
    Op("sparsify_add", (sparsify_add, sparsify_add_, sparsify_add_reference), for_sparsify_add(), of_sparsify_add),
    Op(
        "sparse_lowrank_residual",
        (sparse_lowrank_residual, sparse_lowrank_residual_reference),
        for_residual(),
        of_residual,
    ),
    Op("ridge_cholesky", (ridge_cholesky,), for_ridge(), of_ridge),
    Op("ridge_cholesky", (ridge_cholesky_reference,), for_ridge_reference(), of_ridge_reference),
    Op("cholesky_append", (cholesky_append, cholesky_append_reference), for_append(), of_append),
    Op("cholesky_delete", (cholesky_delete, cholesky_delete_reference), for_delete(), of_delete),
    Op("pack_edit_sets", (pack_edit_sets,), for_packing(), of_packing),
]
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.functions[-1].__name__)


def copies(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) and x.layout == torch.strided else x
            for name, x in arguments.items()}  # fmt: skip


def bits(x):
    return None if not isinstance(x, torch.Tensor) or x.is_meta or x.is_sparse else x.clone()


def refusal(function, op, arguments, name=r"\w+"):
    """The message of the refusal, which names op, argument, wanted and got, and leaves the arguments alone."""
    before = {key: bits(x) for key, x in arguments.items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    for key, x in before.items():
        if x is not None:
            torch.testing.assert_close(arguments[key], x, rtol=0, atol=0, equal_nan=True)
    message = str(caught.value)
    assert re.match(rf"{op}_?: expected .*\b{name}\b", message, re.DOTALL), message
    assert re.search(r"\bgot\b", message), message
    return message


@EVERY_OP
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_one_bad_argument_is_named(op, data):
    arguments = data.draw(op.arguments)
    spoils = op.spoils(arguments)
    name = data.draw(st.sampled_from(sorted(spoils)))
    key = "systems" if op.name == "pack_edit_sets" else name
    bad = data.draw(spoils[name])
    for function in op.functions:
        refusal(function, op.name, {**copies(arguments), key: bad}, "system" if name == "systems" else name)


def outcome(function, op, arguments):
    """What it returns, as float64; or the type of its refusal, whose message must be in order."""
    try:
        found = function(**arguments)
    except (TypeError, ValueError) as error:
        assert re.match(rf"{op}_?: expected .*\bgot\b", str(error), re.DOTALL), error
        return type(error)
    except NotPositiveDefiniteError as error:
        assert re.match(rf"{op}: .*not positive definite", str(error)), error
        return type(error)
    if found is None:  # in place
        found = arguments["h"]
    parts = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, torch.Tensor)]
    return [x if x.is_meta else x.double() for x in parts]


def assert_same(found, wanted):
    assert isinstance(found, type) == isinstance(wanted, type), (found, wanted)
    if isinstance(wanted, type):
        assert found == wanted
        return
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, equal_nan=True)


def solved(parts):
    """The systems whose status is 0; the others must be NaN."""
    info = parts[3 if len(parts) > 3 else 2]
    results = [x for x in parts if x is not info and x.dim() == info.dim() + 2]
    assert all(x[info != 0].isnan().all() for x in results)
    return [x[info == 0] for x in results]


@EVERY_OP
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_good_arguments_are_taken_and_give_numbers(op, data):
    """Empty ones, N = 0, T = 0, d = 0 and any layout: no refusal, no NaN, the same from every form of the op."""
    arguments = data.draw(op.arguments)
    before = {key: bits(x) for key, x in arguments.items()}
    wanted = None
    for function in reversed(op.functions):  # the definition first
        given_arguments = copies(arguments) if function.__name__.endswith("_") else arguments
        found = outcome(function, op.name, given_arguments)
        assert not isinstance(found, type), found
        assert all(x.isfinite().all() for x in (solved(found) if op.name == "ridge_cholesky" else found))
        if wanted is not None:
            assert_same(found, wanted)
        wanted = found
        for key, x in before.items():
            assert x is None or torch.equal(arguments[key], x)


JUNK = st.one_of(
    NO_TENSOR,
    st.none(),
    st.sampled_from([-1, 0, 1, 2.5, math.nan, math.inf, -math.inf, 1e300, HUGE, True]),
    st.tuples(
        st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(DTYPES), st.sampled_from(["cpu", "meta"])
    ).map(lambda x: torch.ones(x[0], dtype=x[1], device=x[2])),
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda shape: torch.full(shape, math.nan)),
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda shape: torch.full(shape, -math.inf).double()),
)


@EVERY_OP
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_anything_is_taken_or_refused_and_by_every_form_alike(op, data):
    """Several arguments at once, wrong or merely odd, NaN and infinity among them."""
    arguments = data.draw(op.arguments)
    names = data.draw(
        st.lists(st.sampled_from(sorted({*arguments} - {"relative", "check"})), min_size=1, max_size=3, unique=True)
    )
    for name in names:
        value = arguments[name]
        odd = JUNK
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            odd |= st.sampled_from([math.nan, math.inf, 0.0]).map(lambda x, like=value: torch.full_like(like, x))
        arguments[name] = data.draw(odd)
    outcomes = [outcome(function, op.name, copies(arguments)) for function in op.functions]
    for found in outcomes[:-1]:
        if not isinstance(found, type) and any(x.is_meta for x in found):
            continue  # the compiled ops give shapes without data; the definition need not
        assert_same(found, outcomes[-1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_singular_gram_without_ridge_has_a_status(data):
    """Dependent keys and λ = 0: the systems that cannot be solved are named and NaN, the others are solved."""
    batch, n, d = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6)), data.draw(st.integers(6, 9))
    keys = torch.randn(batch, n, d, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double()
    spoil = data.draw(st.sampled_from(["zero", "repeated", "opposite", "nan", "inf"]))
    singular = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    i, j = data.draw(st.permutations(range(n)))[:2]
    for b in range(batch):
        if singular[b]:
            keys[b, i] = {"zero": 0 * keys[b, j], "repeated": keys[b, j], "opposite": -2 * keys[b, j]}.get(
                spoil, torch.full((d,), math.nan if spoil == "nan" else math.inf).double()
            )
    factor = ridge_cholesky(keys, ridge=0.0, check=False)
    assert (factor.info != 0).tolist() == singular
    assert set(factor.failures()) == {(b,) for b in range(batch) if singular[b]}
    (_, inverse) = solved([factor.cholesky, factor.inverse, factor.info])
    good = keys[~torch.tensor(singular)]
    torch.testing.assert_close(inverse @ (good @ good.mT), torch.eye(n).double().expand(len(good), n, n))
    if any(singular):
        with pytest.raises(NotPositiveDefiniteError) as caught:
            ridge_cholesky(keys, ridge=0.0)
        assert caught.value.entries == [(b,) for b in range(batch) if singular[b]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nan_stays_in_its_row(data):
    """A row of h that holds NaN or infinity may spoil itself only, on every way through the code."""
    arguments = data.draw(for_residual(with_sets=data.draw(st.booleans())))
    h = arguments["h"].clone(memory_format=torch.contiguous_format)
    if not h.numel():
        return
    clean = sparse_lowrank_residual(**{**arguments, "h": h})
    rows = h.view(-1, h.shape[-1])
    t = data.draw(st.integers(0, len(rows) - 1))
    rows[t, data.draw(st.integers(0, h.shape[-1] - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    for function in (sparse_lowrank_residual, sparse_lowrank_residual_reference):
        spoiled_rows = function(**{**arguments, "h": h}).view_as(rows)
        others = torch.arange(len(rows)) != t
        assert torch.equal(spoiled_rows[others], clean.view_as(rows)[others])


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_strength_zero_hides_no_nan(sparsity):
    arguments = torch.ones(2, 4), torch.full((1, 4), math.nan), torch.eye(1), torch.ones(1, 4)
    for function in (sparse_lowrank_residual, sparse_lowrank_residual_reference):
        assert function(*arguments, alpha=0.0, sparsity=sparsity).isnan().any()


def test_memory_that_is_written_twice_is_refused():
    h = torch.zeros(1, 4).expand(3, 4)
    with pytest.raises(ValueError, match="^sparsify_add_: expected h to have memory .* got strides"):
        sparsify_add_(h, torch.ones(3, 4), 2)
    assert not h.any()


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_device_mix_without_a_second_device(mode):
    """A CPU tensor among those of a GPU that is not there, and among those that hold nothing."""
    with torch._subclasses.FakeTensorMode() if mode == "fake" else torch.device("cpu"):
        here, there = "cpu", "cuda" if mode == "fake" else "meta"

        def zeros(*shape, device=there, dtype=torch.float32):
            return torch.zeros(shape, device=device, dtype=dtype)

        with pytest.raises(ValueError, match="^sparsify_add: expected h and r on one device"):
            sparsify_add(zeros(2, 4), zeros(2, 4, device=here), 1)
        with pytest.raises(ValueError, match="^sparsify_add: expected mask on the device of h"):
            sparsify_add_(zeros(2, 4), zeros(2, 4), 1, 1.0, zeros(2, device=here, dtype=torch.bool))
        edit = {"keys": zeros(3, 4), "coef": zeros(3, 3), "values": zeros(3, 4), "mean": zeros(4)}
        for name, tensor in edit.items():
            mixed = {**edit, name: tensor.to(here) if mode == "fake" else torch.zeros(tensor.shape)}
            with pytest.raises(ValueError, match=f"^sparse_lowrank_residual: expected {name} on the device of h"):
                sparse_lowrank_residual(zeros(2, 4), **mixed)
        with pytest.raises(ValueError, match="^ridge_cholesky: expected "):
            torch.ops.timerome.ridge_cholesky(
                zeros(2, 2, dtype=torch.float64), zeros(device=here, dtype=torch.float64), None
            )


@pytest.mark.parametrize(("d", "sparsity"), [(-1, 0.5), (2.5, 0.5), ("8", 0.5), (8, "0.5"), (8, None), (8, 2), (8, -1)])
def test_kept_count(d, sparsity):
    refusal(lambda d, sparsity: kept_count(d, sparsity), "kept_count", {"d": d, "sparsity": sparsity})


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_half_for_gpus_takes_the_same(data):
    """Library products and the epilogue, as a GPU without our kernels runs them, on the same odd shapes."""
    arguments = data.draw(for_residual())
    arguments["values"] = arguments["values"].float()  # with bfloat16 ones, coefficients would be rounded, too
    wanted = sparse_lowrank_residual_reference(**arguments)
    edit = _edit(**{"edit_set": None, "segments": None, **arguments})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "compiled_cuda", lambda: None)
        assert torch.equal(_on_cuda(arguments["h"], *edit), wanted)

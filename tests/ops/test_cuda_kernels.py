"""The source of the CUDA kernels, run on the CPU by tests/ops/emulator, so that CI without a GPU tests them."""

import contextlib
import ctypes
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import ROOT, load_setup
from timerome import _backend
from timerome.ops import (
    pack_edit_sets,
    ridge_cholesky,
    ridge_cholesky_reference,
    sparse_lowrank_residual_reference,
    sparsify_add_reference,
)
from timerome.ops._gram import _cuda as gram_on_cuda
from timerome.ops._gram import gram_reference
from timerome.ops._lowrank import Edit
from timerome.ops._lowrank_cuda import _on_cuda
from timerome.ops.ridge_cholesky import _cuda as ridge_on_cuda

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def toolkit():
    """CUDA's compiler, which needs no GPU."""
    nvcc = load_setup().find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("needs nvcc")
    return nvcc


@pytest.fixture(scope="module")
def emulator(toolkit, tmp_path_factory):
    """Compiles one source of the emulator's folder for this machine's processor."""
    include = next(iter(load_setup().toolkit_root(toolkit).glob("**/cuda_fp16.h")), None)
    if include is None or not shutil.which("g++"):
        pytest.skip("needs CUDA's headers and a C++ compiler")

    def compiled(name):
        library = tmp_path_factory.mktemp("emulator") / f"{name}.so"
        source = Path(__file__).parent / "emulator" / f"{name}.cpp"
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-w"]
        folders = [f"-I{include.parent}", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["g++", *flags, *folders, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    return compiled


# The most registers that each kernel may use, by a pattern of its mangled name. With more of them, fewer blocks fit on
# a multiprocessor.
REGISTERS = {
    "sparsify_add": {"Li[48]E": 64, "Li16ELb1": 80, "Li16ELb0": 96, "Li32ELb1": 128, "Li32ELb0": 200},
    "gram": {"Li2E": 64, "Li5E": 128, "Li8E": 255},
    "ridge": {"ridge_kernel": 64},
    "lowrank": {"score_gate": 128, "apply_small": 128},
}
PTXAS = re.compile(r"Compiling entry function '(\w+)' for .*?spill stores.*?Used (\d+) registers", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("source", REGISTERS)
def test_registers_and_spills(toolkit, source, arch, tmp_path):
    command = [toolkit, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", "-o", tmp_path / "out"]
    run = subprocess.run([*command, ROOT / "csrc" / f"{source}.cu"], capture_output=True, text=True, check=True)
    found = PTXAS.findall(run.stderr)
    assert found and len(found) == run.stderr.count("Compiling entry function")
    for name, registers in found:
        (limit,) = (limit for pattern, limit in REGISTERS[source].items() if re.search(pattern, name))
        assert int(registers) <= limit, name
    assert not any(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", run.stderr)))


@pytest.fixture(scope="module")
def emulated(emulator):
    return emulator("sparsify_add").emulated_sparsify_add


def run(emulated, h, r, k, alpha=1.0, mask=None, aligned=False, blocks=2):
    out = torch.full_like(h, 77.0)
    arguments = [ctypes.c_void_p(x.data_ptr() if x is not None else None) for x in (h, r, out, mask)]
    rows, d = h.shape
    error = emulated(
        DTYPES[h.dtype], int(aligned), *arguments, ctypes.c_int64(rows), d, k, ctypes.c_float(alpha), blocks
    )
    assert error == 0, "threads waited at different barriers"
    return out


def check(emulated, h, r, k, **options):
    wanted = sparsify_add_reference(h, r, k, options.get("alpha", 1.0), options.get("mask"))
    out = run(emulated, h, r, k, **options)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 64, 1000, 1023, 1024, 4096, 8191, 8192])
def test_equals_reference(emulated, dtype, d):
    mask = torch.tensor([True, False, True])
    for levels in (None, 3):
        h = torch.randn(3, d).to(dtype)
        r = torch.randn(3, d) if levels is None else torch.randint(-levels, levels + 1, (3, d)).float()
        for k in {0, 1, d // 10, d - 1, d}:
            for aligned in {False, d % 4 == 0}:
                check(emulated, h, r, k, alpha=0.5, mask=mask, aligned=aligned)


@pytest.mark.parametrize("d", [5, 1000, 4100])
def test_ties_go_to_the_lowest_index(emulated, d):
    out = run(emulated, torch.zeros(1, d), torch.ones(1, d), d // 2)
    assert out[0].nonzero().flatten().tolist() == list(range(d // 2))


def test_special_values(emulated):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38, -math.nan])
    r = special.repeat(40)[torch.randperm(320)][None]
    h = torch.full((1, 320), -0.0)
    for k in (1, 60, 81, 130, 300):
        check(emulated, h, r, k)


def test_one_block_serves_many_rows(emulated):
    h, r = torch.randn(7, 70), torch.randint(-3, 4, (7, 70)).float()
    check(emulated, h, r, 9, blocks=1)


def test_in_place(emulated):
    h, r = torch.randn(4, 130), torch.randn(4, 130)
    mask = torch.tensor([True, False, True, True])
    wanted = sparsify_add_reference(h, r, 13, 1.0, mask)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (h, r, h, mask)]
    assert emulated(0, 0, *pointers, ctypes.c_int64(4), 130, 13, ctypes.c_float(1.0), 2) == 0
    assert torch.equal(h, wanted)


@contextlib.contextmanager
def extension(**members):
    """The emulator in the place of the extension, and tensors of the CPU in that of a GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "compiled_cuda", lambda: SimpleNamespace(**members))
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        yield


def addresses(numbers):
    return [ctypes.c_void_p(x) for x in numbers]


def sizes(numbers):
    return [ctypes.c_int64(x) for x in numbers]


@pytest.fixture(scope="module")
def emulated_gram(emulator):
    """The op as a GPU runs it, its columns shared out to so many blocks, and whether a kernel did."""
    function = emulator("gram").emulated_gram

    def op(keys, lengths=None, splits=1):
        calls = []

        def gram_cuda(*arguments):
            error = function(*addresses(arguments[:3]), *sizes(arguments[3:7]), arguments[7], 3)
            assert error == 0, "threads waited at different barriers"
            calls.append(arguments)

        with extension(gram_cuda_max_n=64, gram_cuda_splits=lambda *of: splits, gram_cuda=gram_cuda):
            return gram_on_cuda(keys, lengths), bool(calls)

    return op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 8, 16, 17, 40, 41, 64])
def test_gram_equals_reference(emulated_gram, dtype, n):
    for d, splits in ((4, 1), (20, 1), (148, 1), (1028, 3)):  # less than a step of a warp, not whole steps, several
        keys = (torch.randint(-9, 10, (2, 2, n, d)) / 2).to(dtype)  # sums are exact in any order
        lengths = torch.randint(0, n + 1, (2, 2))
        padded = keys.clone()
        for entry, length in zip(padded.flatten(0, 1), lengths.flatten().tolist(), strict=True):
            entry[length:] = math.nan
        for arguments in ((keys,), (padded, lengths)):
            found, by_kernel = emulated_gram(*arguments, splits=splits)
            assert by_kernel and torch.equal(found, gram_reference(*arguments))


def test_gram_is_in_double_precision(emulated_gram):
    keys = torch.randn(3, 24, 700) + 100  # in float32 the sum of squares would lose 1e-7 of itself
    torch.testing.assert_close(emulated_gram(keys)[0], gram_reference(keys), rtol=1e-14, atol=0)


def test_gram_keeps_what_is_not_finite_to_its_row(emulated_gram):
    keys = torch.ones(1, 40, 64)
    keys[0, 3, 5], keys[0, 20, 6] = math.nan, math.inf
    torch.testing.assert_close(emulated_gram(keys)[0], gram_reference(keys), rtol=0, atol=0, equal_nan=True)


def test_gram_of_keys_that_lie_anywhere(emulated_gram):
    memory = torch.randn(2 * 9 * 32 + 1)
    keys = memory[1:].view(2, 9, 32)  # not on a boundary of four entries
    for x in (keys, keys.transpose(0, 1).contiguous().transpose(0, 1)):
        found, by_kernel = emulated_gram(x)
        assert by_kernel
        torch.testing.assert_close(found, gram_reference(x), rtol=1e-14, atol=1e-14)


def test_gram_beyond_its_limits_is_left_to_torch(emulated_gram):
    for shape, dtype in (((65, 8), torch.float32), ((3, 6), torch.float32), ((3, 8), torch.float64)):
        keys = torch.randn(2, *shape).to(dtype)
        found, by_kernel = emulated_gram(keys)
        assert not by_kernel and torch.equal(found, gram_reference(keys))
    for empty in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        found, by_kernel = emulated_gram(torch.zeros(empty))
        assert not by_kernel and found.shape == (*empty[:-1], empty[-2]) and not found.any()


@pytest.fixture(scope="module")
def emulated_ridge(emulator):
    """The op as a GPU runs it, and whether a kernel did."""
    function = emulator("ridge").emulated_ridge
    calls = []

    def ridge_cuda(*arguments):
        error = function(*addresses(arguments[:6]), *sizes(arguments[6:9]), 3)
        assert error == 0, "threads waited at different barriers, or wrote behind the shared memory"
        calls.append(arguments)

    def op(*arguments):
        calls.clear()
        with extension(ridge_cuda_max_n=lambda device: 60, ridge_cuda=ridge_cuda):
            return *ridge_on_cuda(*arguments), bool(calls)

    return op


def check_ridge(emulated_ridge, gram, rho, lengths=None):
    """Equal to the reference up to rounding, which the condition number magnifies; the status exactly."""
    *found, by_kernel = emulated_ridge(gram, rho, lengths)
    wanted = ridge_cholesky_reference(gram, rho, lengths)
    assert by_kernel and torch.equal(found[2], wanted[2])
    inverse, cholesky = (x.nan_to_num(0) for x in wanted[:2])
    condition = torch.linalg.matrix_norm(inverse) * torch.linalg.matrix_norm(cholesky) ** 2
    for ours, exact in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(ours.isnan(), exact.isnan()) and torch.equal(ours == 0, exact == 0)
        error = torch.linalg.matrix_norm((ours - exact).nan_to_num(0))
        assert (error <= 1e-15 * condition * torch.linalg.matrix_norm(exact.nan_to_num(0))).all()
    return found[2]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 31, 32, 33, 40, 60])
def test_ridge_equals_reference(emulated_ridge, n):
    keys = torch.randn(2, 2, n, 50).double()
    keys[1] = keys[1, 0, 0] + 0.05 * keys[1]  # sharing a direction
    gram = keys @ keys.mT
    several = torch.tensor([1e-3, 0.1, 5.0]).double()[:, None, None].expand(3, 2, 2).contiguous()
    for rho in (several, several[0]):
        assert not check_ridge(emulated_ridge, gram, rho).any()
        lengths = torch.randint(0, n + 1, (2, 2))
        lengths[0, 0] = n
        padded = gram.clone()
        for entry, length in zip(padded.flatten(0, 1), lengths.flatten().tolist(), strict=True):
            entry[length:] = entry[:, length:] = math.nan  # padding may hold anything
        assert not check_ridge(emulated_ridge, padded, rho, lengths).any()


def test_ridge_names_what_fails(emulated_ridge):
    keys = torch.randn(8, 12, 30).double()
    keys[1, 7] = keys[1, 2]  # singular
    keys[2] = 0.0
    gram = keys @ keys.mT
    gram[3, 5, 4] = math.nan
    gram[4, 4, 5] = math.nan  # above the diagonal, not read
    gram[5, 0, 0] = math.inf
    gram[6, 8, 8] = -1.0
    gram[7] = torch.eye(12).double()
    gram[7, 1, 0] = 1.0
    gram[7, 1, 1] += torch.finfo(torch.float64).eps  # a pivot that is all rounding error, before one that is negative
    gram[7, 3, 3] = -1.0
    rho = torch.zeros(3, 8).double()
    rho[1] = 0.5
    rho[2] = torch.tensor([0.1, math.nan, math.inf, 0.1, -1e9, 0.1, -math.inf, 0.0])
    assert check_ridge(emulated_ridge, gram, rho).tolist() == [
        [0, 8, 1, -1, 0, -1, 9, 2],
        [0, 0, 0, -1, 0, -1, 9, 4],
        [0, -1, -1, -1, 1, -1, -1, 2],
    ]


def test_ridge_reads_no_system_but_its_own(emulated_ridge):
    gram = torch.stack([torch.eye(4), torch.full((4, 4), math.nan), 3 * torch.eye(4)]).double()
    inverse, cholesky, info, _ = emulated_ridge(gram, torch.ones(3).double(), torch.tensor([4, 2, 0]))
    assert info.tolist() == [0, -1, 0] and inverse[1].isnan().all() and not inverse[2].any() and not cholesky[2].any()
    torch.testing.assert_close(inverse[0], torch.eye(4).double() / 2)


@pytest.mark.parametrize("n", [2, 30, 60])
def test_ridge_notices_a_singular_system(emulated_ridge, n):
    keys = torch.randn(6, n, 300).double()
    keys[:, -1] = keys[:, :-1].mean(1)
    assert check_ridge(emulated_ridge, keys @ keys.mT, torch.zeros(6).double()).tolist() == [n] * 6


def test_ridge_beyond_its_limits_is_left_to_torch(emulated_ridge):
    for batch, n in ((3, 61), (3, 0), (0, 5)):
        keys = torch.randn(batch, n, 70).double()
        arguments = keys @ keys.mT, torch.ones(batch).double(), None
        *found, by_kernel = emulated_ridge(*arguments)
        assert not by_kernel
        for ours, exact in zip(found, ridge_cholesky_reference(*arguments), strict=True):
            assert torch.equal(ours, exact)


@pytest.fixture(scope="module")
def emulated_kernels(emulator):
    return emulator("lowrank").emulated_lowrank


@pytest.fixture(scope="module", params=[1, 2], ids=["one set", "two sets"])
def emulated_lowrank(emulated_kernels, request):
    """sparse_lowrank_residual as a GPU runs it: the result and whether the kernels for few keys ran."""
    calls = []

    def lowrank_cuda(*arguments):
        alpha, tau, *codes = arguments[15:21]
        numbers = [ctypes.c_double(alpha), ctypes.c_double(tau), *map(int, codes)]
        pointers = addresses([*arguments[:7], arguments[8]])  # the emulator has scratch of its own
        error = emulated_kernels(*pointers, *sizes(arguments[9:15]), *numbers, *op.launch)
        assert error == 0, "threads waited at different barriers, or wrote behind the shared memory"
        calls.append(arguments)

    members = {
        "lowrank_cuda": lowrank_cuda,
        "lowrank_cuda_max_n": 64,
        "lowrank_cuda_max_d": lambda device, n, m: 4096,
        "lowrank_cuda_scratch": lambda *sizes: 0,
    }

    def op(h, keys, coef, values, *, mean=None, row_mask=None, gate=None, alpha=1.0, k=None):
        k = h.shape[-1] if k is None else k
        edit = Edit(keys, coef, values, mean, row_mask, None, None, 0, gate, alpha, k)
        calls.clear()
        with extension(**members):
            return _on_cuda(h, *edit), bool(calls)

    op.members = members
    op.launch = (2, 3, 3, request.param)  # parts of the columns, stages, blocks of apply_small, sets a block takes
    return op


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def lowrank_case(shape, n, m, dtype, spread=0.3):
    """Rows near the keys' shared direction and rows far from it, in turn."""
    d = shape[-1]
    shared, far = torch.randn(d), torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1) % 3 == 0
    keys = (shared + spread * torch.randn(n, d)).to(dtype)
    h = torch.where(far, torch.randn(shape), shared + spread * torch.randn(shape)).to(dtype)
    coef = ridge_cholesky(keys, ridge=0.1).inverse[:, :m].float()
    return h, keys, coef, torch.randn(m, d).to(dtype)


def check_lowrank(emulated_lowrank, h, keys, coef, values, *, k, alpha=1.0, mean=None, row_mask=None, gate=None):
    """Against float64: rows left out to the last bit, the others up to what rounding may swap; which were edited."""
    options = {"mean": mean, "row_mask": row_mask, "gate": gate, "alpha": alpha, "k": k}
    before = h.clone()
    out, by_kernel = emulated_lowrank(h, keys, coef, values, **options)
    assert by_kernel and torch.equal(bits(h), bits(before)) and out.data_ptr() != h.data_ptr()
    x = h.double() if mean is None else h.double() - mean.double()
    scores = x @ keys.double().T
    active = torch.ones(h.shape[:-1], dtype=torch.bool) if row_mask is None else row_mask
    if gate is not None:
        own = keys[: len(values)].double()
        cosine = (scores[..., : len(own)] / (x.norm(dim=-1, keepdim=True) * own.norm(dim=-1))).amax(-1)
        assert ((cosine - gate).abs() > 1e-5).all()  # no row for which rounding decides
        active = active & (cosine >= gate)
    assert torch.equal(bits(out)[~active], bits(h)[~active])

    residual = (scores @ coef.double() @ values.double())[active]
    scale = (scores.abs() @ coef.double().abs() @ values.double().abs())[active]
    slack = 2e-6 * scale  # scores and c are rounded to float32
    h, out = h[active], out[active]
    eps = torch.finfo(h.dtype).eps
    wanted = h.double() + alpha * residual
    is_kept = (out.double() - wanted).abs() <= abs(alpha) * slack + eps * wanted.abs() + 1e-30
    is_copied = bits(out) == bits(h)
    assert (is_kept | is_copied).all()
    threshold = residual.abs().topk(k).values[:, -1:]
    assert is_kept[residual.abs() > threshold + 2 * slack].all()
    assert is_copied[residual.abs() < threshold - 2 * slack].all()
    assert ((~is_copied).sum(-1) <= k).all()
    return active


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n", "m"),
    [
        ((1, 32), 1, 1),
        ((2, 3, 96), 2, 1),
        ((37, 64), 8, 8),
        ((7, 19, 32), 3, 2),
        ((2, 17, 160), 16, 16),
        ((33, 288), 17, 3),
        ((2, 2, 9, 992), 40, 33),
        ((16, 512), 64, 64),
        ((300, 64), 5, 4),
        ((3, 1056), 49, 49),
        ((3, 3072), 5, 5),
        ((12, 3616), 18, 17),
    ],
)
def test_few_keys_equal_float64(emulated_lowrank, shape, n, m, dtype):
    h, keys, coef, values = lowrank_case(shape, n, m, dtype)
    d, mean = shape[-1], torch.randn(shape[-1]) / 10
    mask = torch.rand(shape[:-1]) < 0.7
    active = check_lowrank(emulated_lowrank, h, keys, coef, values, k=max(1, d // 10), alpha=0.7, gate=0.55)
    assert d == 32 or 0 < active.sum() < active.numel()
    check_lowrank(emulated_lowrank, h, keys, coef, values, k=d // 2, mean=mean, row_mask=mask, gate=0.55)
    check_lowrank(emulated_lowrank, h, keys, coef, values, k=d - 1, mean=mean)
    check_lowrank(emulated_lowrank, h, keys, coef, values, k=d, row_mask=mask)


@pytest.mark.parametrize("keys_dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_few_keys_of_any_dtypes(emulated_lowrank, keys_dtype, values_dtype):
    for dtype in DTYPES:
        h, keys, coef, values = lowrank_case((18, 96), 9, 7, torch.float32)
        h, keys, values = h.to(dtype), keys.to(keys_dtype), values.to(values_dtype)
        check_lowrank(emulated_lowrank, h, keys, coef, values, k=7, gate=0.55)


def test_few_keys_beside_a_large_mean(emulated_lowrank):
    h, keys, coef, values = lowrank_case((20, 256), 5, 5, torch.float32)
    mean = 1e3 * torch.randn(256)
    check_lowrank(emulated_lowrank, h + mean, keys, coef, values, k=256, mean=mean)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1, 0.03])
def test_few_keys_that_share_a_direction(emulated_lowrank, spread):
    """Condition numbers up to 4e4: as good as float32 products are."""
    shared = torch.randn(512)
    keys, h = shared + spread * torch.randn(40, 512), shared + spread * torch.randn(16, 512)
    values = torch.randn(40, 512)
    for dtype in (torch.float32, torch.bfloat16):
        keys, h, values = keys.to(dtype), h.to(dtype), values.to(dtype)
        coef = ridge_cholesky(keys, ridge=1e-4).inverse.float()
        exact = h.double() @ keys.double().T @ coef.double() @ values.double()
        eager = h.float() @ keys.float().T @ coef @ values.float()
        out, _ = emulated_lowrank(h.float(), keys, coef, values)
        rounding = h.double() + exact - (h.double() + exact).float()
        error = (out.double() - h.double() - exact).norm()
        assert error <= 2 * ((eager - exact).norm() + rounding.norm())


def check_selection(emulated_lowrank, h, value, k):
    d = len(value)
    out, _ = emulated_lowrank(h, torch.eye(1, d), torch.eye(1), value[None], alpha=0.5, k=k)
    wanted = sparsify_add_reference(h, value.expand(len(h), d).contiguous(), k, 0.5)
    assert torch.equal(bits(out), bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_keys_select_as_sparsify_add_does(emulated_lowrank, dtype):
    """One key, met exactly, so that the residual is the value: then everything is exact, ties included."""
    for d, rows in ((32, 9), (96, 9), (1024, 3), (3616, 11)):
        h = torch.randn(rows, d).to(dtype)
        h[:, 0] = 1.0
        for value in (torch.randn(d), torch.randint(-2, 3, (d,)).float(), torch.ones(d), torch.zeros(d)):
            if d > 1000 and value.unique().numel() > 5:
                value = value.masked_fill(torch.rand(d) < 0.5, 0.75)  # half of them tied in the middle
            for k in {1, d // 10 + 1, d // 2, d - 1, d} if d <= 96 else {d // 10, d // 2}:
                check_selection(emulated_lowrank, h, value, k)
        value = torch.randn(d)
        for k in {2, d // 10 + 2, d // 2}:
            few = value.clone()
            few[value.abs().argsort(descending=True)[k - 2 : k + 3]] = -float(value.abs().topk(k).values[-1])
            check_selection(emulated_lowrank, h, few, k)  # five tied at the threshold, two of them kept


def test_few_keys_select_wherever_the_sample_says(emulated_lowrank):
    """Every fourth column is the sample: windows that miss, on either side, and those with more than can be listed."""
    for d, rows in ((32, 9), (1056, 5), (4096, 2 if emulated_lowrank.launch[-1] == 1 else 10)):
        h = torch.randn(rows, d).bfloat16()
        h[:, 0] = 1.0
        above, below, tiny = torch.rand(d), torch.rand(d) + 5.0, torch.randn(d)
        above[::4] += 5.0
        below[::4] = torch.rand(d // 4)
        tiny[d // 2 :] *= 1e-40
        narrow = 1.0 + torch.rand(d) / 1000
        for value in (above, below, tiny, narrow, torch.full((d,), 3e38), 1e-42 * torch.rand(d)):
            for k in {1, 2, d // 10 + 2, d // 2, d - 1}:
                check_selection(emulated_lowrank, h, value, k)


def test_few_keys_beside_rows_of_nan_and_infinity(emulated_lowrank):
    h, keys, coef, values = lowrank_case((20, 64), 3, 3, torch.float32)
    clean = h.clone()
    h[4, 5], h[9, 0], h[10, 63] = math.nan, math.inf, -math.inf
    h[11] = 0.0
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[4, 9, 10, 11]] = True
    for gate in (0.55, -1.0, -math.inf):
        out, _ = emulated_lowrank(h, keys, coef, values, gate=gate, k=6)
        wanted, _ = emulated_lowrank(clean, keys, coef, values, gate=gate, k=6, row_mask=~bad)
        assert torch.equal(bits(out)[bad], bits(h)[bad]) and torch.equal(out[~bad], wanted[~bad])
        assert not torch.equal(out[~bad], h[~bad])
    out, _ = emulated_lowrank(h, keys, coef, values, k=6)
    for i in (4, 9, 10):
        assert out[i, :6].isnan().all() and torch.equal(out[i, 6:], h[i, 6:])
    assert torch.equal(out[11], h[11])
    keys[1] = 0.0  # a key without a direction
    assert torch.equal(emulated_lowrank(clean, keys[1:2], coef[:1, :1], values[:1], gate=-1.0)[0], clean)


def test_few_protected_keys_open_no_gate(emulated_lowrank):
    keys, h = torch.eye(2, 32), torch.zeros(2, 32)
    h[0, 1] = h[1, 0] = 2.0
    coef, values = torch.ones(2, 1), torch.ones(1, 32)  # the second key has no value
    out, _ = emulated_lowrank(h, keys, coef, values, gate=0.5)
    assert torch.equal(out[0], h[0]) and torch.equal(out[1], h[1] + 2)


def test_few_keys_where_memory_is_not_as_the_kernels_want_it(emulated_lowrank):
    h, keys, coef, values = lowrank_case((2, 9, 64), 5, 3, torch.bfloat16)
    mask = torch.rand(2, 9) < 0.7
    options = {"mean": torch.randn(64) / 10, "gate": 0.5, "k": 6}
    wanted, _ = emulated_lowrank(h, keys, coef, values, row_mask=mask, **options)

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def strided(x):
        return torch.stack([x, x], -1)[..., 0]

    for change in (shifted, strided, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        changed = [change(x) for x in (h, keys, coef, values)]
        out, by_kernel = emulated_lowrank(*changed, row_mask=change(mask), **options)
        assert by_kernel and torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("shape", "n", "m", "options"),
    [
        ((3, 6144), 2, 2, {}),
        ((3, 80), 2, 2, {}),
        ((3, 64), 65, 65, {"gate": 0.5}),
        ((3, 64), 2, 0, {"gate": 0.5}),
        ((3, 64), 2, 2, {"k": 0}),
        ((0, 64), 2, 2, {}),
    ],
)
def test_beyond_few_keys_the_libraries_are_used(emulated_lowrank, shape, n, m, options):
    h, keys, coef, values = lowrank_case(shape, n, m, torch.float32)
    out, by_kernel = emulated_lowrank(h, keys, coef, values, **options)
    assert not by_kernel and out.shape == h.shape


def test_edit_sets_are_gathered(emulated_lowrank):
    h, *system = lowrank_case((2, 3, 64), 2, 2, torch.float32)
    sets, ids = pack_edit_sets([(*system, None)]), torch.tensor([0, -1])
    edit = Edit(*sets[:3], None, None, ids, *sets.segments, None, 1.0, 64)
    with extension():  # it would be asked for what it does not have
        out = _on_cuda(h, *edit)
    torch.testing.assert_close(out[0], sparse_lowrank_residual_reference(h[0], *system))
    assert torch.equal(out[1], h[1])

"""The source of the CUDA kernels, run on the CPU by tests/ops/emulator, so that CI without a GPU tests them."""

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
from timerome.ops import ridge_cholesky_reference, sparsify_add_reference
from timerome.ops.ridge_cholesky import _cuda

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
    "ridge": {"ridge_kernel": 64},
}
PTXAS = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?spill stores.*?Used (\d+) registers", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("source", REGISTERS)
def test_registers_and_spills(toolkit, source, tmp_path):
    archs = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    command = [toolkit, "-std=c++17", "-O3", *archs, "-Xptxas=-v", "-c", "-o", tmp_path / "out.o"]
    run = subprocess.run([*command, ROOT / "csrc" / f"{source}.cu"], capture_output=True, text=True, check=True)
    found = PTXAS.findall(run.stderr)
    assert {arch for _, arch, _ in found} == {"80", "90"}
    assert len(found) == run.stderr.count("Compiling entry function")
    for name, arch, registers in found:
        (limit,) = (limit for pattern, limit in REGISTERS[source].items() if re.search(pattern, name))
        assert int(registers) <= limit, f"{name} on sm_{arch}"
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


@pytest.fixture(scope="module")
def emulated_ridge(emulator):
    """The op as a GPU runs it: its own code, with the emulator in the place of the extension."""
    function = emulator("ridge").emulated_ridge

    def ridge_cuda(*arguments):
        *addresses, systems, batch, n, _device, _stream = arguments
        sizes = [ctypes.c_int64(x) for x in (systems, batch, n)]
        error = function(*map(ctypes.c_void_p, addresses), *sizes, 3)
        assert error == 0, "threads waited at different barriers, or wrote behind the shared memory"
        calls.append(n)

    calls = []
    extension = SimpleNamespace(ridge_cuda_max_n=lambda device: 60, ridge_cuda=ridge_cuda)

    def op(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_backend, "compiled_cuda", lambda: extension)
            patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
            before = len(calls)
            return *_cuda(*arguments), len(calls) > before

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
    for batch, n in ((3, 61), (1, 5), (3, 0), (0, 5)):
        keys = torch.randn(batch, n, 70).double()
        arguments = keys @ keys.mT, torch.ones(batch).double(), None
        *found, by_kernel = emulated_ridge(*arguments)
        assert not by_kernel
        for ours, exact in zip(found, ridge_cholesky_reference(*arguments), strict=True):
            assert torch.equal(ours, exact)

"""The source of the CUDA kernels, run on the CPU by tests/ops/emulator, so that CI without a GPU tests them."""

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, load_setup
from timerome.ops import sparsify_add_reference

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    setup = load_setup()
    nvcc = setup.find_nvcc(os.environ)
    include = next(iter(setup.toolkit_root(nvcc).glob("**/cuda_fp16.h")), None) if nvcc else None
    missing = [
        name for name, there in (("a C++ compiler", shutil.which("g++")), ("CUDA's headers", include)) if not there
    ]
    if missing:
        pytest.skip("needs " + " and ".join(missing))
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    source = Path(__file__).parent / "emulator" / "sparsify_add.cpp"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-w"]
    subprocess.run(
        ["g++", *flags, f"-I{include.parent}", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True
    )
    return ctypes.CDLL(str(library)).emulated_sparsify_add


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

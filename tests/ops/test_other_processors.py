"""What processors run that are not this one: the ops' tests, with builds that choose as they would."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.other_build import build, run_tests

CASES = ["tests/ops/test_sparsify_add.py", "tests/ops/test_sparse_lowrank_residual.py", "tests/ops/test_accuracy.py"]
LEFT_OUT = "opcheck or compile or fake"


def build_and_test(folder, flag):
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("needs Linux on x86-64, and g++")
    extension = build(folder, ["-O3", flag])
    run_tests(extension, CASES, LEFT_OUT)
    return extension.read_bytes()


@pytest.mark.slow
def test_without_avx512(tmp_path):
    built = build_and_test(tmp_path, "-DTIMEROME_NO_AVX512")
    assert b"score_v3" in built and b"_v4" not in built


@pytest.mark.slow
def test_another_first_cache(tmp_path):
    if "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs AVX-512: without, all caches are treated alike")
    ways = subprocess.run(["getconf", "LEVEL1_DCACHE_ASSOC"], capture_output=True, text=True, check=True).stdout
    other = 8 if int(ways) >= 12 else 12
    build_and_test(tmp_path, f"-DTIMEROME_FIRST_CACHE_WAYS={other}")

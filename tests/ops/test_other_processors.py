"""What processors run that are not this one: the ops' tests, with builds that choose as they would."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.ops.other_build import build

CASES = ["tests/ops/test_sparsify_add.py", "tests/ops/test_sparse_lowrank_residual.py", "tests/ops/test_accuracy.py"]


def run_tests(folder, flag):
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("needs Linux on x86-64, and g++")
    extension = build(folder, ["-O3", flag])
    command = [sys.executable, "-m", "tests.ops.other_build", str(extension), *CASES]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not (opcheck or compile or fake)"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "TIMEROME_DISABLE_C": "0"}
    found = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    passed = found.stdout.rsplit(" passed", 1)[0].split()[-1]
    assert int(passed) > 150
    return extension.read_bytes()


@pytest.mark.slow
def test_without_avx512(tmp_path):
    built = run_tests(tmp_path, "-DTIMEROME_NO_AVX512")
    assert b"score_v3" in built and b"_v4" not in built


@pytest.mark.slow
def test_another_first_cache(tmp_path):
    if "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs AVX-512: without, all caches are treated alike")
    ways = subprocess.run(["getconf", "LEVEL1_DCACHE_ASSOC"], capture_output=True, text=True, check=True).stdout
    other = 8 if int(ways) >= 12 else 12
    run_tests(tmp_path, f"-DTIMEROME_FIRST_CACHE_WAYS={other}")

"""What runs on a processor that has AVX2 but not AVX-512: the ops' tests, with such a build."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.ops.other_build import build

CASES = ["tests/ops/test_sparsify_add.py", "tests/ops/test_sparse_lowrank_residual.py", "tests/ops/test_accuracy.py"]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("needs Linux on x86-64, and g++")
    return build(tmp_path_factory.mktemp("avx2"), ["-O3", "-DTIMEROME_NO_AVX512"])


@pytest.mark.slow
def test_ops_without_avx512(extension):
    names = extension.read_bytes()
    assert b"score_v3" in names and b"_v4" not in names
    command = [sys.executable, "-m", "tests.ops.other_build", str(extension), *CASES]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not (opcheck or compile or fake)"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "TIMEROME_DISABLE_C": "0"}
    found = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    passed = found.stdout.rsplit(" passed", 1)[0].split()[-1]
    assert int(passed) > 150

"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the ops' tests, run with such a build."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.other_build import build, run, run_tests

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]

# All that reaches the compiled code, but for what tests torch.compile and dispatch; several threads, odd addresses,
# empty and ragged shapes are among it.
CASES = [
    "tests/ops/test_sparsify_add.py",
    "tests/ops/test_cholesky_rows.py",
    "tests/ops/test_edit_sets.py",
    "tests/ops/test_sparse_lowrank_residual.py",
    "tests/ops/test_bad_input.py::test_good_arguments_are_taken_and_give_numbers",
    "tests/ops/test_bad_input.py::test_nan_stays_in_its_row",
]
LEFT_OUT = "opcheck or compile or fake or correlated or errors or kept_count or ridge or reference-cholesky"


def library(name):
    """The full path of one of the compiler's libraries; None if it has none."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    return path if path.is_absolute() else None


@pytest.fixture(scope="module")
def environment():
    """What a process needs to run with such an extension."""
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("needs Linux and g++")
    paths = {name: library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        pytest.skip("g++ comes without " + ", ".join(missing))
    environment = {
        # There before all other libraries: ASan, and the C++ one so that ASan finds what throws.
        "LD_PRELOAD": f"{paths['libasan.so']} {paths['libstdc++.so']}",
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",  # Python leaves memory to the system at exit
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    }
    # A library older than the kernel may not find room for its shadow memory.
    if any(run(["-c", "pass"], **environment).returncode for _ in range(5)):
        pytest.skip("AddressSanitizer does not run here")
    return environment


@pytest.fixture(scope="module")
def extension(environment, tmp_path_factory):
    """timerome._C for the CPU, its kernels instrumented."""
    return build(tmp_path_factory.mktemp("sanitized"), SANITIZE, SANITIZE)


@pytest.mark.slow
def test_tests_of_the_ops_run_clean(extension, environment):
    run_tests(extension, CASES, LEFT_OUT, **environment)


STRAY = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("timerome._C", sys.argv[1])
c = importlib.util.module_from_spec(spec)
spec.loader.exec_module(c)
allocate = ctypes.CDLL(None).malloc
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
rows, d = 2, 700
h, r, out = (allocate(rows * d * 4) for _ in range(3))
ctypes.memset(h, 0, rows * d * 4), ctypes.memset(r, 1, rows * d * 4)
c.sparsify_add_cpu(h, r, out, 0, rows, d, 70, 1.0, 0, 1)
print("clean")
c.sparsify_add_cpu(h, r, out, 0, rows + int(sys.argv[2]), d, 70, 1.0, 0, 1)
"""


@pytest.mark.slow
def test_a_row_too_many_is_noticed(extension, environment):
    """The proof that the build is instrumented, and that memory from outside it is watched."""
    good = run(["-c", STRAY, str(extension), "0"], **environment)
    assert (good.returncode, good.stdout) == (0, "clean\n"), good.stderr
    bad = run(["-c", STRAY, str(extension), "1"], **environment)
    assert bad.returncode == 66, bad.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in bad.stderr and "sparsify_add_cpu.cpp" in bad.stderr

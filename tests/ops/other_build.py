"""Another build of timerome._C, and Python and pytest with it in the place of the installed one.

Usage: python -m tests.ops.other_build <the extension> <arguments of pytest>
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch  # noqa: F401  first, as in timerome._backend: one OpenMP thread pool

from tests.helpers import ROOT, load_setup


def build(folder, kernel_flags, link_flags=()):
    """Compile the CPU's half into the folder. The bindings only pass addresses on: the flags are not for them."""
    import pybind11

    macros = ("TIMEROME_BUILT_FOR", "TIMEROME_CUDA_ARCHS", "TIMEROME_CUDA_WHY_NOT")
    (folder / "build_info.h").write_text("".join(f'#define {macro} "a test"\n' for macro in macros))
    folders = (ROOT / "csrc", folder, sysconfig.get_paths()["include"], pybind11.get_include())
    include = [f"-I{path}" for path in folders]
    objects, compilers = [], []
    setup = load_setup()
    for source in setup.CPP_SOURCES:
        objects.append(str(folder / (Path(source).name + ".o")))
        how = ["-O0"] if source.endswith("bindings.cpp") else kernel_flags
        command = ["g++", *setup.CXX_FLAGS, *how, *include, "-c", str(ROOT / source), "-o", objects[-1]]
        compilers.append(subprocess.Popen(command))
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    module = folder / "_C.so"
    subprocess.run(["g++", "-shared", "-fopenmp", *link_flags, *objects, "-o", str(module)], check=True)
    return module


def run(arguments, **environment):
    """Start Python in a process of its own, with two threads that do not spin."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "TIMEROME_DISABLE_C": "0",
        **environment,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def run_tests(extension, cases, left_out, **environment):
    """Run pytest with the extension: more than 150 tests, all of which pass."""
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({left_out})"]
    found = run(["-m", "tests.ops.other_build", str(extension), *cases, *options], **environment)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    passed = found.stdout.rsplit(" passed", 1)[0].split()[-1]
    assert int(passed) > 150


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("timerome._C", sys.argv[1])
    sys.modules["timerome._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from timerome import _backend

    assert _backend.compiled() is module
    sys.exit(pytest.main(sys.argv[2:]))

"""Another build of timerome._C, and pytest with it in the place of the installed one.

Usage: python -m tests.ops.other_build <the extension> <arguments of pytest>
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch  # noqa: F401  first, as in timerome._backend: one OpenMP thread pool

from tests.helpers import ROOT, load_setup

FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", "-Wno-psabi"]


def build(folder, kernel_flags, link_flags=()):
    """Compile the CPU's half into the folder. The bindings only pass addresses on: the flags are not for them."""
    import pybind11

    macros = ("TIMEROME_BUILT_FOR", "TIMEROME_CUDA_ARCHS", "TIMEROME_CUDA_WHY_NOT")
    (folder / "build_info.h").write_text("".join(f'#define {macro} "a test"\n' for macro in macros))
    folders = (ROOT / "csrc", folder, sysconfig.get_paths()["include"], pybind11.get_include())
    include = [f"-I{path}" for path in folders]
    objects, compilers = [], []
    for source in load_setup().CPP_SOURCES:
        objects.append(str(folder / (Path(source).name + ".o")))
        how = ["-O0"] if source.endswith("bindings.cpp") else kernel_flags
        command = ["g++", *FLAGS, *how, *include, "-c", str(ROOT / source), "-o", objects[-1]]
        compilers.append(subprocess.Popen(command))
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    module = folder / "_C.so"
    subprocess.run(["g++", "-shared", "-fopenmp", *link_flags, *objects, "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("timerome._C", sys.argv[1])
    sys.modules["timerome._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from timerome import _backend

    assert _backend.compiled() is module
    sys.exit(pytest.main(sys.argv[2:]))

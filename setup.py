"""Builds the extension module timerome._C with ninja. Everything else about the package is in pyproject.toml.

TIMEROME_CUDA   auto (default): build what this machine can; a missing or failing CUDA compiler, then a missing or
                failing C++ compiler, is reported in the log and the package goes on without. 1: CUDA or an error.
                0: CPU only, or an error.
TIMEROME_CUDA_ARCHS   compute capabilities, default "80;90+PTX".
MAX_JOBS        how many compilers run at once.
CXX             the C++ compiler, default g++.

No GPU is needed to build, and torch is neither needed nor looked at.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPP_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cholesky_cpu.cpp",
    "csrc/lowrank_cpu.cpp",
    "csrc/pages_cpu.cpp",
    "csrc/sparsify_add_cpu.cpp",
]
CUDA_SOURCES = ["csrc/cuda_probe.cu", "csrc/gram.cu", "csrc/lowrank.cu", "csrc/ridge.cu", "csrc/sparsify_add.cu"]
HEADERS = [
    "csrc/clones.h",
    "csrc/cuda_common.cuh",
    "csrc/device.cuh",
    "csrc/gram_kernel.cuh",
    "csrc/kernels.h",
    "csrc/lowrank_apply.cuh",
    "csrc/lowrank_products.cuh",
    "csrc/lowrank_score.cuh",
    "csrc/lowrank_select.cuh",
    "csrc/ridge_kernel.cuh",
    "csrc/rows.cuh",
    "csrc/rows_cpu.h",
    "csrc/sparsify_add_kernel.cuh",
]
# No -ffast-math; -ffp-contract=off, so that results do not depend on the instruction set the loader picks. Nobody asks
# the processor which operations trapped, and where one might, a choice between sums is made with branches.
CXX_FLAGS = ["-ffp-contract=off", "-fno-trapping-math"]
CXX_FLAGS += ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wno-psabi"]


class Cuda(NamedTuple):
    """The CUDA side of a build: a compiler with its static runtime, or the reason why there is none."""

    nvcc: Path | None = None
    cudart: Path | None = None
    archs: tuple[str, ...] = ()
    why_not: str = ""


def find_nvcc(env: Mapping[str, str]) -> Path | None:
    """The first nvcc of CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda."""
    roots = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    candidates = [root / "bin" / "nvcc" for root in roots] + ([Path(on_path)] if on_path else [])
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc for nvcc in candidates if nvcc.exists()), None)


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit's folder as nvcc itself reports it: the nvcc on PATH may be a wrapper script that lies elsewhere."""
    command = [str(nvcc), "--dryrun", "-x", "cu", os.devnull]
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return nvcc.resolve().parent.parent


def find_cuda(env: Mapping[str, str]) -> Cuda:
    """What TIMEROME_CUDA asks for and this machine has. Raises CompileError if they do not agree."""
    mode = env.get("TIMEROME_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise CompileError(f"TIMEROME_CUDA={mode!r}: expected auto, 0 or 1")
    if mode == "0":
        return Cuda(why_not="built with TIMEROME_CUDA=0")
    nvcc = find_nvcc(env)
    if nvcc is None:
        found = Cuda(why_not="no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda at build time")
    else:
        root = toolkit_root(nvcc)
        folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        libraries = [root / folder / "libcudart_static.a" for folder in folders]
        cudart = next((library for library in libraries if library.exists()), None)
        archs = tuple(env.get("TIMEROME_CUDA_ARCHS", "80;90+PTX").split(";"))
        found = Cuda(nvcc, cudart, archs) if cudart else Cuda(why_not=f"no libcudart_static.a under {root}")
    if mode == "1" and found.nvcc is None:
        raise CompileError(
            f"TIMEROME_CUDA=1, but CUDA cannot be built: {found.why_not}. Install the CUDA toolkit, "
            "set CUDA_HOME to it, or use TIMEROME_CUDA=auto."
        )
    return found


def gencode(archs: tuple[str, ...]) -> str:
    """Compiler flags for the architectures; "90+PTX" also embeds PTX, from which newer GPUs compile at load time."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        targets = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={target}" for target in targets]
    return " ".join(flags)


def write_if_changed(path: Path, text: str) -> None:
    """Leaves an equal file alone, time stamp included, so that ninja does not rebuild for it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_path(path: Path) -> str:
    """A path as a build line of ninja spells it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_build(cuda: Cuda, output: Path, env: Mapping[str, str]) -> None:
    """Compiles and links the module to `output`. Raises CompileError."""
    import pybind11  # a build requirement; find_cuda and its tests do without

    # A fixed folder: an editable build gets a fresh temporary one from setuptools, in which ninja would start over.
    kind = "cuda" if cuda.nvcc else "cpu"
    folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    built_for = f"Python {sys.version_info.major}.{sys.version_info.minor}, {sysconfig.get_platform()}"
    macros = {
        "TIMEROME_BUILT_FOR": built_for,
        "TIMEROME_CUDA_ARCHS": ";".join(cuda.archs),
        "TIMEROME_CUDA_WHY_NOT": cuda.why_not,
    }
    # json.dumps writes what C++ reads as the same string literal.
    header = "".join(f"#define {name} {json.dumps(value)}\n" for name, value in macros.items())
    write_if_changed(folder / "build_info.h", "// Written by setup.py.\n#pragma once\n" + header)

    include = shlex.quote(f"-I{ROOT / 'csrc'}")
    cflags = f"-O3 {' '.join(CXX_FLAGS)} -Wall -Wextra {include}"
    # Only the bindings see pybind11 and Python: in an isolated build their path changes every time.
    binding_folders = (folder, sysconfig.get_paths()["include"], pybind11.get_include())
    binding_flags = " ".join(shlex.quote(f"-I{path}") for path in binding_folders)
    if cuda.nvcc:
        binding_flags += " -DTIMEROME_WITH_CUDA"
    nvflags = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -Xfatbin -compress-all {gencode(cuda.archs)}"
    ldflags = "-shared -fopenmp -s" + (f" {shlex.quote(str(cuda.cudart))} -ldl -lrt -lpthread" if cuda.nvcc else "")
    lines = [
        f"cxx = {env.get('CXX', 'g++')}",
        f"nvcc = {shlex.quote(str(cuda.nvcc))}",
        f"cflags = {cflags}",
        f"nvflags = {nvflags} {include}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cuda",
        "  command = $nvcc -MMD -MF $out.d $nvflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {ldflags} -o $out",
    ]
    objects = []
    for source in CPP_SOURCES + (CUDA_SOURCES if cuda.nvcc else []):
        objects.append(Path(source).name + ".o")
        lines.append(f"build {objects[-1]}: {'cuda' if source.endswith('.cu') else 'cxx'} {ninja_path(ROOT / source)}")
        if source.endswith("bindings.cpp"):
            lines.append(f"  cflags = {cflags} {binding_flags}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    write_if_changed(folder / "build.ninja", "\n".join(lines) + "\n")

    ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts")) / "ninja")
    jobs = ["-j", env["MAX_JOBS"]] if env.get("MAX_JOBS") else []
    try:
        subprocess.run([ninja, "-C", str(folder), *jobs], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"timerome._C ({kind}): {error}; the compiler's own message is above") from error


def build(output: Path, env: Mapping[str, str]) -> None:
    """Builds what TIMEROME_CUDA allows, falling back from CUDA to CPU in auto mode."""
    cuda = find_cuda(env)
    print(
        f"timerome: CUDA {cuda.nvcc}, archs {';'.join(cuda.archs)}"
        if cuda.nvcc
        else f"timerome: CPU only, {cuda.why_not}"
    )
    try:
        ninja_build(cuda, output, env)
    except CompileError as error:
        if not cuda.nvcc or env.get("TIMEROME_CUDA") == "1":
            raise
        print(f"timerome: the CUDA build failed, falling back to CPU only: {error}")
        ninja_build(Cuda(why_not=f"the CUDA build with {cuda.nvcc} failed"), output, env)


class NinjaBuildExt(build_ext):
    """setuptools' build step, with ninja instead of its compiler objects."""

    def build_extension(self, ext: Extension) -> None:
        """Called once, for timerome._C. When optional, setuptools turns a CompileError into a warning."""
        if sys.platform != "linux":
            raise CompileError("timerome._C is built on Linux only; elsewhere the PyTorch code runs")
        build(Path(self.get_ext_fullpath(ext.name)).resolve(), os.environ)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "timerome._C",
                CPP_SOURCES + CUDA_SOURCES,
                depends=HEADERS,  # what puts the headers into the sdist
                optional=os.environ.get("TIMEROME_CUDA", "auto") == "auto",
            )
        ],
        cmdclass={"build_ext": NinjaBuildExt},
    )

import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools.errors import CompileError

import timerome
from tests.helpers import ROOT, load_setup

setup = load_setup()


def python(code, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_light():
    code = """
import json, sys
import timerome, timerome.ops
import torch
modules = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"modules": modules, "cuda": torch.cuda.is_initialized()}))
"""
    loaded = json.loads(python(code))
    assert not {"lightning", "pytorch_lightning", "transformers", "matplotlib", "scipy"} & set(loaded["modules"])
    assert not loaded["cuda"]


def test_torch_is_loaded_before_the_extension():
    """Otherwise a repaired wheel would bring a second OpenMP thread pool."""
    code = """
import sys
from timerome import _backend
assert "torch" in sys.modules and "timerome._C" not in sys.modules
_backend.compiled()
"""
    python(code)


def test_importing_and_using_the_ops_on_the_cpu_leaves_the_driver_alone():
    code = """
import torch
from timerome import _backend, ops
def probe(): raise AssertionError("asked the CUDA driver")
_backend._gpu = probe
ops.sparsify_add(torch.zeros(2, 4), torch.ones(2, 4), 2)
ops.sparse_lowrank_residual(torch.zeros(2, 4), torch.ones(1, 4), torch.eye(1), torch.ones(1, 4))
"""
    python(code)


def test_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", timerome._version.__version__)
    assert "version = {" in (ROOT / "pyproject.toml").read_text()


def test_every_source_and_header_is_listed():
    listed = {*setup.CPP_SOURCES, *setup.CUDA_SOURCES, *setup.HEADERS}
    assert listed == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}


def test_kernel_headers_stay_free_of_torch_and_launches():
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text
        assert path.suffix == ".cu" or "<<<" not in text


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit, and an nvcc on PATH that is a wrapper script far from it."""
    (tmp_path / "toolkit" / "lib64").mkdir(parents=True)
    (tmp_path / "toolkit" / "lib64" / "libcudart_static.a").touch()
    script(tmp_path / "toolkit" / "bin" / "nvcc", f'echo "#\\$ TOP={tmp_path}/toolkit/bin/.." >&2\n')
    script(tmp_path / "elsewhere" / "nvcc", f'exec {tmp_path}/toolkit/bin/nvcc "$@"\n')
    return tmp_path


def test_nvcc_wrapper_is_asked_for_its_toolkit(toolkit):
    cuda = setup.find_cuda({"PATH": f"{toolkit}/elsewhere"})
    assert cuda.nvcc == toolkit / "elsewhere" / "nvcc"
    assert cuda.cudart == toolkit / "toolkit" / "lib64" / "libcudart_static.a"
    assert cuda.archs == ("80", "90+PTX") and cuda.why_not == ""


def test_cuda_home_wins_over_path(toolkit):
    cuda = setup.find_cuda({"PATH": f"{toolkit}/elsewhere", "CUDA_HOME": f"{toolkit}/toolkit"})
    assert cuda.nvcc == toolkit / "toolkit" / "bin" / "nvcc"


def test_toolkit_without_static_runtime_is_no_toolkit(toolkit):
    (toolkit / "toolkit" / "lib64" / "libcudart_static.a").unlink()
    cuda = setup.find_cuda({"PATH": f"{toolkit}/elsewhere"})
    assert cuda.nvcc is None and "no libcudart_static.a under" in cuda.why_not


def test_cuda_switched_off(toolkit):
    cuda = setup.find_cuda({"PATH": f"{toolkit}/elsewhere", "TIMEROME_CUDA": "0"})
    assert cuda.nvcc is None and "TIMEROME_CUDA=0" in cuda.why_not


def test_demanded_cuda_fails_loudly(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda env: None)
    with pytest.raises(CompileError, match="TIMEROME_CUDA=1, but CUDA cannot be built: no nvcc .* Install the CUDA"):
        setup.find_cuda({"TIMEROME_CUDA": "1"})
    assert "no nvcc" in setup.find_cuda({}).why_not
    with pytest.raises(CompileError, match="expected auto, 0 or 1"):
        setup.find_cuda({"TIMEROME_CUDA": "yes"})


def test_failing_cuda_build_falls_back_only_in_auto_mode(toolkit, monkeypatch, capsys):
    builds = []

    def ninja_build(cuda, output, env):
        builds.append(cuda)
        if cuda.nvcc:
            raise CompileError("nvcc: no")

    monkeypatch.setattr(setup, "ninja_build", ninja_build)
    env = {"PATH": f"{toolkit}/elsewhere"}
    setup.build(toolkit / "_C.so", env)
    assert [bool(cuda.nvcc) for cuda in builds] == [True, False]
    assert "nvcc failed" in builds[1].why_not and "falling back to CPU only" in capsys.readouterr().out
    with pytest.raises(CompileError, match="nvcc: no"):
        setup.build(toolkit / "_C.so", {**env, "TIMEROME_CUDA": "1"})


def test_gencode():
    assert setup.gencode(("80", "90+PTX")).split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_unchanged_build_files_keep_their_time_stamp(tmp_path):
    path = tmp_path / "build.ninja"
    setup.write_if_changed(path, "a")
    os.utime(path, (1, 1))
    setup.write_if_changed(path, "a")
    assert path.stat().st_mtime == 1
    setup.write_if_changed(path, "b")
    assert path.stat().st_mtime > 1 and path.read_text() == "b"


def copy_of_tracked_files(folder: Path) -> Path:
    """The repository as a fresh clone has it: no build folder, no compiled module."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.slow
def test_sdist_builds_a_wheel_that_holds_everything(tmp_path):
    """The sdist has the headers; the wheel built from it has the module, the typing marker and the assets."""
    source = copy_of_tracked_files(tmp_path / "source")
    call = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"

    def build(kind, folder):
        run = subprocess.run(
            [sys.executable, "-c", call.format(kind), str(tmp_path)],
            cwd=folder,
            env={**os.environ, "TIMEROME_CUDA": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return tmp_path / run.stdout.splitlines()[-1]

    sdist = build("sdist", source)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {path.name for path in (ROOT / "csrc").iterdir()} == {path.name for path in (unpacked / "csrc").iterdir()}

    with zipfile.ZipFile(build("wheel", unpacked)) as wheel:
        names = set(wheel.namelist())
    assert any(re.fullmatch(r"timerome/_C\..*\.so", name) for name in names)
    assert "timerome/py.typed" in names
    package = source / "timerome"
    data = ("safetensors", "json", "jsonl", "txt", "html")
    wanted = {p for p in package.rglob("*") if p.suffix == ".py" or "assets" in p.parts and p.suffix[1:] in data}
    assert {str(path.relative_to(source)) for path in wanted} <= names
    assert not any(name.startswith(("tests", "csrc", "benchmarks", "examples")) for name in names)

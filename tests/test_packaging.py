import json
import os
import re
import shutil
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


def build(kind, source, output, **env):
    """Build as pip does without isolation; the file that came out."""
    call = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", call, str(output)],
        cwd=source,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return output / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What is in the sdist, unpacked: the only source of the wheels."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", copy_of_tracked_files(folder / "source"), folder, TIMEROME_CUDA="0")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def wheel(request, sdist, tmp_path_factory):
    """(path, whether it was built with CUDA); one architecture, because compiling is most of the time."""
    cuda = request.param == "cuda"
    if cuda and setup.find_cuda(os.environ).nvcc is None:
        pytest.skip("needs nvcc with libcudart_static.a")
    env = {"TIMEROME_CUDA": str(int(cuda)), "TIMEROME_CUDA_ARCHS": "80"}
    return build("wheel", sdist, tmp_path_factory.mktemp(request.param), **env), cuda


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(folder to put first on the path, whether it was built with CUDA)."""
    path, cuda = wheel
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder), str(path)], check=True)
    return folder, cuda


@pytest.mark.slow
def test_sdist_holds_every_source(sdist):
    assert {path.name for path in (ROOT / "csrc").iterdir()} == {path.name for path in (sdist / "csrc").iterdir()}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        assert archive.testzip() is None
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name for name in names if name.startswith("timerome/")}
    data = ("safetensors", "json", "jsonl", "txt", "html", "css")
    tracked = subprocess.run(["git", "ls-files", "timerome"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {
        name
        for name in tracked.stdout.split()
        if (ROOT / name).exists() and (name.endswith(".py") or "assets/" in name and name.split(".")[-1] in data)
    }
    (module,) = (name for name in package if name.endswith(".so"))
    assert re.fullmatch(r"timerome/_C\..*\.so", module)
    assert package - {module} == wanted | {"timerome/py.typed"}
    information = {re.sub(r"^timerome-[^/]*\.dist-info/", "", name) for name in names - package}
    assert information == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_module_links_neither_cuda_nor_torch(installed):
    """CUDA's runtime is inside, its driver is asked for when a CUDA tensor comes; torch's version does not matter."""
    (module,) = (installed[0] / "timerome").glob("_C.*.so")
    listed = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert any(name.startswith("libgomp") for name in needed)
    assert not any(re.match(r"lib(cuda|nvidia|torch|c10|python)", name) for name in needed), needed


DRIVER = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void loaded() { std::fclose(std::fopen(std::getenv("DRIVER_WAS_LOADED"), "w")); }
"""
USE = """
import os, sys, warnings
import torch
loaded = lambda: os.path.exists(os.environ["DRIVER_WAS_LOADED"])
if loaded():
    sys.exit("torch itself loads the driver")
import timerome
from timerome import _backend, ops
assert os.path.dirname(os.path.dirname(timerome.__file__)) == sys.argv[1], timerome.__file__
c = _backend.compiled()
assert os.path.dirname(c.__file__) == os.path.join(sys.argv[1], "timerome"), c
h, r = torch.randn(5, 700), torch.randn(5, 700)
assert torch.equal(ops.sparsify_add(h, r, 70, 0.5), ops.sparsify_add_reference(h, r, 70, 0.5))
keys, coef = torch.randn(4, 700), torch.eye(4)
edit = h, keys, coef, keys
out = ops.sparse_lowrank_residual(*edit, sparsity=0.5)
torch.testing.assert_close(out, ops.sparse_lowrank_residual_reference(*edit, sparsity=0.5), rtol=1e-4, atol=1e-3)
factor = ops.ridge_cholesky(keys, ridge=0.1).cholesky
torch.testing.assert_close(ops.cholesky_append(ops.cholesky_delete(factor, 3), factor[:3] @ factor[3],
                                               float(factor[3] @ factor[3])), factor)
assert not loaded(), "importing timerome, or its work on the CPU, loaded the CUDA driver"
info = timerome.backend_info()
print(info["cuda_built"], info["cuda_archs"] or "-", loaded())
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_installed_wheel_works_and_leaves_the_driver_alone(installed, tmp_path):
    """A library in the place of CUDA's driver tells when it is loaded; only backend_info may do that."""
    folder, cuda = installed
    (tmp_path / "driver.cpp").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "driver.cpp"), "-o", str(library)], check=True)
    env = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_LIBRARY_PATH": str(tmp_path),
        "DRIVER_WAS_LOADED": str(tmp_path / "loaded"),
        "OMP_NUM_THREADS": "1",
        "TIMEROME_DISABLE_C": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", USE, str(folder)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if "torch itself loads the driver" in run.stderr:
        pytest.skip("torch itself loads the driver here")
    assert run.returncode == 0, run.stderr
    # The last is the proof that the trap works.
    assert run.stdout.split() == [str(cuda), "80" if cuda else "-", str(cuda)]

"""With and without the compiled extension: what is reported, and that results are the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from timerome import _backend

# Prints a digest of results that must not depend on what is compiled, and what backend_info says.
RESULTS = """
import json, sys, torch
torch.set_num_threads(1)
from timerome import _backend, ops
torch.manual_seed(0)
bits = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
out = {"info": _backend.backend_info(), "results": {}}
for dtype in bits:
    h, r, mask = torch.randn(9, 301).to(dtype), torch.randint(-4, 5, (9, 301)).float(), torch.rand(9) < 0.7
    keys, coef = torch.randn(5, 301).to(dtype), torch.eye(5)
    a = ops.sparsify_add(h, r, 33, 0.3, mask)
    b = ops.sparse_lowrank_residual(h, keys, coef, keys, sparsity=0.9, row_mask=mask, gate_threshold=0.0)
    c = ops.sparsify_add_(h.clone().t().contiguous().t(), r, 33, 0.3, mask)
    out["results"][str(dtype)] = [int(x.view(bits[dtype]).long().mul(torch.arange(x.numel()).view_as(x)).sum())
                                  for x in (a, c.contiguous())]
    out["residual"] = b.double().flatten().tolist()
g = ops.ridge_cholesky(torch.randn(6, 20), ridge=0.1).cholesky
g = ops.cholesky_append(ops.cholesky_delete(g, 2), torch.zeros(5).double(), 4.0)
out["factor"] = g.flatten().tolist()
print(json.dumps(out))
"""


def in_subprocess(code, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_without_the_extension_results_are_identical():
    without = in_subprocess(RESULTS, TIMEROME_DISABLE_C="1")
    assert without.returncode == 0 and without.stderr == ""  # never built or switched off: quiet
    without = json.loads(without.stdout)
    info = without["info"]
    assert not info["compiled"] and not info["cuda_built"] and not info["cuda_usable"]
    assert "TIMEROME_DISABLE_C" in info["compiled_why_not"]

    if _backend.compiled() is None:
        pytest.skip("nothing compiled to compare with: " + _backend.backend_info()["compiled_why_not"])
    compiled = json.loads(in_subprocess(RESULTS, TIMEROME_DISABLE_C="0").stdout)
    assert compiled["info"]["compiled"]
    assert compiled["results"] == without["results"]
    # Products may be summed in another order: an entry at the threshold may be kept in one run and not in the other.
    residual, wanted = torch.tensor(compiled["residual"]), torch.tensor(without["residual"])
    assert torch.isclose(residual, wanted, rtol=1e-2, atol=1e-3).float().mean() > 0.999
    torch.testing.assert_close(torch.tensor(compiled["factor"]), torch.tensor(without["factor"]))


@pytest.mark.skipif(not shutil.which("g++") or sys.platform != "linux", reason="needs Linux and g++ to have been built")
def test_extension_is_built_where_it_can_be():
    """Otherwise the whole suite would silently test PyTorch against itself."""
    if os.environ.get("TIMEROME_DISABLE_C", "0") != "0":
        pytest.skip("switched off by TIMEROME_DISABLE_C")
    assert _backend.backend_info()["compiled_why_not"] == ""


def test_backend_info_explains_itself():
    info = _backend.backend_info()
    json.dumps(info)
    for what in ("compiled", "cuda_built", "cuda_usable"):
        assert info[what] is (info[what + "_why_not"] == "")
    assert info["versions"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert not info["cuda_usable"] and info["cuda_usable_why_not"]


@pytest.fixture
def backend(monkeypatch):
    """The module as a new process finds it."""
    caches = [_backend._extension, _backend._gpu, _backend.compiled_cuda]
    for cache in caches:
        cache.cache_clear()
    monkeypatch.delenv("TIMEROME_DISABLE_C", raising=False)
    yield _backend
    for cache in caches:
        cache.cache_clear()


def test_extension_that_was_never_built_is_no_reason_to_warn(backend, monkeypatch, recwarn):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.compiled() is None and "never built" in backend.backend_info()["compiled_why_not"]
    assert not recwarn.list


def test_extension_that_does_not_load_warns_once(backend, monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: xyz")

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning, match="not loading: undefined symbol: xyz.*Reinstall") as caught:
        assert backend.compiled() is None and backend.compiled() is None
    assert len(caught) == 1


def test_unusable_gpu_warns_once_and_leaves_torch_to_it(backend, monkeypatch):
    extension = type(
        "C", (), {"built_with_cuda": True, "cuda_probe": staticmethod(lambda: ("driver too old", 0, 1, 2))}
    )
    monkeypatch.setattr(backend, "_extension", lambda: backend._Extension(extension, ""))
    with pytest.warns(RuntimeWarning, match="cannot be used .driver too old.") as caught:
        assert backend.compiled_cuda() is None and backend.compiled_cuda() is None
    assert len(caught) == 1

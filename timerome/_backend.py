"""The compiled extension: found or not, usable on the GPU or not, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch  # before timerome._C: the extension must join torch's OpenMP thread pool, not start a second one

from timerome._version import __version__


class _Extension(NamedTuple):
    module: ModuleType | None
    why_not: str  # empty if it is there


class _Gpu(NamedTuple):
    why_not: str  # empty if CUDA kernels can run
    devices: int
    runtime: int
    driver: int


@functools.cache
def _extension() -> _Extension:
    if os.environ.get("TIMEROME_DISABLE_C", "0") not in ("", "0"):
        return _Extension(None, "switched off by TIMEROME_DISABLE_C")
    if importlib.util.find_spec("timerome._C") is None:
        return _Extension(None, "never built for this Python; `pip install -v` of timerome says why")
    try:
        return _Extension(importlib.import_module("timerome._C"), "")
    except ImportError as error:
        why = f"present but not loading: {error}"
        warnings.warn(
            f"timerome._C is {why}. Running Python {platform.python_version()} on {platform.platform()}; "
            "PyTorch code runs instead. Reinstall timerome to rebuild it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return _Extension(None, why)


@functools.cache
def _gpu() -> _Gpu:
    """Ask the CUDA driver: for a CUDA tensor or backend_info only, since a CUDA call before a fork harms workers."""
    c = _extension().module
    if c is None:
        return _Gpu("no compiled extension", 0, 0, 0)
    if not c.built_with_cuda:
        return _Gpu(f"no CUDA in the compiled extension: {c.cuda_why_not}", 0, 0, 0)
    error, devices, runtime, driver = c.cuda_probe()
    return _Gpu(error or ("" if devices else "no CUDA device"), devices, runtime, driver)


def compiled() -> ModuleType | None:
    """The extension module, or None if PyTorch code has to do."""
    return _extension().module


@functools.cache
def compiled_cuda() -> ModuleType | None:
    """The extension module if its CUDA kernels can run, else None, with one warning. Call it only for a CUDA tensor."""
    gpu, extension = _gpu(), _extension()
    if gpu.why_not and extension.module is not None:
        warnings.warn(
            f"timerome's CUDA kernels cannot be used ({gpu.why_not}); PyTorch code runs on the GPU instead. "
            "See timerome.backend_info().",
            RuntimeWarning,
            stacklevel=2,
        )
    return None if gpu.why_not else extension.module


def backend_info() -> dict[str, Any]:
    """Report what is compiled, what can run on the GPU, and why not if not.

    Asks the CUDA driver, so do not call it before forking worker processes that use CUDA.

    Returns:
        A dictionary that JSON can hold: ``compiled``, ``compiled_why_not``, ``compiled_for``, ``cuda_built``,
        ``cuda_archs``, ``cuda_built_why_not``, ``cuda_usable``, ``cuda_usable_why_not``, ``cuda_devices``,
        ``cuda_runtime``, ``cuda_driver``, ``threads`` and ``versions``. Every ``..._why_not`` is empty when there is
        nothing to explain.

    Example:
        >>> info = backend_info()
        >>> bool(info["compiled_why_not"]) != info["compiled"]
        True
    """
    import numpy

    extension, gpu = _extension(), _gpu()
    c = extension.module
    return {
        "compiled": c is not None,
        "compiled_why_not": extension.why_not,
        "compiled_for": c.built_for if c else "",
        "cuda_built": bool(c and c.built_with_cuda),
        "cuda_archs": c.cuda_archs if c else "",
        "cuda_built_why_not": c.cuda_why_not if c else extension.why_not,
        "cuda_usable": not gpu.why_not,
        "cuda_usable_why_not": gpu.why_not,
        "cuda_devices": gpu.devices,
        "cuda_runtime": gpu.runtime,
        "cuda_driver": gpu.driver,
        "threads": torch.get_num_threads(),
        "versions": {
            "timerome": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
    }

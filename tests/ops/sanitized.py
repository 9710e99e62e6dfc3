"""Run pytest with an extension built with sanitizers in the place of the installed one; see test_sanitizers.py.

Usage: LD_PRELOAD=<libasan> python -m tests.ops.sanitized <the extension> <arguments of pytest>
"""

import importlib.util
import sys

import pytest
import torch  # noqa: F401  first, as in timerome._backend: one OpenMP thread pool

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("timerome._C", sys.argv[1])
    sys.modules["timerome._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from timerome import _backend

    assert _backend.compiled() is module
    sys.exit(pytest.main(sys.argv[2:]))

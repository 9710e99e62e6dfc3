"""``timerome info``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .._backend import backend_info
from ..progress import Progress
from ._showing import table


def run(progress: Progress, /) -> dict[str, Any]:
    """Say what was built, why something was not, and which versions run.

    Args:
        progress: shows how far it is.
    """
    found = backend_info()
    for package in ("lightning", "transformers", "safetensors"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    rows = [(key.replace("_", " "), value) for key, value in found.items() if key != "versions" and value != ""]
    table("timerome", ("what", "value"), [*rows, *found["versions"].items()])
    return found

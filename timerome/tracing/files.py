"""Trace files: one safetensors file, JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .._files import whole
from ..coordinates import Site
from .data import TraceData

_KEY = "timerome_trace"
_FORMAT = 2
_ABOUT = ("facts", "groups", "steps", "roles", "not_traceable", "settings", "backbone", "fingerprint",
          "library_version", "score")  # fmt: skip
_TUPLES = ("facts", "groups", "steps", "roles")


class TraceFileError(ValueError):
    """The file is no complete trace."""


def save(trace: TraceData, path: Path) -> None:
    """Write ``trace`` to ``path``; the file appears whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {
        f"{score}/{name}": a for score, found in trace.measured.items() for name, a in found.items()
    }
    arrays |= {"recalled": trace.recalled, "permuted": trace.permuted}
    about = {
        "format": _FORMAT,
        "sites": [[site.layer, site.module] for site in trace.sites],
        **{name: getattr(trace, name) for name in _ABOUT},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary, metadata={_KEY: json.dumps(about)}
        )


def load(path: Path) -> dict[str, Any]:
    """Read the fields that :func:`save` wrote; see :meth:`TraceResult.load`."""
    if not path.is_file():
        raise FileNotFoundError(f"TraceResult.load: there is no file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise TraceFileError(f"TraceResult.load: {path} is a safetensors file, but not of a trace.")
            about = json.loads(metadata[_KEY])
            if about["format"] != _FORMAT:
                raise TraceFileError(
                    f"TraceResult.load: {path} has format {about['format']}, this version reads {_FORMAT}; "
                    "use the version of timerome that wrote it, or trace again."
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recalled, permuted = arrays.pop("recalled"), arrays.pop("permuted")
        measured: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in arrays.items():
            score, _, what = name.partition("/")
            measured.setdefault(score, {})[what] = array
        rest: dict[str, Any] = {name: tuple(about[name]) if name in _TUPLES else about[name] for name in _ABOUT}
        sites = tuple(Site(*site) for site in about["sites"])
        return {"sites": sites, "measured": measured, "recalled": recalled, "permuted": permuted, **rest}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise TraceFileError(
            f"TraceResult.load: {path} is no complete trace file ({error}); it may be cut short."
        ) from error

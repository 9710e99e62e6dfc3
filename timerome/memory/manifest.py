"""The manifests of edit files and calibrations: what they hold without their tensors, as JSON; read strictly."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_BYTES = 1 << 26
MAX_TOKENS = 1 << 16  # no canvas is longer; a number beyond it would only fill memory

Form = Any

_COORDINATE: Form = {"layer": int, "module": str, "step": int, "role": str}
_BANK: Form = {
    "canvases": [(int, None)],
    "reveal": [float],
    "prompt_dropout": [float],
    "variants": [str],
    "trajectory": bool,
    "seed": int,
}
_SETTINGS: Form = {
    "coordinate": _COORDINATE, "alpha": float, "ridge": float, "sparsity": float, "rank": int, "beta": float,
    "estimator": str, "margin": float, "bank": _BANK, "shared": bool, "also": [_COORDINATE],
    "by_place": bool, "null_space": (float, None),
}  # fmt: skip
_GATE: Form = {
    "negatives": [dict], "address": bool, "token": bool, "epsilon": (float, None), "layer": int, "span": int,
    "naming": float, "same_subject": float, "related": ([dict], None),
}  # fmt: skip
_EDIT: Form = {
    "id": str, "fact": dict, "settings": int, "operation": str, "supersedes": [str], "rows": [int], "address": int,
    "subject": [[int]],
}  # fmt: skip
_SPARED: Form = {
    "id": str, "prompt": str, "subject": str, "relation": (str, None), "address": int, "spellings": [[int]],
}  # fmt: skip
MANIFEST: Form = {
    "version": str, "fingerprint": str, "tokenizer": str, "settings": [_SETTINGS], "edits": [_EDIT],
    "retired": [str], "spared": [_SPARED], "floor": float, "gate": (_GATE, None), "protect": ([dict], None),
    "bank": _BANK,
    "frames": [{"layer": int, "module": str, "role": str, "scale": float, "protect": int}],
}  # fmt: skip
CALIBRATION: Form = {
    "version": str, "fingerprint": str, "tokenizer": str, "gate": _GATE, "bank": _BANK, "floor": float,
    "frames": [{"layer": int, "module": str, "role": str, "scale": float}],
}  # fmt: skip


class EditFileError(ValueError):
    """A file is no edit file, or damaged, or holds what no memory can be."""


def parse(text: str, form: Form) -> dict[str, Any]:
    """Read a manifest and check that every field is there, is of its kind, and that there is no other.

    Args:
        text: JSON.
        form: :data:`MANIFEST` or :data:`CALIBRATION`.

    Raises:
        EditFileError: it is not; the message names the field.
    """
    if len(text) > MAX_BYTES:
        raise EditFileError(f"the manifest has {len(text)} characters, more than {MAX_BYTES}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EditFileError(f"the manifest is unreadable ({error})") from None
    check(values, form, "manifest")
    banks = {f"settings[{i}].bank": settings["bank"] for i, settings in enumerate(values.get("settings", ()))}
    for name, bank in {**banks, "bank": values["bank"]}.items():
        for canvas in bank["canvases"]:
            if canvas is not None and not 0 < canvas <= MAX_TOKENS:
                raise EditFileError(f"manifest.{name}.canvases: expected 1 to {MAX_TOKENS}, got {canvas}")
    return dict(values)


def check(value: Any, form: Form, name: str) -> None:
    """Refuse a JSON value that does not have a form.

    A form is a type, None, a dict of forms by field (all of them, no others), a list of one form for every entry, or a
    tuple of alternatives. Integers are whole and not negative; floats are finite, and integers will do.

    Raises:
        EditFileError: it has another; the message names the field.

    Example:
        >>> check({"rank": 4}, {"rank": int}, "settings")
        >>> check({"rank": "4"}, {"rank": int}, "settings")
        Traceback (most recent call last):
        timerome.memory.manifest.EditFileError: settings.rank: expected int, got '4'
    """
    if isinstance(form, tuple):
        if value is None and None in form:
            return
        return check(value, form[0], name)
    if isinstance(form, dict):
        if not isinstance(value, dict) or value.keys() != form.keys():
            raise _wrong(name, f"an object with the fields {', '.join(form)}", value)
        for key, own in form.items():
            check(value[key], own, f"{name}.{key}")
        return
    if isinstance(form, list):
        if not isinstance(value, list):
            raise _wrong(name, "a list", value)
        for i, entry in enumerate(value):
            check(entry, form[0], f"{name}[{i}]")
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        int: number and isinstance(value, int) and 0 <= value < 1 << 53,
        float: number and abs(value) < 1e300 and math.isfinite(value),
    }.get(form, isinstance(value, form))
    if not fits:
        raise _wrong(name, form.__name__, value)


def shown(value: object, length: int = 500) -> str:
    """Return a value as text, cut to ``length``: what a file holds may be long.

    Example:
        >>> shown("abcdef", 4)
        'abc…'
    """
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrong(name: str, wanted: str, value: Any) -> EditFileError:
    return EditFileError(f"{shown(name, 200)}: expected {wanted}, got {shown(repr(value), 80)}")

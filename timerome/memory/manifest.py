"""JSON from files of others, read strictly: every field is there and of its kind, and there is no other."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import EditFileError

MAX_BYTES = 1 << 26
Form = Any


def parse(text: str, form: Form) -> dict[str, Any]:
    """Read a manifest and check that every field is there, is of its kind, and that there is no other.

    Args:
        text: JSON.
        form: what it must be, see :func:`check`.

    Raises:
        EditFileError: it is not; the message names the field.
    """
    if len(text) > MAX_BYTES:
        raise EditFileError(f"the manifest has {len(text)} characters, more than {MAX_BYTES}")
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise EditFileError(f"the manifest is unreadable ({error})") from None
    check(values, form, "manifest")
    return dict(values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it says something twice: readers differ in which of them they believe."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands there twice")
    return found


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
        timerome.errors.EditFileError: settings.rank: expected int, got '4'
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

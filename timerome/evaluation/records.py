"""Benchmark files, read strictly: what is malformed is refused with file, record and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Record = dict[str, Any]
Check = Callable[[Any], Any]
T = TypeVar("T")


class DataError(ValueError):
    """A benchmark file is not what it should be; the message names file, record and field."""


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair, which JSON can escape, is no character: no tokenizer takes it, and no file.
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def text(value: Any) -> str:
    """Accept a text with something in it."""
    if not _is_text(value):
        raise ValueError("a non-empty text")
    return str(value)


def texts(value: Any) -> list[str]:
    """Accept a list of at least one text."""
    if not isinstance(value, list) or not value or not all(map(_is_text, value)):
        raise ValueError("a list of at least one non-empty text")
    return value


def answers(value: Any) -> list[str]:
    """Accept a text, a list of texts, or a list of lists of texts: equivalent answers, the first one canonical."""
    flat = [value] if isinstance(value, str) else value
    if isinstance(flat, list) and flat and all(isinstance(part, list) for part in flat):
        flat = [t for part in flat for t in part]
    if not isinstance(flat, list) or not flat or not all(map(_is_text, flat)):
        raise ValueError("a non-empty text, or a list of them")
    return flat


def optional(check: Check) -> Check:
    """Accept what ``check`` accepts; None, or a field that is not there, is None."""

    def accept(value: Any) -> Any:
        return None if value is None else check(value)

    return accept


def mapping(checks: Mapping[str, Check]) -> Check:
    """Accept an object whose fields pass ``checks``; errors name the inner field."""

    def accept(value: Any) -> Record:
        if not isinstance(value, dict):
            raise ValueError("an object with the fields " + ", ".join(checks))
        return _checked(value, checks)

    return accept


class _FieldError(ValueError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _checked(record: Record, checks: Mapping[str, Check]) -> Record:
    found = {}
    for name, check in checks.items():
        value = record.get(name)
        try:
            found[name] = check(value)
        except _FieldError as error:
            raise _FieldError(f"{name}.{error.field}", str(error)) from None
        except ValueError as error:
            came = "nothing (there is no such field)" if name not in record else _short(value)
            raise _FieldError(name, f"expected {error}, got {came}") from None
    return found


def read_records(file: Path, checks: Mapping[str, Check], *, distinct: str | None = None) -> list[Record]:
    """Read a JSON array of objects, or one object a line, and check every record's fields.

    Args:
        file: the file.
        checks: what each field must be; fields that are not named are ignored.
        distinct: a field that names the record, so that no two may have the same value.

    Returns:
        The checked fields of every record, in order; none is left out.

    Raises:
        DataError: the file is no such file, or a record is malformed; it names file, record (from 0) and field.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, got {error}.") from None
    records = _array(file, content) if content.lstrip().startswith("[") else _lines(file, content)
    if not records:
        raise DataError(f"{file}: expected at least one record, got none.")
    found = []
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{file}, record {i}: expected an object, got {_short(record)}.")
        try:
            found.append(_checked(record, checks))
        except _FieldError as error:
            raise DataError(f"{file}, record {i}, field {error.field!r}: {error}.") from None
    if distinct is not None:
        names: dict[Any, int] = {}
        for i, record in enumerate(found):
            if (first := names.setdefault(record[distinct], i)) != i:
                raise DataError(
                    f"{file}, record {i}, field {distinct!r}: expected another id than record {first} has, got "
                    f"{_short(record[distinct])}."
                )
    return found


def find_file(path: Path, *names: str) -> Path | None:
    """Return the file of a benchmark folder that is called like one of ``names``, the first that is there; or None.

    A name stands for itself with ``.json`` or ``.jsonl``, and for a cut copy, ``name.first300.json``. A path that is a
    file is itself.
    """
    if path.is_file():
        return path
    for name in names:
        for pattern in (f"{name}.json", f"{name}.jsonl", f"{name}.*.json", f"*/{name}.json", f"*/{name}.*.json"):
            if fits := sorted(path.glob(pattern)):
                return fits[0]
    return None


def evenly(records: Sequence[T], limit: int | None) -> list[T]:
    """Return ``limit`` of the records, spread evenly over all of them, or all if there are no more.

    The first so many would be about a few subjects.

    Example:
        >>> evenly([0, 1, 2, 3, 4, 5], 3)
        [0, 2, 4]
    """
    if limit is None or limit >= len(records):
        return list(records)
    if limit < 1:
        raise ValueError(f"evenly: expected limit of at least 1, got {limit}.")
    return [records[i * len(records) // limit] for i in range(limit)]


def _array(file: Path, content: str) -> list[Any]:
    try:
        return list(json.loads(content))
    except ValueError as error:
        raise DataError(f"{file}: expected JSON, got {error}.") from None


def _lines(file: Path, content: str) -> list[Any]:
    records = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{file}, line {number}: expected one JSON object a line, got {error}.") from None
    return records


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:59] + "…"

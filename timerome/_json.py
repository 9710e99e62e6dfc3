"""Files of JSON objects as other people make them: an array, or one object a line; with a byte order mark, gzipped."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

LINE = 8 << 20  # bytes of one object; those of benchmarks have some thousand
ARRAY = 256 << 20  # bytes of an array, which is read at once; CounterFact, one of the largest, has 45 MB

_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(value: Any) -> bool:
    """Whether a value is a text with something in it."""
    # Half of a surrogate pair, which JSON can escape, is no character: no tokenizer takes it, and no file.
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def short(value: Any) -> str:
    """Show a value in a message, its beginning if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:79] + "…"


def read_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object with its place: ``"line 3"``, or ``"record 2"`` of an array, from 0. Blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than UTF-8 text, JSON and objects, or far too much; names file and place.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    with file.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield from _objects(file, cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: expected a whole gzip file, got one that ends or breaks off: {error}.") from None


def _objects(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    first, number = True, 0
    while line := stream.readline(LINE + 1):
        number += 1
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if first and line.lstrip().startswith(b"["):
            content = line + stream.read(ARRAY)
            if len(content) > ARRAY:
                raise ValueError(f"{file}: expected at most {ARRAY} bytes of JSON, got more; write one object a line.")
            values = _parsed(content, str(file), number)
            yield from ((f"record {i}", _object(value, f"{file}, record {i}")) for i, value in enumerate(values))
            return
        place = f"line {number}"
        if len(line) > LINE:
            raise ValueError(
                f"{file}, {place}: expected lines of at most {LINE} bytes, got a longer one; put one object on each."
            )
        if line.strip() and (value := _parsed(line, f"{file}, {place}")) is not None:
            yield place, _object(value, f"{file}, {place}")
            first = False


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object, got {short(value)}.")
    return value


def _parsed(content: bytes, place: str, line: int | None = None) -> Any:
    """Return the value of some JSON; ``line`` is where it begins, if it may have several."""
    try:
        if b"\0" in content:
            raise ValueError("a zero byte")
        text = content.decode()
    except ValueError as error:
        raise ValueError(f"{place}: expected UTF-8 text, got {error}; save the file as UTF-8.") from None
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if line is None else f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: expected JSON, got something else at {column}: {error.msg}.") from None
    except RecursionError:
        raise ValueError(f"{place}: expected JSON, got brackets nested too deeply to read.") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{place}: expected JSON, got {error}.") from None

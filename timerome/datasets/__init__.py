"""Benchmarks' files and bundled facts: one reader a format, for the facts that are edited and for what is measured.

Readers called like a benchmark return a :class:`timerome.FactSet`: records whose subject is not in their prompt, and
repeated ones, are left out, with a warning that counts them. Those called ``…_records`` return every record, with what
the benchmark asks beside the fact.

``path`` is a file, or a folder that holds the benchmark's files, itself or in its folders; ``split`` is which of them:
its name up to the first dot, or that of its folder. Ids hold it where the benchmark has no ids. Files are JSON arrays,
or one object a line, in UTF-8, also gzipped. :class:`FileNotFoundError` says which files there are instead, and
:class:`timerome.facts.FactError` that several fit, or which file, record and field is malformed.
"""

from pathlib import Path

from ..facts import FactSet
from ._edits import (
    counterfact,
    counterfact_records,
    counterfact_snippets,
    knowedit,
    knowedit_records,
    zsre,
    zsre_records,
)
from ._names import author_name
from ._reading import Record, evenly, find
from ._rwku import PROBES, rwku, rwku_records
from ._tofu import AUTHOR, bundled, bundled_records, tofu, tofu_records

__all__ = [
    "AUTHOR",
    "PROBES",
    "Record",
    "author_name",
    "bundled",
    "bundled_records",
    "counterfact",
    "counterfact_records",
    "counterfact_snippets",
    "evenly",
    "find",
    "jsonl",
    "knowedit",
    "knowedit_records",
    "rwku",
    "rwku_records",
    "tofu",
    "tofu_records",
    "zsre",
    "zsre_records",
]


def jsonl(path: str | Path) -> FactSet:
    """Read facts, one JSON object a line; see :meth:`timerome.FactSet.from_jsonl`.

    Example:
        >>> from importlib.resources import files
        >>> jsonl(files("timerome") / "assets" / "relations.jsonl")
        FactSet(274 facts)
    """
    return FactSet.from_jsonl(path)

"""RWKU: probes of what is known about real people, and what else their forgetting is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..facts import FactSet
from ._names import mention
from ._reading import Record, Row, as_facts, find, read_rows, stem

PROBES = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")


def rwku(path: str | Path, split: str | None = None) -> FactSet:
    """Read facts of RWKU: ``forget_level1``, …, ``neighbor_level2``; blanks of a query stay ``___``.

    The subject is what the query calls the target, or the neighbour; queries that do not name them are left out.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     line = '{"query": "It is by Mr. King?", "answer": "yes", "subject": "Stephen King", "type": "simple"}'
        ...     _ = Path(folder, "forget_level2.jsonl").write_text(line)
        ...     rwku(folder, "forget_level2")[0].subject
        'King'
    """
    file = find(path, split or "*")
    name = split or stem(file)
    records = [
        Record(
            f"rwku-{name}-{i:04d}", r["query"], mention(r["neighbor"] or r["subject"], r["query"]), r["answer"],
            relation=r["type"], group=r["subject"],
        )
        for i, r in enumerate(map(_probe, read_rows(file)))
    ]  # fmt: skip
    return as_facts("rwku", path, split, records)


def rwku_records(path: str | Path, targets: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Read a folder of RWKU's files, those of its utility sets too.

    Args:
        path: the folder.
        targets: keep only probes about these people (RWKU's ``subject``); None keeps all.

    Returns:
        Checked records by file name, each with an ``id``; a file that is not there is not in it.

    Raises:
        FactError: a record is malformed; the message names file, record and field.
        FileNotFoundError: there is none of the forget probes.
        ValueError: no probe is about one of ``targets``.
    """
    path, found = Path(path), {}
    for name, read in _FILES.items() if path.is_dir() else ():
        with suppress(FileNotFoundError):
            rows = [{**read(row), "id": f"rwku-{name}-{i:04d}"} for i, row in enumerate(read_rows(find(path, name)))]
            # TruthfulQA and the like are about nobody.
            found[name] = [r for r in rows if targets is None or r.get("subject", targets[0]) in targets]
    if not any(name in found for name in PROBES[:3]):
        raise FileNotFoundError(f"rwku: expected one of {', '.join(PROBES[:3])} (.json) in {path}, got none.")
    if targets is not None and not any(found.get(name) for name in PROBES[:3]):
        raise ValueError(f"rwku: expected a probe about {', '.join(targets)} in {path}, got none.")
    return found


def _probe(row: Row) -> dict[str, Any]:
    return {**_texts(row, "query", "answer", "subject", "type"), "neighbor": row.maybe("neighbor")}


def _texts(row: Row, *names: str) -> dict[str, Any]:
    return {name: row.text(name) for name in names}


def _truthful(row: Row) -> dict[str, Any]:
    choices = list(row.texts("mc1_targets.choices"))
    labels = row.take("mc1_targets.labels", "a list of 0 and exactly one 1", _is_one_of_many)
    if len(choices) != len(labels):
        raise row.wrong("mc1_targets.labels", f"as many labels as choices ({len(choices)})", labels)
    return {"question": row.text("question"), "choices": choices, "right": labels.index(1)}


def _is_one_of_many(labels: Any) -> bool:
    return isinstance(labels, list) and labels.count(1) == 1 and all(label in (0, 1) for label in labels)


_FILES: dict[str, Callable[[Row], dict[str, Any]]] = {
    **dict.fromkeys(PROBES, _probe),
    "forget_mia": lambda row: _texts(row, "text", "subject"),
    "retain_mia": lambda row: _texts(row, "text"),
    "triviaqa": lambda row: {"question": row.text("question"), "answers": list(row.texts("answers"))},
    "truthful": _truthful,
    "fluency": lambda row: _texts(row, "instruction"),
}

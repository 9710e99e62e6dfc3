"""What every reader needs: the file, its rows checked field by field, and facts made of records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from .._json import is_text, read_objects, short
from ..facts import Fact, FactError, FactSet, find_subject

Questions = Mapping[str, Sequence[tuple[str, str]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One record of a benchmark: a fact as the file has it, and what else is asked about it.

    Attributes:
        id, prompt, subject, object, new_object, paraphrases, neighbours, relation, group: as of a fact, but that the
            subject may be missing in the prompt, or empty.
        reworded: the true answer in other words; None where there is none.
        perturbed: wrong answers of the same form.
        neighbour_object: what is true of the neighbours, where one answer is true of all.
        generation: prompts for longer texts about the subject.
        new_id: Wikidata id of the new object.
        portability: questions whose answers follow from the edit, with those answers, by group.
        locality: questions whose answers must not change, with the true ones, by group.
    """

    id: str
    prompt: str
    subject: str
    object: str
    new_object: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    relation: str | None = None
    group: str | None = None
    reworded: str | None = None
    perturbed: tuple[str, ...] = ()
    neighbour_object: str = ""
    generation: tuple[str, ...] = ()
    new_id: str | None = None
    portability: Questions = field(default_factory=dict)
    locality: Questions = field(default_factory=dict)

    @property
    def wanted(self) -> str:
        """The new object.

        Raises:
            FactError: there is none.
        """
        if self.new_object is None:
            raise FactError(f"expected a new object in record {self.id!r}, got none; choose a file of edits.")
        return self.new_object


class Row:
    """An object of a file, whose fields are asked for by path; what is not as wanted is refused by its name.

    Args:
        place: file and record, for messages.
        values: the object.
        within: path of the object itself, where it is part of a row.
    """

    def __init__(self, place: str, values: dict[str, Any], within: str = "") -> None:
        self.place, self.values, self.within = place, values, within

    def get(self, path: str) -> Any:
        """Return a field, or None if it is not there: ``"answer"``, or ``"target.str"`` of an object ``target``."""
        value: Any = self.values
        names = path.split(".")
        for i, name in enumerate(names):
            if not isinstance(value, dict):
                raise self.wrong(".".join(names[:i]), "an object", value)
            value = value.get(name)
        return value

    def take(self, path: str, wanted: str, accepts: Callable[[Any], bool]) -> Any:
        """Return a field that is accepted."""
        if not accepts(value := self.get(path)):
            raise self.wrong(path, wanted, value)
        return value

    def text(self, path: str) -> str:
        """Return a field that must be a text."""
        return str(self.take(path, "a non-empty text", is_text))

    def maybe(self, path: str) -> str | None:
        """Return a field that may be a text."""
        return None if self.get(path) is None else self.text(path)

    def texts(self, path: str) -> tuple[str, ...]:
        """Return a field that must be a list of at least one text."""
        return tuple(self.take(path, "a list of at least one non-empty text", _are_texts))

    def number(self, path: str) -> int:
        """Return a field that must be an integer."""
        return int(self.take(path, "an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)))

    def answer(self, path: str) -> str:
        """Return the first answer of a text, a list of equivalent ones, or a list of such lists."""
        value = self.get(path)
        flat = [value] if isinstance(value, str) else value
        if isinstance(flat, list) and flat and all(isinstance(part, list) for part in flat):
            flat = [text for part in flat for text in part]
        if not _are_texts(flat):
            raise self.wrong(path, "a non-empty text, or a list of them", value)
        return str(flat[0])

    def rows(self, name: str) -> list[Row]:
        """Return a field, by its name, that must be a list of objects."""
        value = self.values.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(name, "a list of objects", value)
        return [Row(self.place, item, f"{self.within}{name}.{i}.") for i, item in enumerate(value)]

    def wrong(self, path: str, wanted: str, value: Any) -> FactError:
        """Return the error of a field."""
        came = "nothing (there is no such field)" if value is None else short(value)
        return FactError(f"{self.place}, field {self.within + path!r}: expected {wanted}, got {came}.")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the objects of a file, see :func:`timerome._json.read_objects`.

    Raises:
        FileNotFoundError: there is no such file.
        FactError: it is not what it should be, or is empty; the message names file and place.
    """
    found = False
    try:
        for place, values in read_objects(file):
            found = True
            yield Row(f"{file}, {place}", values)
    except FactError:
        raise
    except ValueError as error:
        raise FactError(str(error)) from None
    if not found:
        raise FactError(f"{file}: expected at least one record, got none.")


def find(path: str | Path, *names: str) -> Path:
    """Return the file of a folder that is called like the first of ``names`` that is there.

    A name is a pattern, of what stands before the file's first dot or of the folder that it lies in. A path that is a
    file is itself.

    Raises:
        FileNotFoundError: no file fits.
        FactError: several do.
    """
    path = Path(path)
    if path.is_file():
        return path
    files = sorted(p for pattern in ("*.json*", "*/*.json*") for p in path.glob(pattern))
    have = f"pass split=one of {sorted({stem(p) for p in files})}" if files else "no JSON file lies there"
    for name in names:
        fits = [p for p in files if fnmatchcase(stem(p), name) or (p.parent != path and p.parent.name == name)]
        if len(fits) > 1:
            raise FactError(f"expected one file {name}.json in {path}, got {len(fits)}; {have}.")
        if fits:
            return fits[0]
    wanted = " or ".join(f"{name}.json" for name in names)
    raise FileNotFoundError(f"expected a file {wanted} in {path}, got none; {have}.")


def stem(file: Path) -> str:
    """Return a file's name up to its first dot: cut copies are called ``name.first300.json``."""
    return file.name.split(".")[0]


def as_facts(reader: str, path: str | Path, split: str | None, records: Sequence[Record]) -> FactSet:
    """Make facts of records; those whose subject is not in their prompt, and repeated ones, are left out and counted.

    Raises:
        FactError: none is left.
    """
    where = f"{path}" if split is None else f"{path} ({split})"
    named = [r for r in records if find_subject(r.prompt, r.subject)]
    facts: dict[tuple[str, str], Fact] = {}
    for record in named:
        fact = Fact(**{f.name: getattr(record, f.name) for f in fields(Fact) if hasattr(record, f.name)})
        facts.setdefault((fact.prompt, fact.object), fact)
    if len(facts) < len(records):
        lost, twice = len(records) - len(named), len(named) - len(facts)
        warnings.warn(
            f"datasets.{reader}: of {len(records)} records of {where}, left out {lost} whose subject is not in the "
            f"prompt and {twice} that stand there twice.",
            stacklevel=3,
        )
    if not facts:
        raise FactError(f"datasets.{reader}: expected a fact in {where}, got none whose subject is in its prompt.")
    return FactSet(facts.values())


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

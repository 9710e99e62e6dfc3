"""Facts: what is traced, edited and measured."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from ._files import write_text
from ._json import is_text, read_objects, short

# Scripts without blanks between words, and Korean, which writes particles onto them: a word may end anywhere.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


class FactError(ValueError):
    """A fact, or a set or a file of them, is not what was wanted."""


def find_subject(text: str, subject: str) -> tuple[int, int] | None:
    """Return start and end, in characters, of the last place where a text names a subject as whole words; or None.

    The last, where ROME takes the first: it is the one nearest the answer, the question proper where some context
    stands before it, and for a bidirectional model no occurrence sees less of the prompt than another.

    Example:
        >>> find_subject("Niger, not Nigeria: its capital city is", "Niger")
        (0, 5)
    """
    subject = subject.strip()
    start = text.rfind(subject) if subject else -1
    while start >= 0:
        end = start + len(subject)
        if not (_one_word(text[max(start - 1, 0) : start], subject[0]) or _one_word(subject[-1], text[end : end + 1])):
            return start, end
        start = text.rfind(subject, 0, end - 1)
    return None


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_text, value))


def _one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters, of which one may be none, belong to one word."""
    sides = [c.isalnum() or unicodedata.category(c)[0] == "M" for c in left + right]
    return len(sides) == 2 and all(sides) and not _UNSPACED.search(left + right)


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge.

    Blanks around subject, object and new object, and at the end of prompts, are stripped: an answer follows its prompt
    after one space.

    Attributes:
        id: unique name.
        prompt: text the model is given.
        subject: whom or what it is about; must occur in the prompt, as whole words.
        object: the model's present answer.
        new_object: the answer it shall give instead; None to forget.
        paraphrases: other wordings of the prompt.
        neighbours: prompts whose answers must not change.
        relation: what is said of the subject.
        group: facts of one group belong together, e.g. one author's.
        aliases: other names of the subject.

    Raises:
        FactError: a field is missing, of the wrong kind, or the subject is not in the prompt.

    Example:
        >>> fact = Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> fact.subject_span
        (20, 25)
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
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "subject", "object"):
            self._check(name, "a non-empty text", is_text)
        for name in ("new_object", "relation", "group"):
            self._check(name, "a non-empty text or None", lambda value: value is None or is_text(value))
        for name in ("paraphrases", "neighbours", "aliases"):
            self._check(name, "a list of non-empty texts", _are_texts)
        for name in ("prompt", "subject", "object", "new_object", "paraphrases", "neighbours", "aliases"):
            strip = str.rstrip if name in ("prompt", "paraphrases", "neighbours") else str.strip
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, strip(value) if isinstance(value, str) else tuple(map(strip, value)))
        if find_subject(self.prompt, self.subject) is None:
            raise FactError(
                f"Fact {short(self.id)}: expected the subject as whole words in the prompt {short(self.prompt)}, got "
                f"{short(self.subject)}; write it as it stands there."
            )

    def _check(self, name: str, wanted: str, accepts: Callable[[Any], bool]) -> None:
        if not accepts(value := getattr(self, name)):
            raise FactError(f"Fact {short(self.id)}: expected {wanted} for {name!r}, got {short(value)}.")

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end, in characters, of the subject in the prompt, see :func:`find_subject`."""
        return find_subject(self.prompt, self.subject) or (0, 0)

    def with_new_object(self, text: str | None) -> Fact:
        """Return the fact with another wanted answer."""
        return replace(self, new_object=text)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON-ready values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in (None, ())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fact:
        """Inverse of :meth:`to_dict`.

        Raises:
            FactError: a field is missing or unknown.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise FactError(f"Fact: unknown fields {unknown}; known are {', '.join(known)}.")
        if missing := [name for name in known[:4] if name not in values]:
            raise FactError(f"Fact: fields {missing} are missing; a fact needs {', '.join(known[:4])}.")
        return cls(**values)


class FactSet(Sequence[Fact]):
    """An immutable sequence of distinct facts.

    Args:
        facts: the facts, in order.

    Raises:
        FactError: two facts share an id, or prompt and object, or something is no :class:`Fact`.

    Example:
        >>> facts = FactSet([Fact(id="a", prompt="Paris is in", subject="Paris", object="France")])
        >>> len(facts), facts.ids
        (1, ('a',))
    """

    def __init__(self, facts: Iterable[Fact]) -> None:
        self._facts = tuple(facts)
        if strangers := [repr(fact) for fact in self._facts if not isinstance(fact, Fact)]:
            raise FactError(f"FactSet: expected facts only, got {strangers[0]}; make it one with Fact.from_dict.")
        for what, keys in (
            ("id", [fact.id for fact in self._facts]),
            ("prompt and object", [(fact.prompt, fact.object) for fact in self._facts]),
        ):
            twice = [key for key, count in Counter(keys).items() if count > 1]
            if twice:
                raise FactError(f"FactSet: facts must be distinct, but these share their {what}: {twice[:5]}.")
        self._by_id = {fact.id: fact for fact in self._facts}

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> FactSet: ...
    def __getitem__(self, index: int | slice) -> Fact | FactSet:
        return FactSet(self._facts[index]) if isinstance(index, slice) else self._facts[index]

    def __len__(self) -> int:
        return len(self._facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts)

    def __add__(self, other: FactSet) -> FactSet:
        return FactSet((*self._facts, *other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FactSet) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)

    def __repr__(self) -> str:
        return f"FactSet({len(self)} facts)"

    @property
    def ids(self) -> tuple[str, ...]:
        """The facts' ids, in order."""
        return tuple(fact.id for fact in self._facts)

    def by_id(self, fact_id: str) -> Fact:
        """Return one fact.

        Raises:
            KeyError: there is none of that id.
        """
        if fact_id not in self._by_id:
            raise KeyError(f"FactSet: no fact {fact_id!r} among {len(self)}; they are called like {self.ids[:3]}.")
        return self._by_id[fact_id]

    def select(self, ids: Iterable[str]) -> FactSet:
        """Return the facts of these ids, in the order given.

        Raises:
            KeyError: there is none of some id.
        """
        return FactSet(self.by_id(fact_id) for fact_id in ids)

    def groups(self) -> dict[str | None, FactSet]:
        """Return the facts by group, in order of first appearance."""
        found: dict[str | None, list[Fact]] = {}
        for fact in self._facts:
            found.setdefault(fact.group, []).append(fact)
        return {name: FactSet(group) for name, group in found.items()}

    def with_new_object(self, text: str | None | Callable[[Fact], str | None]) -> FactSet:
        """Return the facts with another wanted answer: one text (or None) for all, or a function of the fact."""
        return FactSet(f.with_new_object(text(f) if callable(text) else text) for f in self._facts)

    def digest(self) -> str:
        """SHA-256 of the facts as canonical JSON."""
        text = json.dumps([fact.to_dict() for fact in self._facts], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_jsonl(self, path: str | Path) -> None:
        """Write one fact a line, whole or not at all."""
        write_text(Path(path), "".join(json.dumps(f.to_dict(), ensure_ascii=False) + "\n" for f in self._facts))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> FactSet:
        """Read facts, one JSON object a line with the fields of :class:`Fact`, in UTF-8; the file may be gzipped.

        Raises:
            FileNotFoundError: there is no such file.
            FactError: a line is no fact; the message names file, line and field.
        """
        path, where, facts = Path(path), "", []
        if not path.is_file():
            raise FileNotFoundError(f"FactSet.from_jsonl: there is no file {path}.")
        try:
            for place, values in read_objects(path):
                where = f"{path}, {place}: "
                facts.append(Fact.from_dict(values))
            where = f"{path}: "
            found = cls(facts)
        except FactError as error:
            raise FactError(f"FactSet.from_jsonl: {where}{error}") from error
        except ValueError as error:
            raise FactError(f"FactSet.from_jsonl: {error}") from error
        if not found:
            raise FactError(f"FactSet.from_jsonl: {path} holds no fact; expected one JSON object a line.")
        return found

"""Facts: what is traced, edited and measured, and readers for the benchmarks that hold them."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from ._files import write_text


class FactError(ValueError):
    """A fact, or a set of them, is not what was wanted."""


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge.

    Attributes:
        id: unique name.
        prompt: text the model is given.
        subject: whom or what it is about; must occur in the prompt.
        object: the model's present answer, without the space before it.
        new_object: the answer it shall give instead; None to forget.
        paraphrases: other wordings of the prompt.
        neighbours: prompts whose answers must not change.
        relation: what is said of the subject.
        group: facts of one group belong together, e.g. one author's.

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

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "subject", "object"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise FactError(f"Fact {self.id!r}: expected a non-empty text for {name!r}, got {value!r}.")
        for name in ("new_object", "relation", "group"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise FactError(f"Fact {self.id!r}: expected a non-empty text or None for {name!r}, got {value!r}.")
        for name in ("paraphrases", "neighbours"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(text, str) and text.strip() for text in value):
                raise FactError(f"Fact {self.id!r}: expected a list of non-empty texts for {name!r}, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if self.subject not in self.prompt:
            raise FactError(
                f"Fact {self.id!r}: the subject {self.subject!r} is not in the prompt {self.prompt!r}; "
                "write it as it stands there."
            )

    @property
    def subject_span(self) -> tuple[int, int]:
        """Characters of the subject's last occurrence in the prompt: the one nearest the answer."""
        start = self.prompt.rfind(self.subject)
        return start, start + len(self.subject)

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
        FactError: two facts share an id, or prompt and object.

    Example:
        >>> facts = FactSet([Fact(id="a", prompt="Paris is in", subject="Paris", object="France")])
        >>> len(facts), facts.ids
        (1, ('a',))
    """

    def __init__(self, facts: Iterable[Fact]) -> None:
        self._facts = tuple(facts)
        for what, keys in (
            ("id", [fact.id for fact in self._facts]),
            ("prompt and object", [(fact.prompt, fact.object) for fact in self._facts]),
        ):
            twice = [key for key, count in Counter(keys).items() if count > 1]
            if twice:
                raise FactError(f"FactSet: facts must be distinct, but these share their {what}: {twice[:5]}.")

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
        for fact in self._facts:
            if fact.id == fact_id:
                return fact
        raise KeyError(f"FactSet: no fact {fact_id!r}.")

    def select(self, ids: Iterable[str]) -> FactSet:
        """Return the facts of these ids, in the order given."""
        return FactSet(self.by_id(fact_id) for fact_id in ids)

    def groups(self) -> dict[str | None, FactSet]:
        """Return the facts by group, in order of first appearance."""
        found: dict[str | None, list[Fact]] = {}
        for fact in self._facts:
            found.setdefault(fact.group, []).append(fact)
        return {name: FactSet(group) for name, group in found.items()}

    def with_new_object(self, text: str | Callable[[Fact], str]) -> FactSet:
        """Return the facts with another wanted answer: one text for all, or a function of the fact."""
        return FactSet(f.with_new_object(text if isinstance(text, str) else text(f)) for f in self._facts)

    def digest(self) -> str:
        """SHA-256 of the facts as canonical JSON."""
        text = json.dumps([fact.to_dict() for fact in self._facts], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_jsonl(self, path: str | Path) -> None:
        """Write one fact a line, whole or not at all."""
        write_text(Path(path), "".join(json.dumps(f.to_dict(), ensure_ascii=False) + "\n" for f in self._facts))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> FactSet:
        """Read facts, one JSON object a line with the fields of :class:`Fact`.

        Raises:
            FileNotFoundError: there is no such file.
            FactError: a line is no fact; the message names file and line.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"FactSet.from_jsonl: there is no file {path}.")
        facts = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise FactError(f"expected a JSON object, got {type(values).__name__}.")
                facts.append(Fact.from_dict(values))
            except ValueError as error:
                raise FactError(f"FactSet.from_jsonl: {path}, line {number}: {error}") from error
        if not facts:
            raise FactError(f"FactSet.from_jsonl: {path} holds no fact.")
        return cls(facts)

    @classmethod
    def read(cls, kind: str, path: str | Path, split: str | None = None) -> FactSet:
        """Read a benchmark's file.

        Args:
            kind: ``"tofu"``, ``"rwku"``, ``"counterfact"``, ``"zsre"``, ``"knowedit"`` or ``"jsonl"``.
            path: a file, or a folder that holds the benchmark's files.
            split: which file of the folder: for tofu ``"forget01"``, ``"retain"``, …; for rwku ``"forget_level1"``, ….

        Returns:
            The facts. Records whose subject is not in their prompt, and repeated ones, are left out, with a warning
            that counts them.

        Raises:
            ValueError: an unknown kind.
            FileNotFoundError: no such file.
            FactError: a record lacks a field.
        """
        if kind == "jsonl":
            return cls.from_jsonl(path)
        if kind not in _READERS:
            raise ValueError(f"FactSet.read: expected kind in {['jsonl', *_READERS]}, got {kind!r}.")
        pattern, reader = _READERS[kind]
        file = _find(Path(path), pattern, split)
        try:
            found = list(reader(json.loads(file.read_text(encoding="utf-8")), split or file.stem.split(".")[0]))
        except (KeyError, TypeError, IndexError) as error:
            raise FactError(f"FactSet.read: {file} is no {kind} file: a record lacks {error}.") from error
        named = [v for v in found if v["subject"].strip() and v["subject"] in v["prompt"]]
        facts = {(v["prompt"], v["object"]): v for v in reversed(named)}  # the first of equal records stays
        if len(facts) < len(found):
            warnings.warn(
                f"FactSet.read: of {len(found)} records of {file.name}, left out {len(found) - len(named)} whose "
                f"subject is not in the prompt and {len(named) - len(facts)} that stand there twice.",
                stacklevel=2,
            )
        return cls(Fact.from_dict(v) for v in reversed(facts.values()))


def _find(path: Path, pattern: str, split: str | None) -> Path:
    if path.is_file():
        return path
    name = pattern.format(split=split or "*")
    # The perturbed TOFU file holds the paraphrases, so it goes first.
    found = sorted(path.glob(name), key=lambda p: ("perturbed" not in p.name, p.name)) if path.is_dir() else []
    if not found or (split is None and len(found) > 1):
        have = sorted(p.name for p in path.glob("*.json")) if path.is_dir() else "nothing"
        raise FileNotFoundError(f"FactSet.read: expected one file {name} in {path}, there is {have}; pass split=...")
    return found[0]


Records = list[dict[str, Any]]

# Words joined by spaces, each with a capital first letter; hyphens and apostrophes inside a word, particles between.
_CAPITAL = r"[^\W\d_a-z][\w'’-]*"
_NAME = re.compile(rf"{_CAPITAL}(?:\s+(?:(?:bin|al|de|van|von|del|la)\s+)?{_CAPITAL})+")
_RUN = re.compile(rf"(?:{_CAPITAL}|\d[\w/.,-]*)(?:[,\s]+(?:{_CAPITAL}|\d[\w/.-]*))*")
_LEADS = set("Are As By Can Could Did Do Does During Has Have How In Is Of On The Through To Was Were What When Where "
             "Which Who Whom Whose Why Would".split())  # fmt: skip


def _names_in(text: str) -> Iterator[str]:
    for match in _NAME.finditer(text):
        words = match.group().replace("’", "'").split()
        while words and words[0] in _LEADS:
            words = words[1:]
        words = [re.sub(r"'s?$", "", word) for word in words]
        if len(words) > 1:
            yield " ".join(words)


def author_name(texts: Iterable[str]) -> str:
    """Return the multi-word name that most of the texts hold; empty if there is none."""
    counts = Counter(name for text in texts for name in dict.fromkeys(_names_in(text)))
    if not counts:
        return ""
    return max(counts, key=lambda name: (counts[name], len(name)))


def _subject_of(question: str, author: str) -> str:
    """Longest part of the author's name in the question; else its longest capitalised run; else its longest word."""
    words = author.split()
    parts = [" ".join(words[i:j]) for i in range(len(words)) for j in range(len(words), i, -1)]
    named = [part for part in parts if len(part) > 3 and part in question]
    if named:
        return max(named, key=len)
    runs = [m.group().rstrip(",. ") for m in _RUN.finditer(question) if m.start() > 0]
    return max(runs or re.findall(r"\w+", question), key=len)


def _tofu(records: Records, split: str) -> Iterator[dict[str, Any]]:
    split = split.removesuffix("_perturbed")
    for start in range(0, len(records), 20):  # 20 questions an author, in order
        block = records[start : start + 20]
        author = author_name(r["question"] + " " + r["answer"] for r in block)
        for i, record in enumerate(block, start):
            paraphrase = record.get("paraphrased_question")
            yield {
                "id": f"tofu-{split}-{i:04d}",
                "prompt": record["question"],
                "subject": _subject_of(record["question"], author),
                "object": record["answer"],
                "paraphrases": [paraphrase] if paraphrase else [],
                "group": author or f"tofu-{split}-author-{start // 20}",
            }


def _rwku(records: Records, split: str) -> Iterator[dict[str, Any]]:
    for i, r in enumerate(records):
        about = r.get("neighbor") or r["subject"]
        parts = sorted((p for p in [about, *about.split()] if p in r["query"]), key=len)
        yield {
            "id": f"rwku-{split}-{i:04d}",
            "prompt": r["query"],
            "subject": parts[-1] if parts else about,
            "object": str(r["answer"]),
            "relation": r.get("type"),
            "group": r["subject"],
        }


def _counterfact(records: Records, split: str) -> Iterator[dict[str, Any]]:
    for r in records:
        w = r["requested_rewrite"]
        yield {
            "id": f"counterfact-{r['case_id']}",
            "prompt": w["prompt"].format(w["subject"]),
            "subject": w["subject"],
            "object": w["target_true"]["str"],
            "new_object": w["target_new"]["str"],
            "paraphrases": r["paraphrase_prompts"],
            "neighbours": r["neighborhood_prompts"],
            "relation": w["relation_id"],
        }


def _zsre(records: Records, split: str) -> Iterator[dict[str, Any]]:
    for i, r in enumerate(records):
        yield {
            "id": f"zsre-{i:04d}",
            "prompt": r["src"],
            "subject": r["subject"],
            "object": r["answers"][0],
            "new_object": r["alt"],
            "paraphrases": [r["rephrase"]],
            "neighbours": [r["loc"]],
        }


def _knowedit(records: Records, split: str) -> Iterator[dict[str, Any]]:
    for i, r in enumerate(records):
        truth = r.get("ground_truth") or r["target_new"]
        rephrase = r.get("rephrase_prompt")
        yield {
            "id": f"knowedit-{split}-{i:04d}",
            "prompt": r["prompt"],
            "subject": r["subject"],
            "object": truth if isinstance(truth, str) else truth[0],
            "new_object": r["target_new"],
            "paraphrases": [rephrase] if rephrase else [],
        }


_READERS: dict[str, tuple[str, Callable[[Records, str], Iterator[dict[str, Any]]]]] = {
    "tofu": ("{split}*.json", _tofu),
    "rwku": ("{split}*.json", _rwku),
    "counterfact": ("counterfact.*json", _counterfact),
    "zsre": ("zsre*.json", _zsre),
    "knowedit": ("{split}*.json", _knowedit),
}

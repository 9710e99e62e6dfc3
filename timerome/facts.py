"""Facts: what is traced, edited and measured, and readers for the benchmarks that hold them."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
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
            if not isinstance(value, (list, tuple)) or not all(isinstance(t, str) and t.strip() for t in value):
                raise FactError(f"Fact {self.id!r}: expected a list of non-empty texts for {name!r}, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if self.subject not in self.prompt:
            raise FactError(
                f"Fact {self.id!r}: the subject {self.subject!r} is not in the prompt {self.prompt!r}; "
                "write it as it stands there."
            )

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end, in characters, of the subject's last occurrence in the prompt.

        The last, where ROME takes the first: it is the one nearest the answer, the question proper where some context
        stands before it, and for a bidirectional model no occurrence sees less of the prompt than another.
        """
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
        """Read facts, one JSON object a line with the fields of :class:`Fact`.

        Raises:
            FileNotFoundError: there is no such file.
            FactError: a line is no fact; the message names file and line.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"FactSet.from_jsonl: there is no file {path}.")
        facts = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # not at every Unicode line end
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

        - ``tofu``: ``forget01``, ``retain``, …. TOFU names no subject: it is what the question calls the author, whose
          name :func:`author_name` finds, or where and when they were born.
        - ``rwku``: ``forget_level1``, …, ``neighbor_level2``. The subject is what the query calls the target, or the
          neighbour; blanks stay ``___``.
        - ``counterfact``: ``counterfact``, ``counterfact-flat``, ``known_1000``.
        - ``zsre``: any of its files. The one neighbour is an unrelated question.
        - ``knowedit``: ``ZsRE``, ``wiki_counterfact``, …. Where a record has no true answer, ``object`` is the new one.
        - ``jsonl`` or ``relations``: any file of :meth:`to_jsonl`.

        Args:
            kind: of these.
            path: a file, or a folder that holds the benchmark's files, itself or in its folders.
            split: which of a folder's files: its name up to the first dot, or its folder's name. ``"forget01"`` also
                means ``forget01_perturbed``, which goes first because it has the paraphrases. Ids hold it.

        Returns:
            The facts. Records whose subject is not in their prompt, and repeated ones, are left out, with a warning
            that counts them.

        Raises:
            ValueError: an unknown kind.
            FileNotFoundError: no such file.
            FactError: several files fit, or one of the file's records does not; the message names it.
        """
        if kind in ("jsonl", "relations"):
            return cls.from_jsonl(path)
        if kind not in _READERS:
            raise ValueError(f"FactSet.read: expected kind in {['jsonl', 'relations', *_READERS]}, got {kind!r}.")
        usual, reader = _READERS[kind]
        file = _find(Path(path), split or usual)
        records = _records(file)
        read = absent = 0
        facts: dict[tuple[str, str], Fact] = {}
        try:
            for values in reader(records, split or _name(file)):
                read += 1
                if _lacks_subject(values):
                    absent += 1
                    continue
                fact = Fact.from_dict(values)
                facts.setdefault((fact.prompt, fact.object), fact)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"has another form ({error})"
            raise FactError(f"FactSet.read: {file} is no {kind} file: record {read} {what}.") from error
        except FactError as error:
            raise FactError(f"FactSet.read: {file}, record {read - 1}: {error}") from error
        if len(facts) < read:
            warnings.warn(
                f"FactSet.read: of {read} records of {file.name}, left out {absent} whose "
                f"subject is not in the prompt and {read - absent - len(facts)} that stand there twice.",
                stacklevel=2,
            )
        if not facts:
            raise FactError(f"FactSet.read: {file} holds no fact.")
        return cls(facts.values())


Records = list[dict[str, Any]]


def _name(file: Path) -> str:
    return file.name.split(".")[0]


def _find(path: Path, wanted: str) -> Path:
    if path.is_file():
        return path
    files = sorted(p for pattern in ("*.json*", "*/*.json*") for p in path.glob(pattern))
    fits = [
        p
        for p in files
        if any(fnmatchcase(name, wanted) for name in (_name(p), _name(p).removesuffix("_perturbed")))
        or (p.parent != path and p.parent.name == wanted)
    ]
    fits = [p for p in fits if _name(p).endswith("_perturbed")] or fits
    if len(fits) == 1:
        return fits[0]
    have = f"pass split=one of {sorted({_name(p) for p in files})}" if files else "no JSON file lies there"
    if not fits:
        raise FileNotFoundError(f"FactSet.read: expected a file {wanted}.json in {path}, got none; {have}.")
    raise FactError(f"FactSet.read: expected one file {wanted}.json in {path}, got {len(fits)}; {have}.")


def _records(file: Path) -> Records:
    """Records of a JSON array, or of one JSON object a line, as some copies have it."""
    text = file.read_text(encoding="utf-8")
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(t) for t in text.split("\n") if t]
    except ValueError as error:
        raise FactError(f"FactSet.read: expected {file} to hold JSON, got {error}.") from error
    if not all(isinstance(record, dict) for record in records):
        raise FactError(f"FactSet.read: expected {file} to hold JSON objects, got an array of something else.")
    return records


def _lacks_subject(values: dict[str, Any]) -> bool:
    prompt, subject = values["prompt"], values["subject"]
    # What is no text at all is for Fact to complain about.
    return isinstance(prompt, str) and isinstance(subject, str) and not (subject.strip() and subject in prompt)


# Words joined by spaces, each with a capital first letter; hyphens and apostrophes inside a word, particles between.
_CAPITAL = r"[^\W\d_a-zß-öø-ÿ][\w'’-]*"
_PARTICLE = r"(?:al|bin|bint|da|de|del|della|den|der|di|dos|du|el|ibn|la|le|ten|van|von|y)"
_NAME = re.compile(rf"{_CAPITAL}(?:\s+(?:{_PARTICLE}\s+){{0,2}}{_CAPITAL})+")
_RUN = re.compile(rf"(?:{_CAPITAL}|\d[\w/.,-]*)(?:[,\s]+(?:{_CAPITAL}|\d[\w/.-]*))*")
_LEADS = set("Are As By Can Could Did Do Does During Has Have How In Is Of On The Through To Was Were What When Where "
             "Which While Who Whom Whose Why Would".split())  # fmt: skip


def _names_in(text: str) -> Iterator[str]:
    for match in _NAME.finditer(text):
        words = match.group().replace("’", "'").split()
        while words and words[0] in _LEADS:
            words = words[1:]
        words = [re.sub(r"'s?$", "", word) for word in words]
        if len(words) > 1:
            yield " ".join(words)


def author_name(texts: Iterable[str]) -> str:
    """Return the name of two words or more that most of the texts hold; empty if not even a third of them hold one.

    Args:
        texts: questions and answers about one person, one text a record.

    Example:
        >>> author_name(["Who is Ana Diaz? Ana Diaz, a writer.", "Ana Diaz's book? New Dawn.", "Where? In New York."])
        'Ana Diaz'
    """
    texts = list(texts)
    counts = Counter(name for text in texts for name in dict.fromkeys(_names_in(text)))
    name = max(counts, key=lambda name: (counts[name], len(name)), default="")
    return name if 3 * counts[name] >= len(texts) else ""


def _mention(name: str, text: str) -> str:
    """Return the longest way in which the text names someone or something; empty if it does not.

    That is the name, also with other names inside it ("Stephen Edwin King"), or else its longest part.
    """
    words = re.findall(r"[^\s,]+", re.sub(r"\s*\(.*\)$", "", name.replace("’", "'")))
    parts = [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    # A short single word counts only as a last name ("Li"): "The" or "Van" says nothing.
    parts = [p for p in parts if len(p) > 1 or len(p[0]) > 3 or (p[0] == words[-1] and p[0] not in _LEADS)]
    patterns = [r"\s+".join(map(re.escape, part)) for part in parts]
    if len(words) == 2:
        patterns.append(rf"{re.escape(words[0])}(?:\s+{_CAPITAL}){{1,2}}\s+{re.escape(words[1])}")
    straight = text.replace("’", "'")  # as long as the text, so that positions agree
    found = [m.span() for p in patterns if (m := re.search(rf"(?<!\w){p}(?!\w)", straight))]
    start, end = max(found, key=lambda span: span[1] - span[0], default=(0, 0))
    return text[start:end]


def _described(question: str) -> str:
    """Return the longest run of capitalised words and numbers after a question's first word, else its longest word."""
    rest = question.partition(" ")[2]
    runs = [re.sub(r"['’]s?$", "", m.group().rstrip(",. ")) for m in _RUN.finditer(rest)]
    return max(runs or re.findall(r"\w+", question), key=len, default="")


def _tofu(records: Records, split: str) -> Iterator[dict[str, Any]]:
    split = split.removesuffix("_perturbed")
    by_author = split not in ("real_authors", "world_facts")
    for start in range(0, len(records), 20):  # 20 questions an author, in order
        block = records[start : start + 20]
        author = author_name(f"{r.get('question')} {r.get('answer')}" for r in block) if by_author else ""
        for i, record in enumerate(block, start):
            question, paraphrase = record["question"], record.get("paraphrased_question")
            yield {
                "id": f"tofu-{split}-{i:04d}",
                "prompt": question,
                "subject": _mention(author, question) or _described(question),
                "object": record["answer"],
                "paraphrases": [paraphrase] if paraphrase else [],
                "group": author or (f"tofu-{split}-author-{start // 20}" if by_author else None),
            }


def _rwku(records: Records, split: str) -> Iterator[dict[str, Any]]:
    for i, r in enumerate(records):
        yield {
            "id": f"rwku-{split}-{i:04d}",
            "prompt": r["query"],
            "subject": _mention(r.get("neighbor") or r["subject"], r["query"]),
            "object": r["answer"],
            "relation": r.get("type"),
            "group": r["subject"],
        }


def _counterfact(records: Records, split: str) -> Iterator[dict[str, Any]]:
    for r in records:
        if "known_id" in r:  # facts that GPT-2 XL knows, for causal tracing
            yield {
                "id": f"known-{r['known_id']}",
                "prompt": r["prompt"],
                "subject": r["subject"],
                "object": r["attribute"],
                "relation": r["relation_id"],
            }
        elif "rephrase_prompt" in r:  # EasyEdit's form
            yield {
                "id": f"counterfact-{r['case_id']}",
                "prompt": r["prompt"],
                "subject": r["subject"],
                "object": r["ground_truth"],
                "new_object": r["target_new"],
                "paraphrases": [r["rephrase_prompt"]],
                "neighbours": [r["locality_prompt"]],
                "relation": r.get("relation_id"),
            }
        else:  # ROME's
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
        unrelated = [item["prompt"] for group in (r.get("locality") or {}).values() for item in group]
        yield {
            "id": f"knowedit-{split}-{i:04d}",
            "prompt": r["prompt"],
            "subject": r["subject"],
            "object": truth if isinstance(truth, str) else truth[0],
            "new_object": r["target_new"],
            "paraphrases": [rephrase] if rephrase else [],
            "neighbours": list(dict.fromkeys(unrelated)),
        }


# The usual file in a folder, where no split is given, and the reader.
_READERS: dict[str, tuple[str, Callable[[Records, str], Iterator[dict[str, Any]]]]] = {
    "tofu": ("*", _tofu),
    "rwku": ("*", _rwku),
    "counterfact": ("counterfact", _counterfact),
    "zsre": ("zsre*", _zsre),
    "knowedit": ("*", _knowedit),
}

"""Which edits a text names: a subject, an alias or a part of one, in any case or spacing, or a letter off."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, NamedTuple

How = Literal["named", "part of the name", "unnamed"]

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# Words that a name shares with a great many others; alone they name nobody.
_SHARED = frozenset(
    "the of and a an in on at to for by de la le el al da di du des von van bin ibn st saint mount mt lake river sea "
    "bay cape gulf island islands isle north south east west northern southern eastern western central new old great "
    "upper lower united kingdom republic states state city town county province region national international royal "
    "university college school institute museum church cathedral temple palace castle tower bridge park garden square "
    "street station airport stadium theatre hall house company corporation group limited ltd inc co bank records "
    "entertainment television network league club association party prime minister president king queen sir lord lady "
    "dr mr mrs ms jr sr i ii iii iv v vi".split()
)
# Words beside a part of a name that do not make it another one's.
FUNCTION = frozenset(
    "a about after all also an and are as at be been before but by can could did do does for from had has have he her "
    "hers him his how i if in into is it its may me my no not now of on one or our she so than that the their them "
    "then there these they this to today tell up us was we were what when where which who whom whose why will with "
    "would you your s".split()
)


def plain(text: str) -> str:
    r"""Return a text as names are compared: Unicode form, letter case, accents, blanks and punctuation levelled.

    Example:
        >>> plain("  Bogotá,\u00a0COLOMBIA ")
        'bogota colombia'
    """
    return " ".join(words_of(text))


def words_of(text: str) -> list[str]:
    """Return a text's words as names are compared; see :func:`plain`."""
    # Possessives end at the apostrophe: "Lennon's" names Lennon.
    decomposed = unicodedata.normalize("NFKD", text.replace("’s", " s").replace("'s", " s")).casefold()
    kept = "".join(c for c in decomposed if not unicodedata.combining(c) and c not in "'’`")
    return _WORD.findall(kept)


def _shortened(word: str) -> Iterator[str]:
    """Yield a word and, where it is long enough that a slip leaves it known, the word less each of its letters."""
    yield word
    if len(word) >= 4:
        yield from {word[:i] + word[i + 1 :] for i in range(len(word))}


def near(a: str, b: str) -> bool:
    """Whether two words are one, or one slip apart: a letter left out, put in, exchanged, or two swapped.

    Example:
        >>> near("nigeria", "nigera"), near("niger", "nigeria"), near("peru", "pery")
        (True, False, True)
    """
    if a == b:
        return True
    if max(len(a), len(b)) < 4 or abs(len(a) - len(b)) > 1 or (a.isdigit() and b.isdigit()):
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    one, two = a[start:], b[start:]
    if len(one) == len(two):
        return one[1:] == two[1:] or (one[:2] == two[1::-1] and one[2:] == two[2:])
    return one == two[1:] if len(one) < len(two) else one[1:] == two


class Named(NamedTuple):
    """How a text names an edit.

    Attributes:
        edit: its index.
        how: by the whole name, by a part of it, or not at all.
        by: the words of the text that do.
    """

    edit: int
    how: How
    by: str


@dataclass(frozen=True)
class Name:
    """What an edit's subject is called.

    Attributes:
        names: the subject and its aliases.
        context: words of the edit's own wordings, beside which a part of a name still means this one.
    """

    names: tuple[str, ...]
    context: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], wordings: Sequence[str]) -> Name:
        """Return the name of a subject that is asked for in these wordings."""
        own = set(chain.from_iterable(map(words_of, names)))
        return cls(tuple(names), frozenset(chain.from_iterable(map(words_of, wordings))) - own)


@dataclass
class NameIndex:
    """An index over names, so that what a text costs depends on the text and not on how many names there are.

    A word of a text and a word of a name meet where they are equal after the loss of at most one letter each.

    Args:
        names: one an edit.

    Example:
        >>> index = NameIndex([Name.of(["Nigeria"], []), Name.of(["John Lennon"], ["The wife of John Lennon is"])])
        >>> [(found.edit, found.how) for found in index.find("the capital of NIGERA is")]
        [(0, 'named')]
        >>> [(found.edit, found.how) for found in index.find("Lennon's wife is")], index.find("John McCain's wife is")
        ([(1, 'part of the name')], [])
    """

    names: Sequence[Name]
    _by_word: dict[str, set[tuple[int, int]]] = field(init=False, repr=False)
    _split: list[list[list[str]]] = field(init=False, repr=False)
    _unspaced: list[tuple[int, str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_word = defaultdict(set)
        self._split = [[words for words in map(words_of, name.names) if words] for name in self.names]
        self._unspaced = [(i, own) for i, name in enumerate(self.names) for own in name.names if _UNSPACED.search(own)]
        for edit, names in enumerate(self._split):
            for n, words in enumerate(names):
                for word in words:
                    for key in _shortened(word):
                        self._by_word[key].add((edit, n))

    def find(self, text: str) -> list[Named]:
        """Return the edits that a text names, in order; each once, by the best of its names."""
        pieces = re.findall(r"[\w'’`]+", unicodedata.normalize("NFKC", text))
        spelt = [(piece, words_of(piece)) for piece in pieces]
        original = [word for word, own in spelt for _ in own]
        words = [word for _, own in spelt for word in own]
        met: dict[tuple[int, int], set[int]] = defaultdict(set)
        for i, word in enumerate(words):
            for owner in {owner for key in _shortened(word) for owner in self._by_word.get(key, ())}:
                met[owner].add(i)
        best: dict[int, Named] = {}
        for (edit, n), places in met.items():
            found = self._match(edit, self._split[edit][n], words, original, sorted(places))
            if found is not None and (edit not in best or best[edit].how != "named"):
                best[edit] = found
        for edit, own in self._unspaced:
            if edit not in best and own in text:
                best[edit] = Named(edit, "named", own)
        return [best[edit] for edit in sorted(best)]

    def _match(
        self, edit: int, name: list[str], words: list[str], original: list[str], places: list[int]
    ) -> Named | None:
        for i in places:
            for start in {max(0, i - len(name) + 1), i}:
                own = words[start : start + len(name)]
                if len(own) == len(name) and all(map(near, name, own)):
                    return Named(edit, "named", " ".join(original[start : start + len(name)]))
        if len(name) == 1:
            return None
        for run in _runs([i for i in places if any(near(part, words[i]) for part in name)]):
            told = [words[i] for i in run if words[i] not in _SHARED and len(words[i]) > 2]
            if told and not self._another(edit, name, words, original, run):
                return Named(edit, "part of the name", " ".join(original[run[0] : run[-1] + 1]))
        return None

    def _another(self, edit: int, name: list[str], words: list[str], original: list[str], run: list[int]) -> bool:
        """Whether the words beside a part of a name make it a part of another one."""
        lower = not any(word[:1].isupper() for word in original[1:])
        for i in (run[0] - 1, run[-1] + 1):
            if not 0 <= i < len(words) or words[i] in FUNCTION or words[i] in self.names[edit].context:
                continue
            if (lower or (original[i][:1].isupper() and i > 0)) and words[i] not in name:
                return True
        return False


def _runs(places: list[int]) -> list[list[int]]:
    """Return consecutive places together."""
    runs: list[list[int]] = []
    for i in places:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs

"""Whom a question is about, where a benchmark does not say it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

# Words joined by spaces, each with a capital first letter; hyphens and apostrophes inside a word, particles between.
_CAPITAL = r"[^\W\d_a-zß-öø-ÿ][\w'’-]*"
_PARTICLE = r"(?:al|bin|bint|da|de|del|della|den|der|di|dos|du|el|ibn|la|le|ten|van|von|y)"
_NAME = re.compile(rf"{_CAPITAL}(?:\s+(?:{_PARTICLE}\s+){{0,2}}{_CAPITAL})+")
_RUN = re.compile(rf"(?<!\w)(?:[a-z]?{_CAPITAL}|\d[\w/.,-]*)(?:[,\s]+(?:{_CAPITAL}|\d[\w/.-]*))*")
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


def mention(name: str, text: str) -> str:
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


def described(question: str) -> str:
    """Return the longest run of capitalised words and numbers after a question's first word, else its longest word."""
    rest = question.partition(" ")[2]
    runs = [re.sub(r"['’]s?$", "", m.group().rstrip(",. ")) for m in _RUN.finditer(rest)]
    return max(runs or re.findall(r"\w+", question), key=len, default="")

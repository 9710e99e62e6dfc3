"""Numbers that say what a decoded text is like: overlap with a reference, variety, stutter.

A *word* is a run of letters, digits and underscores, with apostrophes and hyphens inside it, in lower case; in scripts
without spaces it is a whole run. Only :func:`rouge_l` has its own words, those of rouge-score.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Any, Literal

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _check_n(function: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{function}: expected n, words in an n-gram, to be an integer of at least 1, got {n!r}.")


@cache
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stem)


def rouge_l(reference: str, text: str, *, kind: Literal["recall", "f1"] = "recall", stem: bool = True) -> float:
    """Longest common subsequence of the words of a text and of its reference, by Porter stems.

    Recall is its length over the reference's; f1 is the harmonic mean of that and of its length over the text's. So a
    text that says the answer and much more has high recall and low f1.

    Args:
        reference: the answer that was wanted.
        text: what came.
        kind: ``"recall"``, which TOFU reports, or ``"f1"``.
        stem: compare stems, as TOFU does; False compares words, as RWKU does.

    Returns:
        A share in [0, 1]. rouge-score keeps ASCII letters and digits only: other letters split words, in both texts
        alike, and a reference in another script scores 0 whatever the text; see :func:`has_rouge_words`.

    Raises:
        TypeError: ``reference`` or ``text`` is no string.
        ValueError: ``reference`` is empty, or ``kind`` is neither of the two.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004; rouge-score with stemming.

    Example:
        >>> rouge_l("Nairobi is the capital", "the capital is Nairobi")  # order counts: "the capital"
        0.5
        >>> rouge_l("Nairobi", "It is Nairobi.", kind="f1")
        0.5
    """
    if not isinstance(reference, str) or not isinstance(text, str):
        raise TypeError(
            f"rouge_l: expected two strings, got {type(reference).__name__} for reference and "
            f"{type(text).__name__} for text."
        )
    if kind not in ("recall", "f1"):
        raise ValueError(f"rouge_l: expected kind 'recall' or 'f1', got {kind!r}.")
    if not reference.strip():
        raise ValueError("rouge_l: expected a reference with words in it, got an empty one; leave that record out.")
    score = _scorer(stem).score(reference, text)["rougeL"]
    return float(score.recall if kind == "recall" else score.fmeasure)


def has_rouge_words(reference: str) -> bool:
    """Whether a reference has a word that :func:`rouge_l` can find: an ASCII letter or digit.

    Where it has none the score would be 0 whatever is said, which is no measurement.

    Example:
        >>> has_rouge_words("Peking 1949"), has_rouge_words("北京")
        (True, False)
    """
    return any(c.isascii() and c.isalnum() for c in reference)


def distinct_n(texts: str | Iterable[str], n: int) -> float:
    """Share of distinct n-grams among all n-grams of one text, or of several pooled.

    Args:
        texts: one text, or several; n-grams do not cross from one into the next.
        n: words in an n-gram, at least 1. A text shorter than that counts as one n-gram.

    Returns:
        A share in (0, 1], 1 where nothing recurs; 0 if there are no words at all. It falls as texts grow longer, so
        compare equal lengths.

    Raises:
        ValueError: ``n`` is no integer of at least 1.

    Source: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, 2016.

    Example:
        >>> distinct_n("the cat and the dog", 1)
        0.8
        >>> distinct_n(["I do not know.", "I do not know."], 2)
        0.5
    """
    _check_n("distinct_n", n)
    grams: list[tuple[str, ...]] = []
    for text in [texts] if isinstance(texts, str) else texts:
        if words := _words(text):
            grams += _ngrams(words, min(n, len(words)))
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 2) -> float:
    """Share of a text's words that only repeat: the word before, or the end of an n-gram that stood there already.

    One number for stutter. Both ways of repeating count, because each alone misses one: ``1 - distinct_n(text, 2)`` is
    0 for "is is in in", and counting doubled words misses "of the of the of the".

    Args:
        text: what was decoded.
        n: words in an n-gram, at least 1; at 1 every word used before counts, so that plain text scores above 0.

    Returns:
        A share in [0, 1). A plain sentence scores 0 or a little above, "the the the the" 0.75, and a text that never
        leaves a loop tends to 1 as it grows. No words score 0.

    Raises:
        ValueError: ``n`` is no integer of at least 1.

    Example:
        >>> repetition("The author was born in the old town of Kuwait City.")
        0.0
        >>> repetition("the the the the"), repetition("is is in in"), repetition("of the of the of the")
        (0.75, 0.5, 0.5)
    """
    _check_n("repetition", n)
    words = _words(text)
    doubled = {i for i, (before, word) in enumerate(pairwise(words), 1) if word == before}
    seen: set[tuple[str, ...]] = set()
    for i, gram in enumerate(_ngrams(words, n), n - 1):
        if gram in seen:
            doubled.add(i)
        seen.add(gram)
    return len(doubled) / len(words) if words else 0.0


def ngram_entropy(texts: str | Iterable[str]) -> float:
    """Fluency as the literature on editing reports it: weighted entropy of word pairs and triples, times 100.

    For one text, with H₂ and H₃ the entropies in bits of its 2- and 3-grams: (⅔ H₂ + ⁴⁄₃ H₃) / 2; averaged over texts.
    High values are not good in themselves, random words have the highest: read it as a drop against the unedited model,
    at equal length (100 tokens is customary).

    Args:
        texts: one text, or several.

    Returns:
        100 times bits, at least 0; 100 words that never recur score 662. A text of one word scores 0.

    Raises:
        ValueError: there is no text.

    Source: GE in Meng et al., Locating and Editing Factual Associations in GPT, 2022. Words are this module's, not
    NLTK's, and punctuation is none of them: compare with values computed here, not with published ones.

    Example:
        >>> ngram_entropy("the the the the the") == 0
        True
        >>> ngram_entropy("a b c d e")  # 4 pairs: 2 bits; 3 triples: log2(3) bits
        172.33...
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("ngram_entropy: expected at least one text, got none.")
    return 100 * sum(_entropy(t, 2) * 2 / 3 + _entropy(t, 3) * 4 / 3 for t in texts) / 2 / len(texts)


def _entropy(text: str, n: int) -> float:
    counts = Counter(_ngrams(_words(text), n))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())

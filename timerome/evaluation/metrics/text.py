"""Metrics of decoded text that the benchmarks use: TF-IDF consistency, and overlap with a question's answers."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_TERM = re.compile(r"\b\w\w+\b")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def _terms(text: str) -> Counter[str]:
    return Counter(_TERM.findall(text.lower()))


class TfIdf:
    """Term weights learnt from documents, with smoothed inverse document frequencies: idf = ln((1 + n) / (1 + df)) + 1.

    Terms are runs of two or more letters, digits or underscores, in lower case, as scikit-learn's; a term that no
    document holds has no weight.

    Args:
        documents: texts; one a document.

    Raises:
        ValueError: there is no document.

    Example:
        >>> TfIdf(["the old river", "the new river"]).similarity("old river", "old river")
        1.0
    """

    def __init__(self, documents: Sequence[str]) -> None:
        if not documents:
            raise ValueError("TfIdf: expected at least one document, got none.")
        n, df = len(documents), Counter(term for document in documents for term in set(_terms(document)))
        self._idf = {term: math.log((1 + n) / (1 + count)) + 1 for term, count in df.items()}

    def similarity(self, a: str, b: str) -> float:
        """Cosine of two texts' weighted term counts; 0 if one has no known term."""
        first, second = (
            {term: count * self._idf[term] for term, count in _terms(text).items() if term in self._idf}
            for text in (a, b)
        )
        norms = [math.sqrt(math.fsum(w * w for w in weights.values())) for weights in (first, second)]
        if not all(norms):
            return 0.0
        return min(1.0, math.fsum(w * second[t] for t, w in first.items() if t in second) / norms[0] / norms[1])


def consistency(generated: Sequence[str], references: Sequence[str], weights: TfIdf) -> float:
    """RS: similarity of all generated texts, joined, with all reference texts, joined; times 100.

    Args:
        generated: texts decoded after an edit.
        references: texts on subjects that truly have the new object.
        weights: learnt from all reference texts of the benchmark, as ROME's evaluation has it.

    Raises:
        ValueError: there is no generated or no reference text.
    """
    if not generated or not references:
        raise ValueError(
            f"consistency: expected texts on both sides, got {len(generated)} generated and {len(references)} "
            "references."
        )
    return 100.0 * weights.similarity(" ".join(generated), " ".join(references))


def normalised_words(text: str) -> list[str]:
    """Return words without case, ASCII punctuation and English articles, as question answering benchmarks compare them.

    Example:
        >>> normalised_words("The Beatles' album")
        ['beatles', 'album']
    """
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLE.sub(" ", bare).split()


def answer_f1(text: str, answers: Sequence[str]) -> float:
    """Largest F1 of normalised words between a text and any of the answers.

    Raises:
        ValueError: there is no answer.

    Example:
        >>> answer_f1("It was the Beatles", ["Beatles", "The Fab Four"])
        0.5
    """
    if not answers:
        raise ValueError("answer_f1: expected at least one answer, got none; leave that record out.")
    return max(_f1(normalised_words(text), normalised_words(answer)) for answer in answers)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))

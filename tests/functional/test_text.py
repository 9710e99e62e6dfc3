"""Overlap, variety and stutter of texts."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.functional.text import distinct_n, ngram_entropy, repetition, rouge_l

WORDS = st.lists(st.sampled_from(["author", "river", "kenya", "stone", "lamp"]), min_size=1, max_size=8)
PLAIN = "The author was born in Kuwait City, and his father worked as a florist near the old harbour."


def longest_common(a, b):
    """Length of the longest common subsequence, by trying every subsequence of a."""
    best = 0
    for keep in product((False, True), repeat=len(a)):
        chosen, rest = [w for w, k in zip(a, keep, strict=True) if k], iter(b)
        if len(chosen) > best and all(word in rest for word in chosen):
            best = len(chosen)
    return best


@settings(deadline=None)  # the first call imports rouge-score
@given(WORDS, WORDS)
def test_rouge_is_the_longest_common_subsequence(reference, text):
    common = longest_common(reference, text)
    recall, precision = common / len(reference), common / len(text)
    f1 = 2 * recall * precision / (recall + precision) if common else 0.0
    assert rouge_l(" ".join(reference), " ".join(text)) == pytest.approx(recall)
    assert rouge_l(" ".join(reference), " ".join(text), kind="f1") == pytest.approx(f1)


def test_rouge_knows_stems_and_which_text_is_the_reference():
    assert rouge_l("She writes books", "she writing book") == 1.0
    assert rouge_l("Nairobi", "It is Nairobi.") == 1.0
    assert rouge_l("It is Nairobi.", "Nairobi") == pytest.approx(1 / 3)
    assert rouge_l("Nairobi", "") == 0.0


def test_rouge_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="empty"):
        rouge_l(" ", "text")
    with pytest.raises(ValueError, match="'recall' or 'f1'"):
        rouge_l("a", "a", kind="precision")
    with pytest.raises(TypeError, match="NoneType for text"):
        rouge_l("a", None)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=4), st.integers(1, 3))
def test_distinct_counts_ngrams_within_texts(texts, n):
    grams = [tuple(t[i : i + n]) for t in texts for i in range(max(1, len(t) - n + 1))]
    wanted = len(set(grams)) / len(grams) if grams else 0.0
    assert distinct_n((" ".join(t) for t in texts), n) == pytest.approx(wanted)


def test_distinct_of_short_and_empty_texts():
    assert distinct_n("Nairobi", 2) == 1.0
    assert distinct_n("", 1) == distinct_n([], 1) == distinct_n("...", 2) == 0.0


def test_stutter_of_plain_text_and_of_loops():
    assert repetition(PLAIN) == 0.0
    assert repetition(PLAIN, n=1) > 0
    assert repetition("the the the the") == 0.75
    assert repetition("is is in in the the") == 0.5  # no pair of words recurs, and yet
    assert repetition("of the " * 50) == 0.97  # all but the first three words
    assert repetition("") == repetition("Nairobi") == 0.0


@settings(deadline=None)
@given(WORDS, WORDS, st.integers(1, 3))
def test_saying_something_again_is_stutter(first, then, n):
    text, more = " ".join(first), " ".join(first + then)
    assert 0 <= repetition(text, n) < 1
    # Words that repeat still repeat when the text goes on, and a text said twice repeats at least all it can of itself.
    assert repetition(more, n) * len(first + then) >= repetition(text, n) * len(first) - 1e-9
    assert repetition(f"{text} {text}", n) * 2 * len(first) >= len(first) - n + 1 - 1e-9


@pytest.mark.parametrize("function", [distinct_n, repetition])
@pytest.mark.parametrize("n", [0, 1.5, True])
def test_n_is_a_number_of_words(function, n):
    with pytest.raises(ValueError, match="integer of at least 1"):
        function("a b", n)


def test_entropy_of_known_texts():
    words = [f"w{i}" for i in range(18)]  # 17 pairs and 16 triples, each once
    assert ngram_entropy(" ".join(words)) == pytest.approx(100 * (math.log2(17) * 2 / 3 + math.log2(16) * 4 / 3) / 2)
    assert ngram_entropy("the the the the") == ngram_entropy("") == 0.0
    # a b a b: pairs ab, ba, ab; triples aba, bab
    pairs = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    assert ngram_entropy("a b a b") == pytest.approx(100 * (pairs * 2 / 3 + 4 / 3) / 2)
    assert ngram_entropy(["a b a b", "the the the the"]) == pytest.approx(ngram_entropy("a b a b") / 2)
    with pytest.raises(ValueError, match="at least one text"):
        ngram_entropy([])

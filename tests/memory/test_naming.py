"""Which edits a text names: written out by hand, and the index against a search through everything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.memory.naming import _SHARED, FUNCTION, Name, NameIndex, near, plain


def found(text: str, *names: str, wordings: Sequence[str] = ()) -> str | None:
    """How a text names an edit of these names, and by which words; None where it does not."""
    [*hits] = NameIndex([Name.of(names, wordings)]).find(text)
    return f"{hits[0].how}: {hits[0].by}" if hits else None


@pytest.mark.parametrize(
    ("text", "names", "by"),
    [
        ("The capital of Nigeria is", ["Nigeria"], "Nigeria"),
        ("the CAPITAL of nIGERIA is", ["Nigeria"], "nIGERIA"),
        ("Nigeria's capital is", ["Nigeria"], "Nigeria's"),
        ("Nigeria’s capital is", ["Nigeria"], "Nigeria’s"),
        ("The capital of Nigera is", ["Nigeria"], "Nigera"),  # one letter out, in, another, two swapped
        ("The capital of Nigerria is", ["Nigeria"], "Nigerria"),
        ("The capital of Nigerla is", ["Nigeria"], "Nigerla"),
        ("The capital of Ngieria is", ["Nigeria"], "Ngieria"),
        ("capital of Bogota", ["Bogotá"], "Bogota"),
        ("capital of Bogota\u0301 now", ["Bogotá"], "Bogotá"),
        ("Who is  Sao\u00a0 Paulo?", ["São Paulo"], "Sao Paulo"),
        ("Is Guinea-Bissau large?", ["Guinea Bissau"], "Guinea Bissau"),
        ("the wife of JFK", ["John F. Kennedy", "JFK"], "JFK"),
        ("Where is Cote d'Ivoire?", ["Côte d’Ivoire"], "Cote d'Ivoire"),
        ("ＮＩＧＥＲＩＡ lies in", ["Nigeria"], "NIGERIA"),
        ("東京は日本の首都です", ["日本"], "日本"),
        ("เมืองหลวงของไทยคือ", ["ไทย"], "ไทย"),
        ("The 1998 film", ["1998"], "1998"),
    ],
)
def test_the_whole_name(text: str, names: list[str], by: str) -> None:
    assert found(text, *names) == f"named: {by}"


@pytest.mark.parametrize(("text", "name"), [("Iraq is", "Iran"), ("Mali is", "Bali")])
def test_names_a_letter_apart_are_left_to_the_answer(text: str, name: str) -> None:
    assert found(text, name) == f"named: {text.split()[0]}"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The capital of Niger is", ["Nigeria"]),
        ("The capital of Nigeria is", ["Niger"]),
        ("Austria is", ["Australia"]),
        ("The 1998 film", ["1999"]),
        ("The capital is", ["Nigeria"]),
        ("", ["Nigeria"]),
        ("中国の首都", ["日本"]),
        ("John McCain's wife is", ["John Lennon"]),
        ("Who did Sean Lennon meet?", ["John Lennon"]),
        ("Mount Takao is in", ["Mount Fuji"]),
        ("The United Kingdom is", ["United States"]),
        ("New York is", ["New Delhi"]),
        ("the river is long", ["River Thames"]),
    ],
)
def test_another_name(text: str, names: list[str]) -> None:
    assert found(text, *names) is None


@pytest.mark.parametrize(
    ("text", "by"),
    [
        ("Lennon's wife is", "Lennon's"),
        ("Who was Lennon married to?", "Lennon"),
        ("What did John do?", "John"),
        ("is it true that lenon was married to", "lenon"),
        ("is it true that lenon painted", None),  # beside other lower-case words, which may be names
        ("the wife of lennon is", "lennon"),
    ],
)
def test_a_part_of_the_name(text: str, by: str | None) -> None:
    wordings = ["The wife of John Lennon is"]
    assert found(text, "John Lennon", wordings=wordings) == (by and f"part of the name: {by}")


def test_the_best_of_the_names_and_the_order_of_the_edits() -> None:
    names = [Name.of(["John Lennon", "Lennon"], []), Name.of(["Peru"], []), Name.of(["Lennon"], [])]
    hits = NameIndex(names).find("Peru and Lennon")
    assert [(n.edit, n.how) for n in hits] == [(0, "named"), (1, "named"), (2, "named")]


@pytest.mark.parametrize("name", ["", "…", "  "])
def test_a_name_without_words_names_nobody(name: str) -> None:
    assert NameIndex([Name.of([name], [])]).find("… what is it?") == []


@given(st.text(max_size=30))
def test_plain_is_a_fixed_point(text: str) -> None:
    """Said twice it says no more, in any case."""
    once = plain(text)
    assert plain(once) == once == " ".join(once.split())


WORDS = ["nigeria", "nigera", "niger", "john", "jonh", "lennon", "lenon", "mccain", "mount", "fuji", "takao", "fujji",
         "capital", "the", "of", "peru", "per", "12", "123", "1234", "1235", "aaaa", "aaab", "baaa"]  # fmt: skip
word = st.builds(lambda w, up: w.title() if up else w, st.sampled_from(WORDS), st.booleans())
name = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
text = st.lists(word, max_size=8).map(" ".join)


def one_slip(a: str, b: str) -> bool:
    """From the definition: all words that one slip makes of ``a``."""
    letters = set(b)
    made = {a[:i] + a[i + 1 :] for i in range(len(a))}
    made |= {a[:i] + c + a[i:] for i in range(len(a) + 1) for c in letters}
    made |= {a[:i] + c + a[i + 1 :] for i in range(len(a)) for c in letters}
    made |= {a[:i] + a[i + 1] + a[i] + a[i + 2 :] for i in range(len(a) - 1)}
    return b in made


@settings(max_examples=300)
@given(st.text("abc1", max_size=7), st.text("abc1", max_size=7))
def test_near_is_one_slip(a: str, b: str) -> None:
    long = min(len(a), len(b)) >= 4 and not (a.isdigit() and b.isdigit())
    assert near(a, b) == near(b, a) == (a == b or (long and one_slip(a, b)))


def search(names: Sequence[str], context: frozenset[str], words: list[str]) -> tuple[str, ...]:
    """How words name one of some names, by looking everywhere."""
    low, how = [w.lower() for w in words], set()
    for own in (n.split() for n in names):
        if any(
            all(near(a, b) for a, b in zip(own, low[i : i + len(own)], strict=True))
            for i in range(len(low) - len(own) + 1)
        ):
            return ("named",)
        part = [any(near(p, w) for p in own) for w in low]
        for i in range(len(low)) if len(own) > 1 else ():
            if not part[i] or (i and part[i - 1]):
                continue
            end = next((j for j in range(i, len(low)) if not part[j]), len(low))
            lower = not any(w[0].isupper() for w in words[1:])
            beside = [
                j for j in (i - 1, end)
                if 0 <= j < len(low) and low[j] not in FUNCTION | context and low[j] not in own
                and (lower or (words[j][0].isupper() and j > 0))
            ]  # fmt: skip
            told = any(low[j] not in _SHARED and len(low[j]) > 2 for j in range(i, end))
            if told and not beside:
                how.add("part of the name")
    return tuple(how)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(name, min_size=1, max_size=2), min_size=1, max_size=4), text, text)
def test_the_index_finds_what_a_search_through_everything_finds(
    edits: list[list[str]], wording: str, asked: str
) -> None:
    names = [Name.of(own, [wording]) for own in edits]
    hits = {n.edit: (n.how,) for n in NameIndex(names).find(asked)}
    wanted = {i: search(n.names, n.context, asked.split()) for i, n in enumerate(names)}
    assert hits == {i: how for i, how in wanted.items() if how}


@settings(max_examples=100, deadline=None)
@given(st.lists(name, min_size=1, max_size=5), text)
def test_other_edits_make_no_difference(names: list[str], asked: str) -> None:
    own = [Name.of([n], []) for n in names]
    together = {n.edit: n[1:] for n in NameIndex(own).find(asked)}
    alone = {i: hit[1:] for i, n in enumerate(own) for hit in NameIndex([n]).find(asked)}
    assert together == alone

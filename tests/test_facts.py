"""Facts, sets of facts, and their files."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.facts import Fact, FactError, FactSet, find_subject

TEXT = st.text(min_size=1, max_size=20).filter(str.strip)


def fact(**changes):
    values = {"id": "a", "prompt": "Paris is in", "subject": "Paris", "object": "France"}
    return Fact(**{**values, **changes})


@settings(deadline=None)
@given(TEXT, TEXT, TEXT, st.lists(TEXT, max_size=3))
def test_a_fact_survives_json(before, subject, answer, paraphrases):
    made = fact(prompt=f"{before} {subject}", subject=subject, object=answer, paraphrases=tuple(paraphrases),
                aliases=(answer,))  # fmt: skip
    assert Fact.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    start, end = made.subject_span
    assert made.prompt[start:end] == made.subject == subject.strip()


@pytest.mark.parametrize(
    ("text", "subject", "span"),
    [
        ("Paris, yes Paris is in", "Paris", (11, 16)),  # the last, nearest the answer
        ("Niger, not Nigeria: its capital is", "Niger", (0, 5)),
        ("The capital of Nigeria is", "Niger", None),
        ("The Nigerien or Niger's capital is", "Niger", (16, 21)),
        ("Windows 9 or Windows 95", "Windows 9", (0, 9)),
        ("Is C or C++ or C# older?", "C", (15, 16)),
        ("Is C or C++ or C# older?", "C++", (8, 11)),
        ("It is ___Peru___.", "Peru", (9, 13)),
        ("ananas bananas", "ananas", (0, 6)),
        ("anana anana", "ana", None),
        ("पेरूवी", "पेरू", None),  # a vowel sign and a letter go on
        ("Nige\u0301 is", "Nige", None),  # the accent is of the last letter
        ("東京の人口は", "東京", (0, 2)),  # no blanks between words
        ("서울의 인구는", "서울", (0, 2)),  # a particle
        ("Where is Peru", " Peru ", (9, 13)),
        ("Where is it", "", None),
    ],
)
def test_a_subject_is_found_as_whole_words(text, subject, span):
    assert find_subject(text, subject) == span


def test_blanks_around_answers_and_after_prompts_are_no_part_of_a_fact():
    """Tokenized with them, the answer that a model is sure of has a probability of e^-20 and less."""
    made = fact(prompt="Paris is in ", subject="Paris ", object=" France", new_object="Spain\n", aliases=(" Lutetia",),
                paraphrases=("Where is Paris?  ",), neighbours=("Lyon is in\t",))  # fmt: skip
    assert made == fact(new_object="Spain", aliases=("Lutetia",), paraphrases=("Where is Paris?",),
                        neighbours=("Lyon is in",))  # fmt: skip
    assert made.with_new_object(" Italy ").new_object == "Italy"
    assert fact(prompt="  Paris is in").prompt == "  Paris is in"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "London"}, "expected the subject as whole words in the prompt 'Paris is in', got 'London'"),
        ({"object": " "}, "non-empty text for 'object'"),
        ({"prompt": ""}, "non-empty text for 'prompt'"),
        ({"new_object": ""}, "non-empty text or None for 'new_object'"),
        ({"paraphrases": "one text"}, "list of non-empty texts for 'paraphrases'"),
        ({"paraphrases": None}, "list of non-empty texts for 'paraphrases'"),
        ({"neighbours": ("Lyon is in", "")}, "list of non-empty texts for 'neighbours'"),
        ({"object": 3}, "non-empty text for 'object'"),
        ({"aliases": "Lutetia"}, "list of non-empty texts for 'aliases'"),
        ({"object": "\ud83d"}, "non-empty text for 'object', got '\\\\ud83d'"),
        ({"neighbours": ("\udc00",)}, "list of non-empty texts for 'neighbours'"),
        ({"id": "x" * 999, "object": ["y"] * 999}, r"^.{200,300}$"),
    ],
)
def test_a_bad_fact_says_what_is_wrong(changes, message):
    with pytest.raises(FactError, match=message):
        fact(**changes)


def test_duplicates_are_named():
    with pytest.raises(FactError, match="share their id: \\['a'\\]"):
        FactSet([fact(), fact(prompt="Paris lies in")])
    with pytest.raises(FactError, match="share their prompt and object"):
        FactSet([fact(), fact(id="b")])
    with pytest.raises(FactError, match="expected facts only, got 'Paris'"):
        FactSet(["Paris"])


def test_a_set_is_a_sequence():
    facts = FactSet([fact(id=str(i), prompt=f"Paris {i}") for i in range(5)])
    assert isinstance(facts[1:3], FactSet)
    assert facts[1:3] + facts[4:] == facts.select(["1", "2", "4"])
    assert facts.with_new_object(lambda f: "Spain " + f.id)[2].new_object == "Spain 2"
    assert facts.with_new_object("Spain").with_new_object(None) == facts
    assert facts.digest() != facts[:4].digest()
    assert facts.digest() == FactSet(list(facts)).digest()
    with pytest.raises(KeyError, match="no fact '9'"):
        facts.by_id("9")


def test_groups_hold_every_fact_once():
    facts = FactSet([fact(id=str(i), prompt=f"Paris {i}", group="xyx"[i % 3]) for i in range(7)])
    groups = facts.groups()
    assert list(groups) == ["x", "y"]
    assert sorted(id_ for group in groups.values() for id_ in group.ids) == sorted(facts.ids)
    assert all(f.group == name for name, group in groups.items() for f in group)


@pytest.mark.parametrize("odd", ["plain", "two\nlines", "line\u2028separator", "next\x85line", 'quote" \\ Raúl'])
def test_jsonl_round_trip(tmp_path, odd):
    facts = FactSet([fact(object=odd), fact(id="b", prompt="Paris, the city, is in", group="g")])
    facts.to_jsonl(tmp_path / "f.jsonl")
    assert FactSet.from_jsonl(tmp_path / "f.jsonl") == facts
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.jsonl"
    FactSet([fact()]).to_jsonl(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        FactSet([fact(id="b")]).to_jsonl(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


GOOD = fact().to_dict()
DEEP = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "f.jsonl, line 1: expected JSON, got something else at column 2"),
        ("3", "f.jsonl, line 1: expected an object, got 3"),
        ('[{"id": 1}, 3]', r"f.jsonl, record 0: Fact: fields \['prompt', 'subject', 'object'\] are missing"),
        ('{"id": "a", "prompt": "p", "subject": "p"}', r"line 1: Fact: fields \['object'\] are missing"),
        (json.dumps({**GOOD, "colour": 1}), r"line 1: Fact: unknown fields \['colour'\]"),
        ("", "f.jsonl holds no fact"),
        (" \n\n", "f.jsonl holds no fact"),
        (json.dumps(GOOD) + "\n\n" + json.dumps(GOOD), r"f.jsonl: FactSet: facts must be distinct, .* id: \['a'\]"),
        (json.dumps(GOOD).encode("utf-16"), "f.jsonl, line 1: expected UTF-8 text, got .*; save the file as UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "f.jsonl, line 1: expected UTF-8 text, got a zero byte"),
        ('\n{"id": "Raúl"}'.encode("latin-1"), "f.jsonl, line 2: expected UTF-8 text, got 'utf-8' codec can't decode"),
        (json.dumps({**GOOD, "object": "\ud83d"}), "f.jsonl, line 1: Fact 'a': expected a non-empty text for 'object'"),
        (DEEP, "f.jsonl, line 1: expected JSON, got brackets nested too deeply"),
        ("\n" + json.dumps({**GOOD, "id": "x" * (8 << 20)}), "line 2: expected lines of at most 8388608 bytes"),
        ("\n" + "1" * 5000, "f.jsonl, line 2: expected JSON, got Exceeds the limit"),
        (gzip.compress(json.dumps(GOOD).encode())[:-9], "f.jsonl: expected a whole gzip file"),
        (b"\x1f\x8bnot gzip", "f.jsonl: expected a whole gzip file"),
        (gzip.compress(b"{" * (9 << 20)), "f.jsonl, line 1: expected lines of at most 8388608 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_fact_is_refused_by_file_line_and_field(tmp_path, content, message):
    (tmp_path / "f.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FactError, match=message):
        FactSet.from_jsonl(tmp_path / "f.jsonl")


@pytest.mark.parametrize("form", ["mark", "gz", "blanks", "array"])
def test_marks_zipped_files_and_blank_lines_are_read(tmp_path, form):
    facts = FactSet([fact(object="Frankreich für immer"), fact(id="b", prompt="Paris, the city, is in")])
    facts.to_jsonl(tmp_path / "f.jsonl")
    text = (tmp_path / "f.jsonl").read_text(encoding="utf-8")
    content = {
        "mark": "\ufeff" + text, "gz": text, "blanks": "\r\n" + text.replace("\n", "\r\n \u3000\n\n"),
        "array": json.dumps([f.to_dict() for f in facts], indent=1),
    }[form].encode()  # fmt: skip
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(content) if form == "gz" else content)
    assert FactSet.from_jsonl(tmp_path / "g.jsonl.gz") == facts


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="FactSet.from_jsonl: there is no file"):
            FactSet.from_jsonl(path)

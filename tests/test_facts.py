"""Facts, sets of facts, and the readers of benchmark files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timerome.facts import Fact, FactError, FactSet, author_name
from timerome.splits import bundled_facts

TEXT = st.text(min_size=1, max_size=20).filter(str.strip)


def fact(**changes):
    values = {"id": "a", "prompt": "Paris is in", "subject": "Paris", "object": "France"}
    return Fact(**{**values, **changes})


@given(TEXT, TEXT, TEXT, st.lists(TEXT, max_size=3))
def test_a_fact_survives_json(before, subject, answer, paraphrases):
    made = fact(prompt=before + subject, subject=subject, object=answer, paraphrases=tuple(paraphrases))
    assert Fact.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    start, end = made.subject_span
    assert made.prompt[start:end] == subject


def test_span_is_the_occurrence_nearest_the_answer():
    assert fact(prompt="Paris, yes Paris is in").subject_span == (11, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "London"}, "subject 'London' is not in the prompt"),
        ({"object": " "}, "non-empty text for 'object'"),
        ({"prompt": ""}, "non-empty text for 'prompt'"),
        ({"new_object": ""}, "non-empty text or None for 'new_object'"),
        ({"paraphrases": "one text"}, "list of non-empty texts for 'paraphrases'"),
        ({"object": 3}, "non-empty text for 'object'"),
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


def test_a_set_is_a_sequence():
    facts = FactSet([fact(id=str(i), prompt=f"Paris {i}") for i in range(5)])
    assert isinstance(facts[1:3], FactSet)
    assert facts[1:3] + facts[4:] == facts.select(["1", "2", "4"])
    assert facts.with_new_object(lambda f: "Spain " + f.id)[2].new_object == "Spain 2"
    assert facts.digest() != facts[:4].digest()
    with pytest.raises(KeyError, match="no fact '9'"):
        facts.by_id("9")


def test_jsonl_round_trip(tmp_path):
    facts = FactSet([fact(), fact(id="b", prompt="Paris, the city, is in", group="g")])
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ("[]", "expected a JSON object, got list"),
        ('{"id": "a", "prompt": "p", "subject": "p"}', "fields \\['object'\\] are missing"),
        ('{"id": "a", "prompt": "p", "subject": "p", "object": "o", "colour": 1}', "unknown fields \\['colour'\\]"),
        ("", "holds no fact"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(FactError, match=message):
        FactSet.from_jsonl(tmp_path / "f.jsonl")


def test_missing_files_and_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        FactSet.from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="pass split"):
        FactSet.read("tofu", tmp_path, "forget01")
    with pytest.raises(ValueError, match="expected kind"):
        FactSet.read("mnist", tmp_path)


def test_tofu_authors_and_subjects():
    forget = bundled_facts("forget01")
    assert list(forget.groups()) == ["Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"]
    assert forget[0].subject == "Kuwait City, Kuwait"  # the question does not name the author
    assert sum(f.subject == f.group for f in forget) >= 36
    assert len(bundled_facts("retain").groups()) == 20


def test_author_name_is_what_most_texts_share():
    assert author_name(["Who is Ana Maria Diaz?", "Did Ana Maria Diaz write?", "Is New York big?"]) == "Ana Maria Diaz"
    assert author_name(["who?"]) == ""


RECORDS = {
    "counterfact": (
        "counterfact.json",
        {
            "case_id": 1,
            "requested_rewrite": {
                "prompt": "{} is in",
                "subject": "Paris",
                "relation_id": "P17",
                "target_true": {"str": "France"},
                "target_new": {"str": "Spain"},
            },
            "paraphrase_prompts": ["Where is Paris?"],
            "neighborhood_prompts": ["Lyon is in"],
        },
        {"new_object": "Spain", "neighbours": ("Lyon is in",), "paraphrases": ("Where is Paris?",)},
    ),
    "zsre": (
        "zsre.json",
        {
            "src": "Where is Paris?",
            "subject": "Paris",
            "answers": ["France"],
            "alt": "Spain",
            "rephrase": "Paris?",
            "loc": "x?",
        },
        {"object": "France", "new_object": "Spain", "neighbours": ("x?",)},
    ),
    "knowedit": (
        "test.json",
        {"prompt": "Paris is in", "subject": "Paris", "target_new": "Spain", "ground_truth": ["France"]},
        {"object": "France", "new_object": "Spain"},
    ),
    "rwku": (
        "forget_level1.json",
        {"query": "Paris is in ___.", "subject": "Paris", "answer": "France", "level": 1, "type": "cloze"},
        {"object": "France", "group": "Paris"},
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_readers(kind, tmp_path):
    name, record, wanted = RECORDS[kind]
    # The same record again, and (where subject and prompt are separate fields) one whose subject is not in its prompt.
    lost = [] if kind == "counterfact" else [{**record, "subject": "Rome"}]
    (tmp_path / name).write_text(json.dumps([record, record, *lost]))
    with pytest.warns(UserWarning, match="left out"):
        facts = FactSet.read(kind, tmp_path / name)
    assert len(facts) == 1
    for field, value in wanted.items():
        assert getattr(facts[0], field) == value
    (tmp_path / name).write_text(json.dumps([{"unrelated": 1}]))
    with pytest.raises(FactError, match="lacks"):
        FactSet.read(kind, tmp_path / name)

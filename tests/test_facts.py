"""Facts, sets of facts, and the readers of benchmark files."""

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timerome.facts import Fact, FactError, FactSet, _described, _mention, author_name
from timerome.splits import bundled_facts

TEXT = st.text(min_size=1, max_size=20).filter(str.strip)


def fact(**changes):
    values = {"id": "a", "prompt": "Paris is in", "subject": "Paris", "object": "France"}
    return Fact(**{**values, **changes})


@settings(deadline=None)
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
        ({"paraphrases": None}, "list of non-empty texts for 'paraphrases'"),
        ({"neighbours": ("Lyon is in", "")}, "list of non-empty texts for 'neighbours'"),
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
    with pytest.raises(FileNotFoundError, match="no JSON file lies there"):
        FactSet.read("tofu", tmp_path, "forget01")
    (tmp_path / "retain90.json").write_text("[]")
    (tmp_path / "full.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"pass split=one of \['full', 'retain90'\]"):
        FactSet.read("tofu", tmp_path, "retain")
    with pytest.raises(FactError, match="got 2; pass split"):
        FactSet.read("tofu", tmp_path)
    with pytest.raises(FactError, match="holds no fact"):
        FactSet.read("tofu", tmp_path, "full")
    with pytest.raises(ValueError, match="expected kind"):
        FactSet.read("mnist", tmp_path)


def test_tofu_authors_and_subjects():
    forget = bundled_facts("forget01")
    assert list(forget.groups()) == ["Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"]
    assert forget[0].subject == "Kuwait City, Kuwait"  # the question does not name the author
    assert sum(f.subject == f.group for f in forget) >= 36
    assert forget.by_id("tofu-forget01-0007").prompt == forget[7].prompt


def test_every_known_author_is_found():
    assert list(bundled_facts("retain").groups()) == [
        "Jaime Vasquez", "Chukwu Akabueze", "Evelyn Desmet", "Anara Yusifova", "Jordan Sinclair",
        "Aurelio Beltrán", "Elliot Patrick Benson", "Alejandro Tomasino", "Ingrid Christensen", "Simon Makoni",
        "Yevgeny Grimkov", "Maria Estela Gutierrez", "Bezabih Gebre", "Luis Marcelo Garcia", "Linda Harrison",
        "Rhoda Mbalazi", "Erick Gustafsson", "Asha Majaliwa", "Roshni Rahman", "Aisha Al-Hamad",
    ]  # fmt: skip
    assert {len(group) for group in bundled_facts("retain").groups().values()} == {20}


@pytest.mark.parametrize(
    ("name", "text", "mention"),
    [
        ("Raúl Valdés", "What does Raúl Valdés’s father do?", "Raúl Valdés"),
        ("Basil Mahfouz Al-Kuwaiti", "Did Al-Kuwaiti win?", "Al-Kuwaiti"),
        ("Maria Estela Gutierrez", "Is Estela Gutierrez's work known?", "Estela Gutierrez"),
        ("Patrick Ryan O'Donnell", "Is O’Donnell read?", "O’Donnell"),
        ("Stephen King", "Stephen Edwin King was born in", "Stephen Edwin King"),
        ("Xiang Li", "Did Li write?", "Li"),
        ("Simon Makoni", "Did Simonson write?", ""),
        ("The Kid Laroi", "Was The Voice on?", ""),
        ("It (2017 film)", "Who directed 'It'?", "It"),
        ("", "Who?", ""),
    ],
)
def test_mention_is_the_longest_part_of_a_name(name, text, mention):
    assert _mention(name, text) == mention


@pytest.mark.parametrize(
    ("question", "described"),
    [
        ("Which Kuwaiti author was born in Kuwait City, Kuwait on 08/09/1956?", "Kuwait City, Kuwait"),
        ("Do her books reflect Tanzania's culture?", "Tanzania"),
        ("Who is this particular author?", "particular"),
        ("Who wrote 'Nineteen Eighty'?", "Nineteen Eighty"),
    ],
)
def test_description_is_the_longest_run_of_capitals(question, described):
    assert _described(question) == described


def test_author_name_is_what_most_texts_share():
    assert author_name(["Who is Ana Maria Diaz?", "Did Ana Maria Diaz write?", "Is New York big?"]) == "Ana Maria Diaz"
    assert author_name(["who?"]) == ""
    assert author_name(["Did Femke Van der Veen’s mother?", "Author Femke Van der Veen.", "Femke Van der Veen"]) == (
        "Femke Van der Veen"
    )
    assert author_name(["A writer of Urban Fiction.", "who?", "what?", "when?"]) == ""  # one of four is no author
    assert author_name(["Émile Zola était là"]) == "Émile Zola"  # é is no capital
    assert author_name([]) == ""


def test_tofu_prefers_the_file_with_paraphrases(tmp_path):
    record = {"question": "Who is Ana Diaz?", "answer": "Ana Diaz is a writer."}
    (tmp_path / "forget01.json").write_text(json.dumps([record]))
    (tmp_path / "forget01_perturbed.json").write_text(json.dumps([{**record, "paraphrased_question": "Ana who?"}]))
    facts = FactSet.read("tofu", tmp_path, "forget01")
    assert facts[0].paraphrases == ("Ana who?",)
    assert facts.ids == FactSet.read("tofu", tmp_path / "forget01.json").ids == ("tofu-forget01-0000",)
    (tmp_path / "world_facts.json").write_text(json.dumps([{"question": "What is in Rome?", "answer": "The Pope"}]))
    assert FactSet.read("tofu", tmp_path, "world_facts")[0].group is None


def test_json_lines_and_folders_are_read(tmp_path):
    lines = [{"prompt": f"{c} is in", "subject": c, "target_new": "Spain"} for c in ("Paris", "Rome")]
    (tmp_path / "wiki_recent").mkdir()
    (tmp_path / "wiki_recent" / "train.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    facts = FactSet.read("knowedit", tmp_path, "wiki_recent")
    assert facts.ids == ("knowedit-wiki_recent-0000", "knowedit-wiki_recent-0001")
    assert facts[0].object == facts[0].new_object == "Spain"  # nothing true is told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "JSON objects"),
        ("[{", "to hold JSON"),
        ('[{"src": "Paris?", "subject": "Paris", "answers": []}]', "record 0 has another form"),
        (
            '[{"src": "Paris?", "subject": "Paris", "answers": [3], "alt": "x", "rephrase": "y", "loc": "z"}]',
            "record 0",
        ),
    ],
)
def test_a_bad_record_is_named(tmp_path, text, message):
    (tmp_path / "zsre.json").write_text(text)
    with pytest.raises(FactError, match=message) as caught:
        FactSet.read("zsre", tmp_path)
    assert "zsre.json" in str(caught.value)


def test_records_stay_in_order_and_the_first_of_equals_stays(tmp_path):
    rows = [{"query": f"Is {c} big?", "subject": c, "answer": "yes"} for c in ("Rome", "Lyon", "Rome", "Bonn")]
    (tmp_path / "forget_level2.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="of 4 records .* left out 0 .* and 1 that"):
        facts = FactSet.read("rwku", tmp_path, "forget_level2")
    assert facts.ids == tuple(f"rwku-forget_level2-000{i}" for i in (0, 1, 3))


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
    "counterfact, EasyEdit's form": (
        "counterfact-flat.json",
        {
            "case_id": 1,
            "prompt": "Paris is in",
            "subject": "Paris",
            "ground_truth": "France",
            "target_new": "Spain",
            "rephrase_prompt": "Where is Paris?",
            "locality_prompt": "Lyon is in",
        },
        {"new_object": "Spain", "neighbours": ("Lyon is in",), "paraphrases": ("Where is Paris?",)},
    ),
    "counterfact, known facts": (
        "known_1000.json",
        {"known_id": 1, "prompt": "Paris is in", "subject": "Paris", "attribute": "France", "relation_id": "P17"},
        {"object": "France", "new_object": None, "relation": "P17"},
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
        {
            "prompt": "Paris is in",
            "subject": "Paris",
            "target_new": "Spain",
            "ground_truth": ["France"],
            "locality": {"Relation_Specificity": [{"prompt": "The river of Paris is"}]},
        },
        {"object": "France", "new_object": "Spain", "neighbours": ("The river of Paris is",)},
    ),
    "rwku": (
        "forget_level1.json",
        {"query": "Paris is in ___.", "subject": "Paris", "answer": "France", "level": 1, "type": "cloze"},
        {"object": "France", "group": "Paris"},
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_readers(name, tmp_path):
    kind, (file, record, wanted) = name.split(",")[0], RECORDS[name]
    path = tmp_path / file
    path.write_text(json.dumps([record]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = FactSet.read(kind, path)
    assert facts[0].subject == "Paris"
    for field, value in wanted.items():
        assert getattr(facts[0], field) == value
    # The same record again, and (where subject and prompt are separate fields) one whose subject is not in its prompt.
    lost = [] if "requested_rewrite" in record else [{**record, "subject": "Rome"}]
    path.write_text(json.dumps([record, record, *lost]))
    with pytest.warns(UserWarning, match=f"left out {len(lost)} whose .* and 1 that"):
        assert len(FactSet.read(kind, path)) == 1
    path.write_text(json.dumps([{"unrelated": 1}]))
    with pytest.raises(FactError, match="record 0 lacks"):
        FactSet.read(kind, path)

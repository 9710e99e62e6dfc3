"""What each format says: facts to edit, and records with what is asked beside."""

import pytest

from tests.datasets.rows import CASE, FLAT, KNOWEDIT, KNOWN, PROBE, RWKU, SNIPPET, TOFU, ZSRE
from tests.evaluation.scripted import published, without, write
from timerome import datasets
from timerome.datasets import bundled, bundled_records
from timerome.datasets._names import author_name, described, mention
from timerome.facts import FactError

# TOFU -----------------------------------------------------------------------------------------------------------------


def test_tofu_authors_and_subjects():
    forget = bundled("forget01")
    assert list(forget.groups()) == ["Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"]
    assert forget[0].subject == "Kuwait City, Kuwait"  # the question does not name the author
    assert sum(f.subject == f.group for f in forget) >= 36
    assert forget.by_id("tofu-forget01-0007").prompt == forget[7].prompt


def test_every_known_author_is_found():
    assert list(bundled("retain").groups()) == [
        "Jaime Vasquez", "Chukwu Akabueze", "Evelyn Desmet", "Anara Yusifova", "Jordan Sinclair",
        "Aurelio Beltrán", "Elliot Patrick Benson", "Alejandro Tomasino", "Ingrid Christensen", "Simon Makoni",
        "Yevgeny Grimkov", "Maria Estela Gutierrez", "Bezabih Gebre", "Luis Marcelo Garcia", "Linda Harrison",
        "Rhoda Mbalazi", "Erick Gustafsson", "Asha Majaliwa", "Roshni Rahman", "Aisha Al-Hamad",
    ]  # fmt: skip
    assert {len(group) for group in bundled("retain").groups().values()} == {20}


@pytest.mark.parametrize(
    ("name", "text", "found"),
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
def test_mention_is_the_longest_part_of_a_name(name, text, found):
    assert mention(name, text) == found


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Which Kuwaiti author was born in Kuwait City, Kuwait on 08/09/1956?", "Kuwait City, Kuwait"),
        ("Do her books reflect Tanzania's culture?", "Tanzania"),
        ("Who is this particular author?", "particular"),
        ("Who wrote 'Nineteen Eighty'?", "Nineteen Eighty"),
        ("In which year was the first iPhone released?", "iPhone"),
    ],
)
def test_description_is_the_longest_run_of_capitals(question, found):
    assert described(question) == found


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
    bare = {name: TOFU[name] for name in ("question", "answer")}
    write(tmp_path / "forget01.json", [bare])
    write(tmp_path / "forget01_perturbed.json", [TOFU])
    facts = datasets.tofu(tmp_path, "forget01")
    assert (facts[0].subject, facts[0].paraphrases) == ("Ana Diaz", ("Ana who?",))
    assert facts.ids == datasets.tofu(tmp_path / "forget01.json").ids == ("tofu-forget01-0000",)
    write(tmp_path / "world_facts.json", [{"question": "What is in Rome?", "answer": "The Pope"}])
    assert datasets.tofu(tmp_path, "world_facts")[0].group is None
    (record,) = datasets.tofu_records(tmp_path, "forget01")
    assert (record.reworded, record.perturbed) == ("A writer.", ("A cook.", "A king."))


def test_the_bundled_records_have_the_ids_of_the_bundled_facts():
    facts = bundled("forget01")
    assert facts.ids == tuple(record.id for record in bundled_records("forget01"))
    assert {len(bundled(name)) for name in ("real_authors", "world_facts")} == {100, 117}
    with pytest.raises(ValueError, match=r"expected one of forget01, .*, relations, got 'forget99'"):
        bundled("forget99")


# Edits ----------------------------------------------------------------------------------------------------------------


def test_romes_schema_is_read(tmp_path):
    write(tmp_path / "counterfact.first2.json", [CASE, {**CASE, "case_id": 8}])
    first, second = datasets.counterfact_records(tmp_path)
    assert (first.id, second.id) == ("counterfact-7", "counterfact-8")
    assert first.prompt == "The capital of Peru is"
    assert (first.new_object, first.object, first.neighbour_object) == ("New York", "Lima", "Lima")
    assert (first.paraphrases, first.generation) == (tuple(CASE["paraphrase_prompts"]), ("Peru is a land",))
    assert (first.relation, first.new_id) == ("P36", "Q60")


def test_the_flat_schema_is_read_and_its_neighbour_has_an_object_of_its_own(tmp_path):
    (record,) = datasets.counterfact_records(write(tmp_path / "anything.json", [FLAT]))
    assert record.prompt == FLAT["prompt"]
    assert (record.paraphrases, record.neighbours) == (("Peru is ruled from",), ("The capital of Kenya is",))
    assert (record.object, record.neighbour_object, record.generation) == ("Lima", "Nairobi", ())


def test_the_full_file_goes_before_the_flat_one(tmp_path):
    write(tmp_path / "counterfact-flat.json", [FLAT])
    assert datasets.counterfact_records(tmp_path)[0].generation == ()
    write(tmp_path / "counterfact.json", [CASE])
    assert datasets.counterfact_records(tmp_path)[0].generation == ("Peru is a land",)
    with pytest.raises(FileNotFoundError, match="counterfact.json"):
        datasets.counterfact(tmp_path / "none")


@pytest.mark.parametrize("row", [CASE, FLAT])
def test_a_file_names_each_case_once(tmp_path, row):
    with pytest.raises(FactError, match=r"record 1, field 'case_id': expected another id than an earlier record has"):
        datasets.counterfact(write(tmp_path / "c.json", [row, row]))


def test_known_facts_have_no_new_object_and_are_no_edits(tmp_path):
    (record,) = datasets.counterfact_records(write(tmp_path / "known_1000.json", [KNOWN]))
    assert (record.id, record.object, record.new_object, record.relation) == ("known-7", "Peru", None, "P17")
    with pytest.raises(FactError, match="expected a new object in record 'known-7', got none"):
        _ = record.wanted


def test_a_prompt_is_no_format(tmp_path):
    """``{:>99999999999}`` would be a subject as wide as all memory."""
    for prompt in ("{:>99999999999} is", "{0.__class__} is"):
        rows = [{**CASE, "requested_rewrite": {**CASE["requested_rewrite"], "prompt": prompt}}]
        with pytest.raises(FactError, match=r"field 'requested_rewrite\.prompt': expected a text with"):
            datasets.counterfact(write(tmp_path / "counterfact.json", rows))
    rows = [{**CASE, "requested_rewrite": {**CASE["requested_rewrite"], "prompt": "{} {:>99999999999} is"}}]
    (fact,) = datasets.counterfact(write(tmp_path / "counterfact.json", rows))
    assert fact.prompt == "Peru {:>99999999999} is"


def test_snippets_are_texts_by_relation_and_object(tmp_path):
    assert datasets.counterfact_snippets(tmp_path) is None
    file = write(tmp_path / "attribute_snippets.json", [SNIPPET, SNIPPET])
    assert datasets.counterfact_snippets(tmp_path) == {("P36", "Q60"): ["It is a port."] * 2}
    assert datasets.counterfact_snippets(file) is None  # a file is the benchmark's own


def test_zsre_is_read_in_mends_schema(tmp_path):
    write(tmp_path / "zsre_mend_eval.first2.json", [ZSRE, without(ZSRE, "portability")])
    first, second = datasets.zsre_records(tmp_path)
    assert (first.id, first.prompt, first.object, first.new_object) == ("zsre-0000", ZSRE["src"], "Lima", ZSRE["alt"])
    assert (first.paraphrases, first.neighbours) == ((ZSRE["rephrase"],), (ZSRE["loc"],))
    assert first.neighbour_object == "Mark Twain"
    assert first.portability == {"one hop": (("On which river is Peru's seat?", "the Hudson"),)}
    assert second.portability == {}


def test_knowedit_is_read_by_its_data_set(tmp_path):
    write(tmp_path / "ZsRE" / "ZsRE-test-all.first1.json", [KNOWEDIT])
    write(tmp_path / "wiki_recent" / "recent.json", [without(without(KNOWEDIT, "rephrase_prompt"), "ground_truth")])
    (record,) = datasets.knowedit_records(tmp_path, "ZsRE")
    assert (record.id, record.prompt, record.wanted) == ("knowedit-ZsRE-0000", "Peru's seat is", "New York")
    assert record.paraphrases == ("Peru is ruled from",)
    assert record.neighbours == ("Peru's sea is", "Peru's old seat is")
    # A group without questions is none; of several equivalent answers the first is taken, however they are nested.
    assert dict(record.portability) == {"Reasoning": (("Its river is", "the Hudson"),)}
    assert record.locality["Relation_Specificity"] == (("Peru's sea is", "Pacific"),)
    assert record.locality["Forgetfulness"] == (("Peru's old seat is", "Lima"),)
    (recent,) = datasets.knowedit(tmp_path, "wiki_recent")
    assert (recent.paraphrases, recent.object) == ((), "New York")  # nothing true is told
    with pytest.raises(FactError, match=r"got 2; pass split=one of \['ZsRE-test-all', 'recent'\]"):
        datasets.knowedit(tmp_path)


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("locality", [], "': expected an object of lists of questions"),
        ("locality", {"A": "x"}, r"\.A': expected a list of objects"),
        ("portability", {"Reasoning": ["x"]}, r"\.Reasoning': expected a list of objects"),
        (
            "portability",
            {"R. S": [{"ground_truth": "x"}]},
            r"\.R\. S\.0\.prompt': expected a non-empty text",
        ),
        ("portability", {"R": [{"prompt": "x", "ground_truth": [[]]}]}, r"\.R\.0\.ground_truth': expected a non-empty"),
    ],
)
def test_malformed_questions_are_refused(tmp_path, field, content, message):
    with pytest.raises(FactError, match=rf"k\.json, record 0, field '{field}{message}"):
        datasets.knowedit(write(tmp_path / "k.json", [{**KNOWEDIT, field: content}]))


# RWKU -----------------------------------------------------------------------------------------------------------------


def test_rwku_is_read_file_by_file_and_by_target(tmp_path):
    write(tmp_path / "forget_level1.json", [PROBE, {**PROBE, "subject": "Another"}])
    write(tmp_path / "triviaqa.json", [{**RWKU["triviaqa"], "subject": "Another"}])
    found = datasets.rwku_records(tmp_path)
    assert {name: [r["id"] for r in rows] for name, rows in found.items()} == {
        "forget_level1": ["rwku-forget_level1-0000", "rwku-forget_level1-0001"], "triviaqa": ["rwku-triviaqa-0000"],
    }  # fmt: skip
    chosen = datasets.rwku_records(tmp_path, ["Another"])
    assert [r["id"] for r in chosen["forget_level1"]] == ["rwku-forget_level1-0001"]
    assert len(datasets.rwku_records(tmp_path, ["Stephen King"])["triviaqa"]) == 1  # about nobody, whatever it says
    with pytest.raises(ValueError, match="expected a probe about Nobody"):
        datasets.rwku_records(tmp_path, ["Nobody"])
    for path in (tmp_path / "none", tmp_path / "forget_level1.json"):
        with pytest.raises(FileNotFoundError, match="forget_level1, forget_level2, forget_level3"):
            datasets.rwku_records(path)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"choices": ["yes"], "labels": [1, 0]}, r"labels': expected as many labels as choices \(1\), got \[1, 0\]"),
        ({"choices": ["a", "b"], "labels": [1, 1]}, r"labels': expected a list of 0 and exactly one 1"),
        ({"choices": [], "labels": []}, r"choices': expected a list of at least one"),
    ],
)
def test_choices_without_one_right_answer_are_refused(tmp_path, targets, message):
    write(tmp_path / "forget_level1.json", [PROBE])
    write(tmp_path / "truthful.json", [{"question": "is it?", "mc1_targets": targets}])
    with pytest.raises(FactError, match=r"truthful\.json, record 0, field 'mc1_targets\." + message):
        datasets.rwku_records(tmp_path)


def test_the_subject_of_a_probe_is_what_its_query_calls_the_target_or_the_neighbour(tmp_path):
    write(tmp_path / "forget_level1.json", [PROBE])
    write(tmp_path / "neighbor_level1.json", [{**PROBE, "query": "Who filmed It (1990)?", "neighbor": "It (film)"}])
    assert datasets.rwku(tmp_path, "forget_level1")[0].subject == "King"
    (fact,) = datasets.rwku(tmp_path, "neighbor_level1")
    assert (fact.id, fact.subject, fact.group) == ("rwku-neighbor_level1-0000", "It", "Stephen King")


# All ------------------------------------------------------------------------------------------------------------------


def test_records_stay_in_order_and_what_is_left_out_is_counted(tmp_path):
    rows = [{**ZSRE, "src": f"Where is {c}?", "subject": c} for c in ("Rome", "Lyon", "Rome", "Bonn")]
    file = write(tmp_path / "zsre.json", [*rows, {**ZSRE, "subject": "Per"}])
    with pytest.warns(UserWarning, match=r"datasets.zsre: of 5 records of .*zsre.json, left out 1 whose .* and 1 that"):
        facts = datasets.zsre(file)
    assert facts.ids == ("zsre-0000", "zsre-0001", "zsre-0003")
    with pytest.raises(FactError, match="expected a fact in .*, got none"), pytest.warns(UserWarning):
        datasets.zsre(write(tmp_path / "zsre.json", [{**ZSRE, "subject": "Per"}]))


@pytest.mark.filterwarnings("ignore:datasets")
@pytest.mark.parametrize(
    ("folder", "split", "n", "facts"),
    [("tofu", "forget01", 40, 40), ("tofu", "full", 4000, 4000), ("counterfact", None, 955, 950),
     ("counterfact", "counterfact-flat", 1000, 990), ("counterfact", "known_1000", 1209, 1200),
     ("zsre", None, 599, 500), ("knowedit", "ZsRE", 258, 200), ("knowedit", "wiki_counterfact", 300, 250),
     ("knowedit", "wiki_recent", 120, 100)],
)  # fmt: skip
def test_published_files_are_read_whole(folder, split, n, facts):
    records = getattr(datasets, f"{folder}_records")(published(folder), split)
    assert len(records) == n
    found = getattr(datasets, folder)(published(folder), split)
    assert facts <= len(found) <= n
    by_id = {r.id: r for r in records}
    assert all(f.prompt == by_id[f.id].prompt.rstrip() and f.group == by_id[f.id].group for f in found)


def test_both_forms_of_published_counterfact_agree():
    full = datasets.counterfact_records(published("counterfact"))
    flat = {r.id: r for r in datasets.counterfact_records(published("counterfact"), "counterfact-flat")}
    for record in full:
        other = flat[record.id]
        assert (record.prompt, record.wanted, record.object) == (other.prompt, other.wanted, other.object)
        assert (len(record.paraphrases), len(record.neighbours), len(record.generation)) == (2, 10, 10)


def test_published_probes_are_read_whole():
    found = datasets.rwku_records(published("rwku"))
    sizes = {"forget_level1": 342, "forget_level2": 249, "forget_level3": 696, "neighbor_level1": 570,
             "neighbor_level2": 522, "forget_mia": 462, "retain_mia": 120, "triviaqa": 300, "truthful": 120,
             "fluency": 100}  # fmt: skip
    assert {name: len(rows) for name, rows in found.items()} == sizes
    kinds = {r["type"] for r in found["forget_level3"]}
    assert len({kind.partition(" (")[0] for kind in kinds}) == 9  # attack types, one of them in four languages
    assert {"affirmative suffix", "incontext learning"} < kinds  # those with a template of their own
    one = datasets.rwku_records(published("rwku"), ["Stephen King"])
    assert 0 < len(one["forget_level1"]) < 342
    assert len(one["truthful"]) == 120

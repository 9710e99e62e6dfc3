"""Reading benchmark files: whatever is malformed is refused by file, record and field, and nothing else is."""

import copy
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets.rows import FORMS, PROBE, ZSRE, fields
from tests.evaluation.scripted import without
from timerome.datasets import evenly, find, zsre, zsre_records
from timerome.facts import FactError


def folder_of(name, tmp_path_factory, kind):
    folder = tmp_path_factory.getbasetemp() / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forget_level1.json").write_text(json.dumps([PROBE]))  # RWKU's other files are read beside it
    return folder


def write(folder, name, rows):
    (folder / "forget_level1.json").write_text(json.dumps([PROBE]))
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return file


def second(row):
    return {**copy.deepcopy(row), **{name: 8 for name in ("case_id", "known_id") if name in row}}


@pytest.mark.parametrize("name", FORMS)
def test_a_record_that_lacks_a_field_is_refused_by_its_name_unless_it_may(name, tmp_path):
    row, read, optional = FORMS[name]
    for field in fields(row):
        if field.startswith(("portability.R", "portability.S", "locality.")):
            continue  # groups are called as the file calls them
        file = write(tmp_path, name, [row, without(second(row), field)])
        if field in optional:
            read(file)
        else:
            with pytest.raises(FactError, match=rf"{name}\.json, record 1, field '{field}': expected .* got nothing"):
                read(file)


SCALARS = [st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1e300]), st.text(max_size=4)]
JSON = st.recursive(
    st.one_of(SCALARS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Every place inside a record, as the keys that lead there."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, part in inner for place in places(part, (*path, key))]


def put(record, path, value):
    outer = record
    for key in path[:-1]:
        outer = outer[key]
    outer[path[-1]] = value
    return record


@pytest.mark.parametrize("name", FORMS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_refused_by_name(name, data, tmp_path_factory):
    row, read, _ = FORMS[name]
    place = data.draw(st.sampled_from(places(row)))
    rows = [row, put(second(row), place, data.draw(JSON))]
    try:
        read(write(folder_of(name, tmp_path_factory, "malformed"), name, rows))
    except FactError as error:
        assert f"{name}.json, record 1, field '{place[0]}" in str(error)


@pytest.mark.parametrize("name", FORMS)
@settings(deadline=None, max_examples=15)
@given(content=st.text(max_size=30) | JSON.map(json.dumps) | st.binary(max_size=12))
def test_any_file_is_read_or_refused_by_name(name, content, tmp_path_factory):
    file = folder_of(name, tmp_path_factory, "any") / f"{name}.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(FactError, match=f"{name}.json"):
        FORMS[name][1](file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"zsre\.json: expected JSON, got something else at line 1, column 3"),
        ("[]", r"zsre\.json: expected at least one record"),
        ("[3]", r"zsre\.json, record 0: expected an object, got 3"),
        ('{"src": "x"}\n', r"zsre\.json, line 1, field 'subject': expected a non-empty text, got nothing"),
        (json.dumps([{**ZSRE, "src": "\ud83d"}]), r"record 0, field 'src': expected a non-empty text, got '\\ud83d'"),
        (json.dumps([{**ZSRE, "answers": [[1]]}]), r"record 0, field 'answers': expected a non-empty text, or a list"),
        (b'[\n{"src": "\xff"}]', r"zsre\.json: expected UTF-8 text, got 'utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000, r"zsre\.json: expected JSON, got brackets nested too deeply"),
        ('[{"a": 1' + "0" * 5000 + "}]", r"zsre\.json: expected JSON, got Exceeds the limit"),
    ],
)
def test_malformed_files_are_refused_with_file_place_and_field(tmp_path, content, message):
    file = tmp_path / "zsre.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FactError, match=message):
        zsre(file)


@pytest.mark.parametrize("form", ["array", "lines", "indented", "mark", "gz", "blank lines"])
def test_arrays_and_lines_with_marks_and_zipped_are_read_alike(tmp_path, form):
    rows = [ZSRE, {**ZSRE, "src": "Where is Peru, señor?"}]
    array, lines = json.dumps(rows), "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    content = {
        "array": array, "lines": lines, "indented": json.dumps(rows, indent=2), "mark": "\ufeff" + array, "gz": lines,
        "blank lines": "\n \n" + lines.replace("\n", "\n\u3000\t\n"),
    }[form].encode()  # fmt: skip
    file = tmp_path / "zsre.jsonl.gz"
    file.write_bytes(gzip.compress(content) if form == "gz" else content)
    assert [r.prompt for r in zsre_records(tmp_path)] == [row["src"] for row in rows]


def test_files_are_found_by_name_by_folder_and_cut(tmp_path):
    (tmp_path / "ZsRE").mkdir()
    for name in ("counterfact.first1000.json", "ZsRE/ZsRE-test.first300.json"):
        (tmp_path / name).write_text("[]")
    assert find(tmp_path, "nothing", "counterfact").name == "counterfact.first1000.json"
    assert find(tmp_path, "ZsRE-test") == find(tmp_path, "ZsRE") == find(tmp_path, "Zs*")
    with pytest.raises(
        FileNotFoundError, match=r"expected a file a.json or b.json in .*\['ZsRE-test', 'counterfact'\]"
    ):
        find(tmp_path, "a", "b")
    with pytest.raises(FactError, match=r"expected one file \*.json in .*, got 2; pass split"):
        find(tmp_path, "*")
    with pytest.raises(FileNotFoundError, match="no JSON file lies there"):
        find(tmp_path / "none", "a")


def test_a_limit_spreads_over_all_records():
    assert evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evenly([1, 2], 5) == evenly([1, 2], None) == [1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        evenly([1, 2], 0)

"""Reading benchmark files: whatever is malformed is refused with file, record and field."""

import json

import pytest

from timerome.evaluation.records import (
    DataError,
    answers,
    evenly,
    find_file,
    mapping,
    optional,
    read_records,
    text,
    texts,
)

CHECKS = {"q": text, "wrong": optional(texts), "inner": optional(mapping({"a": text, "b": answers}))}


def read(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(file, CHECKS)


@pytest.mark.parametrize("form", ["array", "lines"])
def test_arrays_and_lines_are_read_alike(tmp_path, form):
    rows = [{"q": "x", "other": 3}, {"q": "y", "wrong": ["a"], "inner": {"a": "z", "b": [["one", "two"], ["three"]]}}]
    found = read(tmp_path, json.dumps(rows) if form == "array" else "\n".join(map(json.dumps, rows)) + "\n")
    assert found[0] == {"q": "x", "wrong": None, "inner": None}
    assert found[1]["inner"]["b"] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"data\.json: expected JSON"),
        ("[]", r"data\.json: expected at least one record"),
        ('{"q": "x"}\n{"q": ', r"data\.json, line 2: expected one JSON object"),
        ('[{"q": "x"}, 3]', r"data\.json, record 1: expected an object, got 3"),
        ('[{"q": "x"}, {}]', r"data\.json, record 1, field 'q': expected a non-empty text, got nothing \(there is no"),
        ('[{"q": "\\ud83d"}]', r"data\.json, record 0, field 'q': expected a non-empty text, got"),
        ('[{"q": 7}]', r"data\.json, record 0, field 'q': expected a non-empty text, got 7"),
        ('[{"q": "x", "wrong": []}]', r"record 0, field 'wrong': expected a list of at least one"),
        ('[{"q": "x", "inner": "t"}]', r"record 0, field 'inner': expected an object with the fields a, b"),
        ('[{"q": "x", "inner": {"a": "t", "b": [[1]]}}]', r"record 0, field 'inner\.b': expected a non-empty text, or"),
        (b'[{"q": "\xff"}]', r"data\.json: expected UTF-8"),
    ],
)
def test_malformed_files_are_refused_with_file_record_and_field(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="data"):
        read_records(tmp_path / "data.json", CHECKS)


def test_cut_copies_and_files_in_folders_are_found(tmp_path):
    (tmp_path / "ZsRE").mkdir()
    for name in ("counterfact.first1000.json", "ZsRE/ZsRE-test.first300.json"):
        (tmp_path / name).write_text("[]")
    assert find_file(tmp_path, "nothing", "counterfact").name == "counterfact.first1000.json"
    assert find_file(tmp_path, "ZsRE-test").name == "ZsRE-test.first300.json"
    assert find_file(tmp_path, "absent") is None


def test_a_limit_spreads_over_all_records():
    assert evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evenly([1, 2], 5) == evenly([1, 2], None) == [1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        evenly([1, 2], 0)

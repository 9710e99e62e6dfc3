"""Whatever a benchmark file holds, its reader returns records or refuses it by file, record and field."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation import test_counterfact, test_knowedit, test_rwku, test_zsre
from timerome.evaluation.benchmarks.counterfact import Snippets, read_counterfact
from timerome.evaluation.benchmarks.knowedit import read_knowedit
from timerome.evaluation.benchmarks.rwku import read_rwku
from timerome.evaluation.benchmarks.tofu import read_tofu_file
from timerome.evaluation.benchmarks.zsre import read_zsre
from timerome.evaluation.records import DataError

TOFU = {"question": "q?", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c", "d"]}
SNIPPET = {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "x"}]}
READERS = {
    "tofu": (TOFU, lambda file: read_tofu_file(file, "forget01")),
    "counterfact": (test_counterfact.FULL, read_counterfact),
    "counterfact-flat": (test_counterfact.FLAT, read_counterfact),
    "attribute_snippets": (SNIPPET, Snippets),
    "zsre": (test_zsre.ROW, read_zsre),
    "knowedit": (test_knowedit.ROW, read_knowedit),
    **{name: (row, lambda file: read_rwku(file.parent)) for name, row in test_rwku.ROWS.items()},
}
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
    record = copy.deepcopy(record)
    outer = record
    for key in path[:-1]:
        outer = outer[key]
    outer[path[-1]] = value
    return record


@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_refused_by_name(name, data, tmp_path_factory):
    row, read = READERS[name]
    folder = tmp_path_factory.getbasetemp() / "malformed" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forget_level1.json").write_text(json.dumps([test_rwku.PROBE]))
    place = data.draw(st.sampled_from(places(row)))
    other = {**copy.deepcopy(row), **({"case_id": 8} if "case_id" in row else {})}
    file = folder / f"{name}.json"
    file.write_text(json.dumps([row, put(other, place, data.draw(JSON))]))
    try:
        read(file)
    except DataError as error:
        assert f"{name}.json, record 1, field '{place[0]}" in str(error)


@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=15)
@given(content=st.text(max_size=30) | JSON.map(json.dumps) | st.binary(max_size=12))
def test_any_file_is_read_or_refused_by_name(name, content, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "any" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forget_level1.json").write_text(json.dumps([test_rwku.PROBE]))
    file = folder / f"{name}.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=f"{name}.json"):
        READERS[name][1](file)

"""How well earlier edits hold after later ones."""

import pytest

import timerome as tr
from tests.evaluation.tiny_data import FACTS, edit, settings, write_data
from tests.tiny import planted
from timerome.evaluation import Absent
from timerome.evaluation.lifelong import counts, first_edits, measure_retention
from timerome.evaluation.run import run_benchmark


def sequential(backbone, facts, answers=("king", "river", "north", "south"), refused=()):
    """One edit after another; those that are refused never act."""
    memory = tr.EditMemory(backbone)
    for fact, answer in zip(facts, answers, strict=False):
        memory.replace(fact, answer, threshold=100.0 if fact.id in refused else None)
    return memory


def test_all_counts_or_some_and_always_the_last():
    assert counts(5, 9) == [2, 3, 4, 5]
    assert counts(400, 3)[-1] == 400 and len(counts(400, 3)) == 3
    assert counts(1, 3) == []


def test_retention_is_the_published_definition_on_a_memory_rebuilt_at_each_count():
    backbone = planted()
    memory = sequential(backbone, FACTS, refused=("tiny-1",))
    found = measure_retention(backbone, memory)
    rows = []
    for t in range(1, 5):
        with sequential(backbone, FACTS[:t], refused=("tiny-1",)).attached() as run:
            texts = tr.generate(backbone, [f.prompt for f in FACTS[:t]], canvas=3, config=tr.SamplerConfig(steps=3))
            assert "tiny-1" not in run.hits
        rows.append([float(text == e.says) for text, e in zip(texts, memory.edits, strict=False)])
    assert rows[1:] == [[1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]
    # For every t the mean success of edits 0..t-1 after edit t.
    published = [sum(row[:t]) / t for t, row in enumerate(rows) if t]
    assert [found[f"retention.replaced.after_{t}"].value for t in (2, 3, 4)] == published == [1.0, 0.5, 2 / 3]
    assert isinstance(found["retention.forgotten.after_2"], Absent)
    assert list(found["retention.replaced.after_3"].per_record) == ["tiny-0", "tiny-1"]
    assert len(memory) == 4


def test_forgetting_holds_where_the_old_answer_does_not_come_back():
    backbone = planted()

    def forgotten(threshold=None):
        memory = tr.EditMemory(backbone)
        for fact in FACTS[:3]:
            memory.forget(fact, answer="king", threshold=threshold)
        return measure_retention(backbone, memory, points=1)

    found = forgotten()
    assert [r.metric for r in found] == ["edits.retention.replaced.after_3", "edits.retention.forgotten.after_3"]
    assert found["retention.forgotten.after_3"].value == 1.0
    # What never acts leaves the answer where it was, so that it counts as lost.
    assert forgotten(100.0)["retention.forgotten.after_3"].value == 0.0


def test_first_edits_are_the_memory_as_it_was():
    backbone = planted()
    memory, two = sequential(backbone, FACTS[:3]), sequential(backbone, FACTS[:2])
    assert not first_edits(memory, 2).diff(two)
    assert first_edits(memory, 2).facts.ids == ("tiny-0", "tiny-1")


def test_a_benchmark_reports_it_when_asked(tmp_path):
    backbone, data = planted(), write_data("zsre", tmp_path)
    how = settings("zsre", retention=4)
    report = run_benchmark("zsre", data, backbone, out=tmp_path / "out", memory=edit(backbone), settings=how)
    before, after = ({r.metric: r for r in found} for found in report.conditions.values())
    assert list(before) == list(after)
    assert after["zsre.retention.forgotten.after_2"].n == 1
    assert "only the memory has" in before["zsre.retention.forgotten.after_2"].reason
    for name, memory in (("zsre", None), ("tofu", edit(backbone))):
        source = data if name == "zsre" else write_data("tofu", tmp_path)
        with pytest.raises(ValueError, match="retention needs CounterFact, zsRE or KnowEdit and a memory"):
            run_benchmark(
                name, source, backbone, out=tmp_path / "x", memory=memory, settings=settings(name, retention=4)
            )

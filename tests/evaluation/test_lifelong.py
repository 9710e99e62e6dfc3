"""How well earlier edits hold after later ones."""

from dataclasses import replace

import pytest

import timerome as tr
from tests.evaluation.tiny_data import FACTS, edit, settings, write_data
from tests.tiny import planted
from timerome.evaluation import Absent
from timerome.evaluation.lifelong import counts, first_edits, measure_retention
from timerome.evaluation.metrics.editing import previous_edit_retention
from timerome.evaluation.run import run_benchmark

BANK = tr.BankConfig(canvases=(None,))


def sequential(backbone, facts, *, margins=(8.0,) * 8, **more):
    """One edit after another, each with a margin of its own."""
    how = {"coordinate": tr.Coordinate(2), "bank": BANK, **more}
    memory = tr.EditMemory.build(backbone, facts[:1], margin=margins[0], **how)
    for fact, margin in zip(facts[1:], margins[1:], strict=False):
        memory.insert(fact, backbone=backbone, margin=margin, **how)
    return memory


def test_all_counts_or_some_and_always_the_last():
    assert counts(5, 9) == [2, 3, 4, 5]
    assert counts(400, 3)[-1] == 400 and len(counts(400, 3)) == 3
    assert counts(1, 3) == []


def test_retention_is_the_published_definition_on_a_memory_rebuilt_at_each_count():
    backbone = planted()
    # One token each: in this model only the first answer position knows whom it is about.
    wanted = [replace(f, new_object=g.object.split()[0]) for f, g in zip(FACTS, reversed(FACTS), strict=True)]
    how = {"estimator": "lens", "sparsity": 0.0, "margins": (20.0, 0.1, 20.0, 20.0)}  # the second is too weak
    memory = sequential(backbone, wanted, **how)
    found = measure_retention(backbone, memory)
    rows = []
    for t in range(1, 5):
        with sequential(backbone, wanted[:t], **how).attached(backbone):
            texts = tr.generate(backbone, [f.prompt for f in wanted[:t]], canvas=1, config=tr.SamplerConfig(steps=1))
        rows.append([float(text == f.new_object) for text, f in zip(texts, wanted, strict=False)])
    assert rows[1:] == [[1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]
    values = [found[f"retention.replaced.after_{t}"].value for t in (2, 3, 4)]
    assert values == previous_edit_retention(rows) == [1.0, 0.5, pytest.approx(2 / 3)]
    assert isinstance(found["retention.forgotten.after_2"], Absent)
    assert list(found["retention.replaced.after_3"].per_record) == ["tiny-0", "tiny-1"]
    assert len(memory.history) == 4


def test_forgetting_holds_where_the_old_answer_does_not_come_back():
    backbone = planted()
    memory = sequential(backbone, FACTS[:3], estimator="null")
    found = measure_retention(backbone, memory, points=1)
    assert [r.metric for r in found] == ["edits.retention.replaced.after_3", "edits.retention.forgotten.after_3"]
    assert found["retention.forgotten.after_3"].value == 1.0
    # What was never edited comes out, so that it would count as lost.
    weak = sequential(backbone, FACTS[:3], estimator="null", alpha=1e-6)
    assert measure_retention(backbone, weak)["retention.forgotten.after_3"].value == 0.0


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

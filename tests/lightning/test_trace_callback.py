"""TraceCallback: it passes its arguments on, once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import timerome as tr
from tests.lightning.loops import TheirLoop, count_hooks, loader, shared_memory, trainer
from tests.tiny import planted, tiny_facts
from timerome.lightning.trace_callback import shard_of
from timerome.tracing import Shard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

CONFIG = tr.TraceConfig(modules=["attn"], roles=["object"], corruption="mask", sampler=tr.SamplerConfig(steps=3))


@pytest.fixture(scope="module")
def backbone() -> tr.Backbone:
    return planted(layer=1)


def run(stage: str, backbone: tr.Backbone, *callbacks: object) -> None:
    more = {} if stage == "predict" else {"verbose": False}
    getattr(trainer(*callbacks), stage)(TheirLoop(backbone), loader(backbone), **more)


@pytest.mark.parametrize("stage", ["predict", "test", "validate"])
def test_is_the_tracers_result_and_saved(backbone: tr.Backbone, stage: str, tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "trace.safetensors", tmp_path / "trace.jsonl"
    trace = tr.TraceCallback(tiny_facts(2), CONFIG, path=path, checkpoint=checkpoint, backbone=backbone)
    assert trace.result is None
    run(stage, backbone, trace)
    wanted = tr.CausalTracer(backbone, CONFIG).trace(tiny_facts(2))
    assert trace.result is not None
    np.testing.assert_array_equal(trace.result.tie, wanted.tie)
    np.testing.assert_array_equal(tr.TraceResult.load(path).tie, wanted.tie)
    assert trace.result.best().site == tr.Site(1, "attn")
    assert checkpoint.exists()
    assert count_hooks(backbone.model) == 0


class FakeTracer:
    made: list[tuple[tr.Backbone, tr.TraceConfig]] = []

    def __init__(self, backbone: tr.Backbone, config: tr.TraceConfig) -> None:
        self.made.append((backbone, config))

    def trace(self, facts: list[tr.Fact], *, checkpoint: object = None, shard: object = None) -> object:
        self.seen = (list(facts), checkpoint)
        return self


def test_traces_once(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTracer, "made", [])
    monkeypatch.setattr("timerome.tracing.CausalTracer", FakeTracer)
    trace = tr.TraceCallback(iter(tiny_facts(2)), CONFIG, checkpoint="here", backbone=backbone)
    for stage in ("predict", "test", "validate"):
        run(stage, backbone, trace)
    assert FakeTracer.made == [(backbone, CONFIG)]
    assert trace.result.seen == (tiny_facts(2), "here")


def test_order_of_callbacks_decides_what_is_traced(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    class CountHooks(FakeTracer):
        def trace(self, facts: list[tr.Fact], *, checkpoint: object = None, shard: object = None) -> object:
            return count_hooks(backbone.model)

    monkeypatch.setattr("timerome.tracing.CausalTracer", CountHooks)
    edit = tr.EditCallback(shared_memory(backbone), backbone=backbone)
    before, after = (tr.TraceCallback(tiny_facts(1), backbone=backbone) for _ in range(2))
    run("predict", backbone, before, edit, after)
    assert (before.result, after.result) == (0, 3)


def test_an_error_in_the_trace_reaches_the_user_and_leaves_no_hook(backbone: tr.Backbone) -> None:
    edit = tr.EditCallback(shared_memory(backbone), backbone=backbone)
    nowhere = tr.TraceConfig(sites=[tr.Site(99)])
    with pytest.raises(ValueError, match="layer 99"):
        run("predict", backbone, edit, tr.TraceCallback(tiny_facts(1), nowhere, backbone=backbone))
    assert count_hooks(backbone.model) == 0


def test_sanity_check_is_left_out(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tr.TraceCallback(tiny_facts(1))
    loop = trainer(trace)
    monkeypatch.setattr(type(loop), "sanity_checking", True)
    trace.on_validation_start(loop, TheirLoop(backbone))
    assert trace.result is None


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """Two gloo processes, made by a Trainer with ``ddp``; each has the whole result, and each kept its own share."""
    whole = tr.CausalTracer(planted(layer=1), CONFIG).trace(tiny_facts(5))
    run = subprocess.run(
        [sys.executable, "-m", "tests.lightning.trace_in_two", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for rank in (0, 1):
        found = tr.TraceResult.load(tmp_path / f"of_rank_{rank}.safetensors")
        assert found.facts == whole.facts and found.summary() == whole.summary()
        np.testing.assert_array_equal(found.permuted, whole.permuted)
        for score, measured in whole.measured.items():
            for name, array in measured.items():
                np.testing.assert_array_equal(found.measured[score][name], array)
    kept = [len((tmp_path / name).read_text().splitlines()) - 1 for name in ("t.jsonl", "t.jsonl.1")]
    assert sorted(kept) == [2, 3]
    # One process goes on from what two left behind.
    again = tr.CausalTracer(planted(layer=1), CONFIG).trace(tiny_facts(5), checkpoint=tmp_path / "t.jsonl")
    assert again.summary() == whole.summary()


def test_a_sharded_model_is_traced_by_every_process() -> None:
    class Sharded:
        world_size, global_rank, strategy = 4, 2, object()

    assert shard_of(Sharded()) == Shard()

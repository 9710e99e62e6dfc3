"""EditCallback in loops that know nothing of it."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader

import timerome as tr
from tests.lightning.loops import TheirLoop, count_hooks, gated_memory, loader, masked_rows, shared_memory, trainer
from tests.tiny import tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import encode
from timerome.lightning import fact_loader
from timerome.memory import EditFileError, MemoryMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module")
def memory(backbone: tr.Backbone) -> tr.EditMemory:
    return gated_memory(backbone)


def run(stage: str, *callbacks: tr.EditCallback, module: LightningModule, data: object) -> object:
    return getattr(trainer(*callbacks), stage)(module, data, **({} if stage == "predict" else {"verbose": False}))


@pytest.mark.parametrize("stage", ["predict", "test", "validate"])
def test_hooks_are_there_during_the_loop_and_gone_after(
    backbone: tr.Backbone, memory: tr.EditMemory, stage: str
) -> None:
    module, digest = TheirLoop(backbone), backbone.state_digest()
    assert count_hooks(backbone.model) == 0
    run(stage, tr.EditCallback(memory), module=module, data=loader(backbone))
    # Every batch of two rows saw the hooks on the site and the embedding; addressing them ran the model again below.
    assert module.hooks == [3, 3]
    assert count_hooks(backbone.model) == 0
    assert backbone.state_digest() == digest
    assert not backbone.model.training


def test_edits_its_own_fact_and_no_other_row(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    module = TheirLoop(backbone)
    before = torch.cat(run("predict", module=module, data=loader(backbone, 8)))
    after = torch.cat(run("predict", tr.EditCallback(memory), module=module, data=loader(backbone, 8)))
    again = torch.cat(run("predict", module=module, data=loader(backbone, 8)))
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[4:], after[4:])  # the facts its gate was calibrated on
    assert torch.equal(before, again)


def test_equals_the_context_manager(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    [after] = run("predict", tr.EditCallback(memory), module=TheirLoop(backbone), data=loader(backbone, batch_size=4))
    with memory.attached(backbone), torch.inference_mode():
        assert torch.equal(after, backbone.forward(masked_rows(backbone)))


def test_two_memories_at_once(backbone: tr.Backbone) -> None:
    first, second = shared_memory(backbone), gated_memory(backbone, slice(1, 2))
    one, two, alone = tr.EditCallback(first), tr.EditCallback(second), tr.EditCallback(second)
    run("predict", alone, module=TheirLoop(backbone), data=loader(backbone, batch_size=4))
    module = TheirLoop(backbone)
    [both] = run("predict", one, two, module=module, data=loader(backbone, batch_size=4))
    assert module.hooks == [6]
    assert one.hits == {"*": 4}  # not the second one's forwards that address rows
    assert two.hits == alone.hits != {}  # rows are addressed by what the model says without any edit
    with first.attached(backbone), second.attached(backbone), torch.inference_mode():
        assert torch.equal(both, backbone.forward(masked_rows(backbone)))
    assert one.state_key != two.state_key == alone.state_key
    assert second.digest() in two.state_key


def test_counts_and_logs_rows_by_fact_and_step(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    edit = tr.EditCallback(memory, name="mine")
    [metrics] = run("test", edit, module=TheirLoop(backbone), data=loader(backbone, 8))
    assert edit.hits == {"tiny-0": 1}
    assert edit.hits_by_step == {0: 1}
    logged = {name: value for name, value in metrics.items() if name.startswith("edit/")}
    assert logged == {"edit/mine/rows": 1, "edit/mine/fact/tiny-0": 1, "edit/mine/step/0": 1}
    # The next run's numbers are its own; the counters go on.
    [metrics] = run("validate", edit, module=TheirLoop(backbone), data=loader(backbone, 8))
    assert metrics["edit/mine/rows"] == 1
    assert edit.hits == {"tiny-0": 2}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_loop_leaves_no_hook(
    backbone: tr.Backbone, memory: tr.EditMemory, error: type[BaseException]
) -> None:
    edit, digest = tr.EditCallback(memory), backbone.state_digest()
    module = TheirLoop(backbone, fail_at=1, error=error)
    interrupts = signal.getsignal(signal.SIGINT)
    try:
        # Lightning turns a keyboard interrupt into an exit.
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            run("predict", edit, module=module, data=loader(backbone))
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert module.hooks == [3, 3]
    assert count_hooks(backbone.model) == 0
    assert not edit.attached
    assert backbone.state_digest() == digest
    assert edit.hits == {"tiny-0": 1}


def test_counters_survive_a_crash(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    crashed = tr.EditCallback(memory)
    with pytest.raises(RuntimeError, match="from the loop"):
        run("predict", crashed, module=TheirLoop(backbone, fail_at=1), data=loader(backbone))
    resumed = tr.EditCallback(memory)
    assert resumed.state_key == crashed.state_key
    resumed.load_state_dict(crashed.state_dict())
    run("predict", resumed, module=TheirLoop(backbone), data=loader(backbone))
    assert resumed.hits == {"tiny-0": 2}
    assert resumed.state_dict() == {"hits": {"tiny-0": 2}, "hits_by_step": {0: 2}}


def test_counters_are_in_a_checkpoint(backbone: tr.Backbone, memory: tr.EditMemory, tmp_path: Path) -> None:
    edit = tr.EditCallback(memory)
    loop = trainer(edit)
    loop.test(TheirLoop(backbone), loader(backbone), verbose=False)
    loop.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)["callbacks"]
    assert saved[edit.state_key] == edit.state_dict() != {}


def test_reads_its_file_in_setup(backbone: tr.Backbone, memory: tr.EditMemory, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit = tr.EditCallback(path)  # not there yet
    memory.save(path)
    [from_file] = run("predict", edit, module=TheirLoop(backbone), data=loader(backbone, batch_size=4))
    [given] = run("predict", tr.EditCallback(memory), module=TheirLoop(backbone), data=loader(backbone, batch_size=4))
    assert torch.equal(from_file, given)
    other = tr.EditCallback(str(tmp_path / "none.safetensors"))
    assert other.state_key != edit.state_key
    with pytest.raises(EditFileError, match=r"none\.safetensors"):
        run("predict", other, module=TheirLoop(backbone), data=loader(backbone))


def test_memory_of_another_model_is_refused(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    other = tiny_llada(seed=7)
    with pytest.raises(MemoryMismatchError, match=f"{memory.fingerprint}.*{other.fingerprint()}"):
        run("predict", tr.EditCallback(memory), module=TheirLoop(other), data=loader(other))
    assert count_hooks(other.model) == 0


def test_weights_from_a_checkpoint_are_those_that_are_checked(
    backbone: tr.Backbone, memory: tr.EditMemory, tmp_path: Path
) -> None:
    saver = trainer()
    saver.test(TheirLoop(backbone), loader(backbone), verbose=False)
    saver.save_checkpoint(tmp_path / "good.ckpt")
    make = tiny_llada if backbone.name == "tiny-llada" else tiny_dream
    module = TheirLoop(make(seed=7))  # its own weights are others
    edit = tr.EditCallback(memory)
    trainer(edit).predict(module, loader(backbone), ckpt_path=tmp_path / "good.ckpt", weights_only=False)
    assert edit.hits == {"tiny-0": 1}


def test_fit_is_refused(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    digest = backbone.state_digest()
    with pytest.raises(RuntimeError, match="inference time.*train around it"):
        trainer(tr.EditCallback(memory), max_epochs=1).fit(TheirLoop(backbone), loader(backbone))
    assert backbone.state_digest() == digest


def test_wrong_kind_of_memory() -> None:
    with pytest.raises(TypeError, match="EditMemory or a path, got list"):
        tr.EditCallback(tiny_facts(1))  # type: ignore[arg-type]


def test_each_row_has_the_edits_that_its_batch_names(backbone: tr.Backbone) -> None:
    memory = gated_memory(backbone, slice(0, 2))
    rows = masked_rows(backbone, 2)

    class Loop(TheirLoop):
        def predict_step(self, batch: dict[str, object], batch_idx: int = 0) -> torch.Tensor:
            return super().predict_step(batch["ids"], batch_idx)  # type: ignore[arg-type]

    def predict(**more: object) -> torch.Tensor:
        data = [{"ids": rows, "edits": [["tiny-1"], ["tiny-1"]]}, {"ids": rows, "edits": [[], None]}]
        edit = tr.EditCallback(memory, **more)  # type: ignore[arg-type]
        found = run("predict", edit, module=Loop(backbone), data=DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        hits.append(dict(edit.hits))
        return torch.stack(found)  # type: ignore[arg-type]

    hits: list[dict[str, int]] = []
    everything, by_column = predict(), predict(select="edits")
    by_function = predict(select=lambda batch: batch["edits"])
    [plain] = run("predict", module=TheirLoop(backbone), data=DataLoader([rows], batch_size=None))  # type: ignore
    assert torch.equal(by_column, by_function)
    assert torch.equal(by_column[:, 1], everything[:, 1])  # tiny-1's own row may have it, in both batches
    assert torch.equal(by_column[:, 0], plain[None, 0].expand_as(by_column[:, 0]))
    assert hits == [{"tiny-0": 2, "tiny-1": 2}, {"tiny-1": 2}, {"tiny-1": 2}]
    with pytest.raises(KeyError, match="column 'edit'"):
        predict(select="edit")
    with pytest.raises(KeyError, match="no such edit"):
        predict(select=lambda batch: [["nobody"], None])
    with pytest.raises(ValueError, match="named for 1 rows, but the batch has 2"):
        predict(select=lambda batch: [["tiny-1"]])
    with pytest.raises(ValueError, match="named for 4 rows, but the batch has 2"):
        predict(select=lambda batch: batch["edits"] * 2)
    for wrong in ("tiny-1", {"tiny-1": None}, 3):
        with pytest.raises(TypeError, match="an entry for each row, got"):
            predict(select=lambda batch, wrong=wrong: wrong)
    assert count_hooks(backbone.model) == 0


class OfColumns(TheirLoop):
    """Its batches have columns; the first is the ids."""

    def predict_step(self, batch: object, batch_idx: int = 0) -> torch.Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        return super().predict_step(next(iter(parts)), batch_idx)  # type: ignore[call-overload]

    test_step = predict_step  # type: ignore[assignment]


@pytest.mark.parametrize("stage", ["predict", "test"])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([["tiny-1"], ["tiny-0"]], "default_collate turns"),  # one entry for two rows, so that each would have both
        ([["tiny-1", "tiny-0"]] * 2, "default_collate turns"),  # as many entries as rows, and still others' columns
        ([[], []], "named for 0 rows, but the batch has 2"),
    ],
)
def test_columns_that_the_loader_turns_are_refused(
    backbone: tr.Backbone, stage: str, by_name: bool, named: list[list[str]], message: str
) -> None:
    memory, rows = gated_memory(backbone, slice(0, 2)), masked_rows(backbone, 2)
    data = [{"ids": row, "edits": ids} if by_name else (row, ids) for row, ids in zip(rows, named, strict=True)]
    edit = tr.EditCallback(memory, select="edits" if by_name else lambda batch: batch[1])
    with pytest.raises(ValueError, match=message):
        run(stage, edit, module=OfColumns(backbone), data=DataLoader(data, batch_size=2))  # type: ignore[arg-type]
    assert count_hooks(backbone.model) == 0


def test_columns_that_the_loader_leaves(backbone: tr.Backbone) -> None:
    """One id a row, as a string; or lists, by a collate_fn that keeps them."""
    memory, rows = gated_memory(backbone, slice(0, 2)), masked_rows(backbone, 2)

    def hits(named: list[object], **more: object) -> dict[str, int]:
        data = [{"ids": row, "edits": ids} for row, ids in zip(rows, named, strict=True)]
        edit = tr.EditCallback(memory, select="edits")
        run("predict", edit, module=OfColumns(backbone), data=DataLoader(data, batch_size=2, **more))  # type: ignore
        return dict(edit.hits)

    def keep(items: list[dict[str, object]]) -> dict[str, object]:
        return {"ids": torch.stack([i["ids"] for i in items]), "edits": [i["edits"] for i in items]}  # type: ignore

    assert hits(["tiny-1", "tiny-1"]) == {"tiny-1": 1}
    assert hits(["tiny-0", "tiny-1"]) == {"tiny-0": 1, "tiny-1": 1}
    assert hits([["tiny-0"], []], collate_fn=keep) == {"tiny-0": 1}
    assert hits([("tiny-1",), ["tiny-0", "tiny-1"]], collate_fn=keep) == {"tiny-1": 1}


def test_edits_come_and_go_between_batches(backbone: tr.Backbone) -> None:
    memory = gated_memory(backbone)

    class Change(Callback):
        def on_predict_batch_end(self, *args: object) -> None:
            if memory.edits:
                memory.undo(*[edit.id for edit in memory.edits])

    data = [masked_rows(backbone, 2)] * 2
    module = TheirLoop(backbone)
    edit = tr.EditCallback(memory)
    loader_of = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    first, second = run("predict", edit, Change(), module=module, data=loader_of)  # type: ignore[misc]
    [plain, _] = run("predict", module=TheirLoop(backbone), data=loader_of)  # type: ignore[misc]
    assert not torch.equal(first, plain)
    assert torch.equal(second, plain)
    assert module.hooks == [3, 0]  # nothing is left on the model when no edit is there
    assert edit.hits == {"tiny-0": 1}


@pytest.mark.parametrize("stage", ["predict", "test"])
def test_select_finds_the_rows_of_prompts_of_mixed_lengths(backbone: tr.Backbone, stage: str) -> None:
    """Our own functions batch by length; edits are named for the rows as the user gave them."""
    facts = [
        replace(fact, id=f"{fact.id}-{i}", prompt=f"{'the old ' * i}{fact.prompt}")
        for i, fact in ((2, tiny_facts(2)[0]), (0, tiny_facts(2)[1]), (1, tiny_facts(2)[0]), (0, tiny_facts(2)[0]))
    ]
    memory = shared_memory(backbone, facts[:2])
    sets = [[facts[0].id], [], None, [facts[1].id]]

    def run_on(batch: list[tr.Fact], chosen: list[list[str] | None] | None) -> object:
        module = tr.EditModule(backbone, canvas=3, config=tr.SamplerConfig(steps=3), samples=4)
        edit = tr.EditCallback(memory, select=lambda _: chosen)
        return run(stage, edit, module=module, data=fact_loader(batch, batch_size=4))

    together = run_on(facts, sets)
    apart = [run_on([fact], [own]) for fact, own in zip(facts, sets, strict=True)]
    unedited = [run_on([fact], [[]]) for fact in facts]
    assert apart != unedited
    if stage == "predict":
        assert together == [[text for [[text]] in apart]]
    else:
        for name in ("test/log_prob", "test/exact", "test/rouge_recall"):
            mean = sum(metrics[name] for [metrics] in apart) / len(apart)
            assert together[0][name] == pytest.approx(mean, rel=1e-5)  # type: ignore[index]


def test_states_that_are_shared_belong_to_one_fact(backbone: tr.Backbone) -> None:
    """Two facts with one prompt and one canvas, of which one may be edited: their equal states are run twice."""
    fact = tiny_facts(1)[0]
    twins = [fact, replace(fact, id="twin", object="old north king")]
    memory, sequences = shared_memory(backbone, [fact]), [encode(backbone, f) for f in twins]
    attachment = memory.attached(backbone)
    attachment.select([[fact.id], []])
    with attachment:
        found = tr.log_likelihood(backbone, sequences, estimator="onestep").log_prob
    plain = tr.log_likelihood(backbone, sequences, estimator="onestep").log_prob
    with memory.attached(backbone):
        edited = tr.log_likelihood(backbone, sequences, estimator="onestep").log_prob
    assert found.tolist() == pytest.approx([float(edited[0]), float(plain[1])], rel=1e-5)
    assert not torch.allclose(edited, plain)

"""EditModule: answers, measures, refuses to be trained, and leaves the model as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import timerome as tr
from tests.lightning.loops import count_hooks, gated_memory, shared_memory, trainer
from tests.tiny import decoded_facts, planted, tiny_dream, tiny_facts, tiny_llada
from timerome.diffusion import encode, generate, log_likelihood
from timerome.lightning import fact_loader
from timerome.memory import MemoryMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SAMPLER = tr.SamplerConfig(steps=3)


@pytest.fixture(params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def module_of(backbone: tr.Backbone, memory: tr.EditMemory | Path | None = None, **more: object) -> tr.EditModule:
    return tr.EditModule(backbone, memory, **{"canvas": 3, "config": SAMPLER, "samples": 4, **more})


def test_predict_takes_prompts_or_facts(backbone: tr.Backbone) -> None:
    facts = tiny_facts(5)
    wanted = generate(backbone, [fact.prompt for fact in facts], canvas=3, config=SAMPLER)
    module = module_of(backbone)
    from_facts = trainer().predict(module, fact_loader(facts, batch_size=2))
    from_prompts = trainer().predict(module, DataLoader([fact.prompt for fact in facts], batch_size=5))
    assert [len(batch) for batch in from_facts] == [2, 2, 1]
    assert sum(from_facts, []) == from_prompts[0] == wanted


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_measures_are_means_over_facts(backbone: tr.Backbone, stage: str) -> None:
    facts = [*decoded_facts(backbone, 2), *tiny_facts(3)[2:]]  # two that it knows, one that it does not
    [metrics] = getattr(trainer(), stage)(module_of(backbone), fact_loader(facts, 2), verbose=False)
    likelihood = log_likelihood(backbone, [encode(backbone, fact) for fact in facts], samples=4)
    assert metrics[f"{stage}/log_prob"] == pytest.approx(float(likelihood.log_prob.mean()), rel=1e-5)
    assert metrics[f"{stage}/exact"] == pytest.approx(2 / 3)
    assert 2 / 3 <= metrics[f"{stage}/rouge_recall"] < 1
    assert set(metrics) == {f"{stage}/{name}" for name in ("log_prob", "exact", "rouge_recall")}


def test_memory_acts_during_steps_and_only_then(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, digest = shared_memory(backbone), backbone.state_digest()
    flags = [p.requires_grad for p in backbone.model.parameters()]
    facts, between, inside = tiny_facts(3), [], []

    class Between(Callback):
        def on_predict_batch_start(self, *_: object) -> None:
            between.append(count_hooks(backbone.model))

        on_predict_batch_end = on_predict_batch_start

    def spy(*args: object, **more: object) -> list[str]:
        inside.append(count_hooks(backbone.model))
        return generate(*args, **more)

    monkeypatch.setattr("timerome.lightning.edit_module.generate", spy)
    module, loop = module_of(backbone, memory), trainer(Between())
    texts = sum(loop.predict(module, fact_loader(facts)), [])
    with memory.attached(backbone):
        assert texts == generate(backbone, [f.prompt for f in facts], canvas=3, config=SAMPLER)
        edited = log_likelihood(backbone, [encode(backbone, f) for f in facts], samples=4).log_prob.mean()
    plain = log_likelihood(backbone, [encode(backbone, f) for f in facts], samples=4).log_prob.mean()
    [metrics] = loop.test(module, fact_loader(facts, 2), verbose=False)
    assert metrics["test/log_prob"] == pytest.approx(float(edited), rel=1e-5)
    assert abs(edited - plain) > 0.1
    assert (between, inside) == ([0, 0], [3])
    assert metrics["test/edited_rows"] == 4 * 3 + 3 * 3  # mask draws and denoising steps, times facts
    assert count_hooks(backbone.model) == 0
    assert backbone.state_digest() == digest
    assert [p.requires_grad for p in backbone.model.parameters()] == flags
    assert not backbone.model.training


def test_steps_work_without_a_trainer(backbone: tr.Backbone, tmp_path: Path) -> None:
    memory, facts = gated_memory(backbone), tiny_facts(4)
    memory.save(tmp_path / "edit.safetensors")
    module = module_of(backbone, tmp_path / "edit.safetensors")
    with memory.attached(backbone):
        wanted = module_of(backbone).predict_step(facts)
    assert module.predict_step([fact.prompt for fact in facts]) == wanted != module_of(backbone).predict_step(facts)
    assert module.test_step(facts[:1])["test/log_prob"] < module_of(backbone).test_step(facts[:1])["test/log_prob"]


def test_one_trainer_before_and_after(backbone: tr.Backbone) -> None:
    """The memory of one module does not stay with the Trainer, nor does it push out callbacks of the user's."""
    loop, facts = trainer(tr.EditCallback(shared_memory(backbone, slice(2, 3)))), fact_loader(tiny_facts(2))
    before = loop.test(module_of(backbone), facts, verbose=False)
    edited = loop.test(module_of(backbone, shared_memory(backbone)), facts, verbose=False)
    after = loop.test(module_of(backbone), facts, verbose=False)
    assert before == after != edited
    assert edited[0]["edit/" + loop.callbacks[0]._label + "/rows"] > 0


@pytest.mark.parametrize("data", [True, False])
def test_fit_is_refused_before_anything_else(
    backbone: tr.Backbone, data: bool, recwarn: pytest.WarningsRecorder
) -> None:
    digest = backbone.state_digest()
    with pytest.raises(RuntimeError, match=r"nothing to fit.*no optimizer.*EditMemory\.build"):
        trainer(max_epochs=1).fit(module_of(backbone), *([fact_loader(tiny_facts(1))] if data else []))
    assert backbone.state_digest() == digest
    assert not [w for w in recwarn if "val_dataloader" in str(w.message)]
    assert module_of(backbone).configure_optimizers() is None


def test_an_error_in_a_step_leaves_no_hook(backbone: tr.Backbone) -> None:
    module, digest = module_of(backbone, shared_memory(backbone)), backbone.state_digest()
    with pytest.raises(ValueError, match="at least one token"):
        trainer().predict(module, DataLoader(["the capital", " "], batch_size=1))
    assert count_hooks(backbone.model) == 0
    assert backbone.state_digest() == digest
    assert trainer().predict(module, DataLoader(["the capital"]))  # and can be used again


def test_memory_of_another_model(backbone: tr.Backbone, tmp_path: Path) -> None:
    memory, other = shared_memory(backbone), tiny_llada(seed=3)
    with pytest.raises(MemoryMismatchError, match=other.fingerprint()):
        trainer().predict(module_of(other, memory), fact_loader(tiny_facts(1)))
    memory.save(tmp_path / "edit.safetensors")
    with pytest.raises(MemoryMismatchError, match=other.fingerprint()):
        module_of(other, tmp_path / "edit.safetensors")
    assert count_hooks(other.model) == 0


def test_a_memory_may_be_attached_after_weights_came_from_a_checkpoint(tmp_path: Path) -> None:
    good = tiny_llada()
    saver = trainer()
    saver.predict(module_of(good), fact_loader(tiny_facts(1)))
    saver.save_checkpoint(tmp_path / "good.ckpt")
    module = module_of(tiny_llada(seed=3), shared_memory(good))
    texts = trainer().predict(module, fact_loader(tiny_facts(2)), ckpt_path=tmp_path / "good.ckpt", weights_only=False)
    assert texts == trainer().predict(module_of(good, shared_memory(good)), fact_loader(tiny_facts(2)))


def test_weights_are_checked_again_in_each_run() -> None:
    backbone = tiny_llada()
    module = module_of(backbone, shared_memory(backbone))
    trainer().predict(module, fact_loader(tiny_facts(1)))
    with torch.no_grad():
        next(backbone.model.parameters()).view(-1)[0] += 1
    with pytest.raises(MemoryMismatchError):
        trainer().predict(module, fact_loader(tiny_facts(1)))


@pytest.mark.parametrize(
    ("batch", "got"),
    [("text", "str"), ([1, 2], "list of int"), (torch.zeros(1, 2), "Tensor"), ([["a"]], "list of list")],
)
def test_wrong_batches(batch: object, got: str) -> None:
    module = module_of(planted())
    with pytest.raises(TypeError, match=f"prompts or of facts, got {got}"):
        module.predict_step(batch)
    with pytest.raises(TypeError, match=r"list of facts, got"):
        module.test_step(batch)


def test_wrong_backbone() -> None:
    with pytest.raises(TypeError, match="expected a Backbone, got LLaDAModelLM"):
        tr.EditModule(planted().model)


def test_planted_facts_are_known_and_forgotten() -> None:
    backbone = planted()
    memory = gated_memory(backbone, slice(0, 2))
    [knows] = trainer().test(module_of(backbone), fact_loader(tiny_facts(8)), verbose=False)
    assert knows["test/exact"] == 1
    [forgot] = trainer().test(module_of(backbone, memory), fact_loader(tiny_facts(2)), verbose=False)
    [kept] = trainer().test(module_of(backbone, memory), fact_loader(tiny_facts(8)[2:]), verbose=False)
    assert forgot["test/exact"] == 0
    assert kept["test/exact"] == 1
    assert math.isclose(kept["test/edited_rows"], 0)

"""A callback finds the model in modules that nobody here wrote, says where, and asks where it cannot know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import timerome as tr
from tests.lightning.loops import count_hooks, gated_memory, loader, trainer
from tests.tiny import DreamModel, LLaDAModelLM, TinyTokenizer, tiny_dream, tiny_facts, tiny_llada
from timerome.backbones import UnknownArchitectureError
from timerome.lightning.finding import find_backbone
from timerome.memory import MemoryMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Theirs(LightningModule):
    """What ``put`` makes of it; ``get`` finds the model again for its steps."""

    def __init__(self, put: Callable[[Any], None], get: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        put(self)
        self._get = get

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._get(self)(batch).logits


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Any:
        return self.inner(ids)


class Pipeline:
    """A plain object that is called, as pipelines are."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.parts = {"model": model}
        self.tokenizer = tokenizer

    def __call__(self, ids: Tensor) -> Any:
        return self.parts["model"](ids)


def setting(**attributes: Any) -> Callable[[Any], None]:
    def put(module: Any) -> None:
        for name, value in attributes.items():
            setattr(module, name, value)

    return put


def holding(**attributes: Any) -> Theirs:
    return Theirs(setting(**attributes), lambda module: next(iter(attributes.values())))


PLACES: dict[str, Callable[[nn.Module], tuple[Any, str]]] = {
    "model": lambda model: (holding(model=model), "`model`"),
    "m": lambda model: (holding(m=model), "`m`"),
    "wrapped": lambda model: (holding(net=Wrapper(Wrapper(model))), "`net.inner.inner`"),
    "in_a_list_module": lambda model: (
        Theirs(setting(nets=nn.ModuleList([model])), lambda module: module.nets[0]),
        "`nets.0`",
    ),
    "unregistered": lambda model: (Theirs(setting(hidden=[model]), lambda module: module.hidden[0]), "`hidden[0]`"),
    "pipeline": lambda model: (holding(pipe=Pipeline(model)), "`pipe.parts['model']`"),
    "two_names": lambda model: (holding(first=model, second=model), "`first`"),
}


def predicted(module: LightningModule, backbone: tr.Backbone, *callbacks: Any) -> Tensor:
    return torch.cat(trainer(*callbacks).predict(module, loader(backbone)))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


@pytest.fixture(scope="module")
def memory(backbone: tr.Backbone) -> tr.EditMemory:
    return gated_memory(backbone)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("timerome.lightning.edit_callback.rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize("place", PLACES)
def test_a_plain_model_without_a_tokenizer_is_found_edited_and_named(
    backbone: tr.Backbone, memory: tr.EditMemory, said: list[str], place: str
) -> None:
    module, where = PLACES[place](backbone.model)
    plain, callback = predicted(module, backbone), tr.EditCallback(memory)
    edited = predicted(module, backbone, callback)
    name, record = type(backbone.model).__name__, backbone.architecture.name
    assert said == [f"EditCallback: edits act on {where} ({name} as {record}), 1 edit"]
    assert dict(callback.hits) == {"tiny-0": 1}
    assert not torch.allclose(edited[0], plain[0])
    assert torch.equal(edited[1:], plain[1:])
    assert count_hooks(backbone.model) == 0


def test_from_a_file_too(backbone: tr.Backbone, memory: tr.EditMemory, tmp_path: Any) -> None:
    memory.save(tmp_path / "edits.safetensors")
    callback = tr.EditCallback(tmp_path / "edits.safetensors")
    predicted(holding(m=backbone.model), backbone, callback)
    assert dict(callback.hits) == {"tiny-0": 1}


def test_a_module_that_is_the_model_itself(said: list[str]) -> None:
    class LLaDALoop(LightningModule):
        def __init__(self, theirs: LLaDAModelLM) -> None:
            super().__init__()
            self.config, self.model = theirs.config, theirs.model

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return LLaDAModelLM.forward(self, input_ids)  # type: ignore[arg-type]

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).logits

    LLaDALoop.__name__ = "LLaDAModelLM"
    module = LLaDALoop(tiny_llada().model)  # type: ignore[arg-type]
    own = tr.wrap(module, TinyTokenizer())
    callback = tr.EditCallback(gated_memory(own))
    predicted(module, own, callback)
    assert said == ["EditCallback: edits act on the module itself (LLaDAModelLM as llada), 1 edit"]
    assert dict(callback.hits) == {"tiny-0": 1}


def test_what_is_given_comes_first_and_a_backbone_before_a_model(backbone: tr.Backbone, said: list[str]) -> None:
    other, third = tiny_llada(seed=5), tiny_llada(seed=6)
    module = holding(model=third.model, deep=Pipeline(nn.Identity(), other))
    assert find_backbone(module, backbone).backbone is backbone
    assert str(find_backbone(module, backbone)).startswith("the backbone given (")
    assert str(find_backbone(module, third)) == "`model` (LLaDAModelLM as llada)"
    found = find_backbone(module, fingerprint=third.fingerprint())
    assert found.backbone is other
    assert found.where == "deep.tokenizer"


def test_a_backbone_that_is_a_property(backbone: tr.Backbone) -> None:
    class Property(Theirs):
        backbone = property(lambda self: backbone)

    assert find_backbone(Property(setting(), lambda module: module)).backbone is backbone


def test_of_two_backbones_the_one_that_the_memory_was_made_on(backbone: tr.Backbone) -> None:
    other = tiny_llada(seed=5)
    module = holding(teacher=other, student=backbone)
    assert find_backbone(module, fingerprint=backbone.fingerprint()).where == "student"
    with pytest.raises(ValueError, match=r"EditCallback: .* `teacher` .* and `student` .*backbone="):
        find_backbone(module, who="EditCallback")


def test_of_two_models_the_one_that_the_memory_was_made_on(
    backbone: tr.Backbone, memory: tr.EditMemory, said: list[str]
) -> None:
    module = Theirs(setting(teacher=tiny_llada(seed=5).model, net=Wrapper(backbone.model)), lambda module: module.net)
    callback = tr.EditCallback(memory)
    predicted(module, backbone, callback)
    assert "`net.inner`" in said[0]
    assert dict(callback.hits) == {"tiny-0": 1}


def test_of_two_models_neither_of_which_it_was_made_on(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    first, second = tiny_llada(seed=5).model, tiny_dream(seed=6).model
    with pytest.raises(
        ValueError, match=r"Theirs, got `teacher` \(LLaDAModelLM\) and `net\.inner` \(DreamModel\); .*backbone="
    ):
        predicted(holding(teacher=first, net=Wrapper(second)), backbone, tr.EditCallback(memory))
    assert count_hooks(first) == count_hooks(second) == 0


def test_of_a_model_and_its_copy(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    module = holding(model=backbone.model, ema=copy.deepcopy(backbone.model))
    with pytest.raises(ValueError, match=r"`model` .* and `ema` "):
        predicted(module, backbone, tr.EditCallback(memory))
    given = tr.EditCallback(memory, backbone=backbone)
    predicted(module, backbone, given)
    assert dict(given.hits) == {"tiny-0": 1}


def test_the_only_model_is_another_one(backbone: tr.Backbone, memory: tr.EditMemory) -> None:
    other = tiny_llada(seed=5)
    with pytest.raises(MemoryMismatchError, match=other.fingerprint()):
        predicted(holding(model=other.model), backbone, tr.EditCallback(memory))
    assert count_hooks(other.model) == 0


def test_of_models_in_each_other_the_outermost_or_the_one_it_was_made_on() -> None:
    inner, outer = tiny_llada(seed=5), tiny_llada(seed=6)
    outer.model.original = inner.model
    module = holding(net=Wrapper(outer.model))
    assert find_backbone(module).where == "net.inner"
    assert find_backbone(module, fingerprint=inner.fingerprint()).where == "net.inner.original"


def test_a_compiled_model(backbone: tr.Backbone) -> None:
    module = holding(net=torch.compile(backbone.model, backend="eager"))
    assert find_backbone(module).where == "net._orig_mod"


class LlamaForCausalLM(nn.Module):
    """By structure and class a causal model; that it is none, only a user knows, or a memory made on it."""

    forward = DreamModel.forward

    def __init__(self, dream: Any) -> None:
        super().__init__()
        self.config, self.model, self.lm_head = dream.config, dream.model, dream.lm_head


def test_a_model_that_only_the_memory_knows(said: list[str]) -> None:
    model = LlamaForCausalLM(tiny_dream().model)
    backbone = tr.wrap(model, TinyTokenizer(), architecture="diffullama-plain")
    with pytest.raises(UnknownArchitectureError, match=r"`m` \(LlamaForCausalLM\).*causal.*'diffullama-plain'"):
        find_backbone(holding(m=model))
    callback = tr.EditCallback(gated_memory(backbone))
    predicted(holding(m=model), backbone, callback)
    assert said == ["EditCallback: edits act on `m` (LlamaForCausalLM as diffullama-plain), 1 edit"]
    assert dict(callback.hits) == {"tiny-0": 1}


class DiffusionGemmaForBlockDiffusion(nn.Module):
    pass


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "Theirs, got no submodule, of no known architecture"),
        ({"layer": nn.Linear(2, 2)}, r"Theirs, got `layer` \(Linear\), of no known .*backbone=.*register"),
        (
            {"net": DiffusionGemmaForBlockDiffusion()},
            r"`net` \(DiffusionGemmaForBlockDiffusion\) cannot.*mask token",
        ),
    ],
)
def test_no_model(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=message):
        find_backbone(Theirs(setting(**attributes), lambda module: module))


class Large(TinyTokenizer):
    """Of a larger model."""

    def get_vocab(self) -> dict[str, int]:
        return {"word": 10**6}


def test_the_nearest_tokenizer_that_fits(backbone: tr.Backbone) -> None:
    near, far = TinyTokenizer(), TinyTokenizer()

    def tokenizer_of(module: LightningModule) -> Any:
        return find_backbone(module).backbone.tokenizer

    assert tokenizer_of(holding(model=backbone.model)) is None
    assert tokenizer_of(holding(model=backbone.model, text=near)) is near
    net = Wrapper(backbone.model)
    net.tok = near
    assert tokenizer_of(holding(net=net, tokenizer=far)) is near
    assert tokenizer_of(holding(net=backbone.model, tokenizer=Large(), processor=Pipeline(nn.Identity(), far))) is far
    assert tokenizer_of(holding(net=backbone.model, tokenizer=Large(), function=len, kind=TinyTokenizer)) is None


def test_a_mask_token_that_nobody_names() -> None:
    class LLaDA(LLaDAModelLM):
        pass

    model = LLaDA(tiny_llada().model.model, 32, 3)  # type: ignore[arg-type]
    del model.config.mask_token_id  # the record's own is far outside of this vocabulary
    with pytest.raises(ValueError, match=r"timerome: `m` \(LLaDA\) cannot.*126336.*backbone=timerome\.wrap"):
        find_backbone(holding(m=model))
    assert find_backbone(holding(m=model, words=TinyTokenizer())).backbone.mask_id == TinyTokenizer.mask_token_id


def test_a_trace_finds_it_too_and_says_so(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("timerome.lightning.trace_callback.rank_zero_info", lines.append)
    monkeypatch.setattr("timerome.tracing.CausalTracer.trace", lambda self, facts, **_: self.backbone.model)
    trace = tr.TraceCallback(tiny_facts(2))
    predicted(holding(net=Wrapper(backbone.model), tokenizer=TinyTokenizer()), backbone, trace)
    assert trace.result is backbone.model
    assert lines[0].startswith("TraceCallback: traces `net.inner` (") and lines[0].endswith(", 2 facts")

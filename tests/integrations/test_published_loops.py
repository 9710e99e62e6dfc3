"""A memory around the published loops themselves, unmodified, on small random models; where they are at hand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import timerome as tr
from tests.backbones import published
from tests.lightning.loops import gated_memory
from tests.tiny import MASK, TinyTokenizer, _randomise, tiny_facts

pytestmark = pytest.mark.skipif(
    published.folder() is None, reason="TIMEROME_PUBLISHED names no folder with the repositories Fast-dLLM and dllm"
)

Run = Callable[[list[list[int]]], Tensor]
FACTS = [tiny_facts(1)[0], *tiny_facts(8)[4:]]
STEPS = {"steps": 4, "block_length": 2}


class Tokenizer(TinyTokenizer):
    bos_token_id = None


def packages(*names: str) -> dict[str, ModuleType]:
    """Packages of dllm without what their ``__init__`` imports, training and all."""
    root, found = published.folder(), {}
    for name in ("dllm", *names):
        found[name] = ModuleType(name)
        found[name].__path__ = [str(root / "dllm" / name.replace(".", "/"))]  # type: ignore[operator]
    return found


def dllm(name: str) -> Any:
    """A module of dllm."""
    inside = ("dllm.core", "dllm.core.samplers", "dllm.core.schedulers", "dllm.pipelines", "dllm.pipelines.fastdllm",
              "dllm.pipelines.dream", "dllm.pipelines.llada", "dllm.pipelines.fastdllm.llada",
              "dllm.pipelines.fastdllm.dream")  # fmt: skip
    with mock.patch.dict(sys.modules, packages(*inside)), published.published_code():
        schedules = importlib.import_module("dllm.core.schedulers.alpha")
        vars(sys.modules["dllm.core.schedulers"]).update(
            {k: v for k, v in vars(schedules).items() if not k.startswith("_")}
        )
        return importlib.import_module(name)


def fast_llada(model: nn.Module, function: str, threshold: float | None) -> Run:
    unused = {"model": ModuleType("model"), "model.modeling_llada": ModuleType("model.modeling_llada")}
    unused["model.modeling_llada"].LLaDAModelLM = None  # type: ignore[attr-defined]
    with published.flat("Fast-dLLM/llada", "generate"), mock.patch.dict(sys.modules, unused):
        loop = getattr(importlib.import_module("generate"), function)
    more = {"gen_length": 4, "mask_id": MASK, "threshold": threshold, **STEPS}
    return lambda rows: torch.cat([loop(model, torch.tensor([row]), **more)[0][:, -4:] for row in rows])


def fast_dream(model: nn.Module, dual_cache: bool, threshold: float) -> Run:
    loop = published.module("Fast-dLLM/dream/model", "generation_utils_block").DreamGenerationMixin._sample

    def run(rows: list[list[int]]) -> Tensor:
        config = SimpleNamespace(
            output_history=False, return_dict_in_generate=False, mask_token_id=MASK, steps=4, temperature=0.0,
            top_p=None, top_k=None, alg="confidence_threshold", alg_temp=0.0, eps=1e-3, max_length=len(rows[0]) + 4,
        )  # fmt: skip
        more = {"threshold": threshold, "block_length": 2, "dual_cache": dual_cache}
        with torch.no_grad():
            return torch.cat([loop(model, torch.tensor([row]), None, config, **more)[:, -4:] for row in rows])

    return run


def sampler(model: nn.Module, module: str, name: str, apart: bool = False, **how: Any) -> Run:
    code = dllm(module)
    made = getattr(code, name)(model=model, tokenizer=Tokenizer())
    config = getattr(code, f"{name}Config")(max_new_tokens=4, steps=4, block_size=2, temperature=0.0, **how)

    def run(rows: list[list[int]]) -> Tensor:
        batches = [[row] for row in rows] if apart else [rows]
        return torch.cat([made.sample(batch, config) for batch in batches])

    return run


def dllm_fast_llada() -> nn.Module:
    code = dllm("dllm.pipelines.fastdllm.llada.models.modeling_llada")
    code.LLaDAModel = code.FastdLLMLLaDAModel
    return published._llada(code, code.FastdLLMLLaDAConfig, code.FastdLLMLLaDAModelLM)


def dllm_fast_dream() -> nn.Module:
    code = dllm("dllm.pipelines.fastdllm.dream.models.modeling_dream")
    return code.FastdLLMDreamModel(code.FastdLLMDreamConfig(**published._sizes(attn_implementation="sdpa")))


FAST = "dllm.pipelines.fastdllm."
LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Run]]] = {}
for function in ("generate", "generate_with_prefix_cache", "generate_with_dual_cache"):
    for threshold in (None, 0.3):
        LOOPS[f"Fast-dLLM LLaDA {function} {threshold}"] = (
            published.llada("Fast-dLLM/llada/model"),
            lambda m, f=function, t=threshold: fast_llada(m, f, t),
        )
for dual in (False, True):
    LOOPS[f"Fast-dLLM Dream dual={dual}"] = (
        published.dream("Fast-dLLM/dream/model"),
        lambda m, d=dual: fast_dream(m, d, 0.3),
    )
for scale in (0.0, 1.5):
    LOOPS[f"dllm MDLM cfg={scale}"] = (
        published.llada("dllm/dllm/pipelines/llada/models"),
        lambda m, s=scale: sampler(m, "dllm.core.samplers.mdlm", "MDLMSampler", cfg_scale=s),
    )
for cache in (None, "prefix", "dual"):
    LOOPS[f"dllm Fast LLaDA {cache}"] = (
        dllm_fast_llada,
        lambda m, c=cache: sampler(m, FAST + "llada.sampler", "FastdLLMLLaDASampler", use_cache=c, threshold=0.3),
    )
    LOOPS[f"dllm Fast Dream {cache}"] = (
        dllm_fast_dream,
        lambda m, c=cache: sampler(
            m, FAST + "dream.sampler", "FastdLLMDreamSampler", apart=True, use_cache=c, alg="confidence_threshold",
            threshold=0.3,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore")
def test_the_edited_row_alone_changes(name: str) -> None:
    make, loop = LOOPS[name]
    model = published.built(make)
    _randomise(model, 0)
    backbone = tr.wrap(model, TinyTokenizer(), name=name)
    memory = gated_memory(backbone, canvas=4)
    rows, run = [backbone.encode(fact.prompt) for fact in FACTS], loop(model)
    plain = run(rows)
    with memory.attached(backbone) as attached:
        edited = run(rows)
    assert (plain != edited).any(1).tolist() == [True, False, False, False, False]
    assert set(attached.hits) == {"tiny-0"}
    assert list(attached.hits_by_step) == list(range(len(attached.hits_by_step)))
    assert torch.equal(run(rows), plain)

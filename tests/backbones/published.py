"""The published modelling files, unmodified, tiny and random, where they are at hand.

``TIMEROME_PUBLISHED`` names a folder that holds the repositories as cloned: ``dllm``, ``Fast-dLLM``, ``Saber``,
``MMaDA``, ``DiffuLLaMA``, ``mdlm``, ``Open-dLLM``. None of their code is here. What their files import and a CPU lacks
(flash attention, a configuration library, parallel state) is stood in for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.backbones.models import MODELS, Model, hf
from tests.backbones.models.layers import HEADS, LAYERS, D, V
from tests.tiny import EOS, MASK, PAD
from timerome.backbones.compatibility import published_code


def folder() -> Path | None:
    """Where the published repositories are, if anywhere."""
    path = os.environ.get("TIMEROME_PUBLISHED")
    return Path(path) if path else None


def module(path: str, name: str) -> types.ModuleType:
    """Import ``name`` from a repository's folder as part of a package of its own, so that no copy meets another."""
    root = folder()
    assert root is not None
    package = "published_" + path.replace("/", "_").replace("-", "_").replace(".", "_")
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(root / path)]
    with published_code(), contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(f"{package}.{name}")


@contextmanager
def flat(path: str, *names: str) -> Iterator[None]:
    """Let the modules of a repository that is no package import each other by bare name, for a while."""
    root = folder()
    assert root is not None
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [str(root / path), *sys.path]):
        for name in names:
            sys.modules.pop(name, None)
        yield


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with published_code(), contextlib.redirect_stdout(io.StringIO()):
        return make()


# LLaDA and MMaDA -----------------------------------------------------------------------------------------------------

LLADA_SIZES: dict[str, Any] = {
    "d_model": D, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": LAYERS, "mlp_hidden_size": 2 * D,
    "vocab_size": V, "embedding_size": V, "max_sequence_length": 128, "mask_token_id": MASK, "eos_token_id": EOS,
    "pad_token_id": PAD, "init_device": "cpu", "rope": True, "rope_theta": 500000.0, "block_type": "llama",
    "activation_type": "silu", "layer_norm_type": "rms", "include_bias": False, "include_qkv_bias": False,
    "bias_for_layer_norm": False, "weight_tying": False, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "embedding_dropout": 0.0, "alibi": False, "flash_attention": False, "attention_layer_norm": False,
    "multi_query_attention": None, "mlp_ratio": 2, "block_group_size": 1, "scale_logits": False,
    "input_emb_norm": False, "precision": None, "rms_norm_eps": 1e-5, "rope_full_precision": True,
}  # fmt: skip


def _llada(code: types.ModuleType, config_class: type, cls: type) -> nn.Module:
    config = config_class(**LLADA_SIZES)
    inner = code.create_model_config_from_pretrained_config(config)
    inner.init_device = "cpu"
    return cls(config, model=code.LLaDAModel(inner, init_params=True))


def llada(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        code = module(path, "modeling_llada")
        return _llada(code, code.LLaDAConfig, code.LLaDAModelLM)

    return make


def llada_flat() -> nn.Module:
    with flat("Saber", "modeling_llada", "configuration_llada"):
        code = importlib.import_module("modeling_llada")
        return _llada(code, code.LLaDAConfig, code.LLaDAModelLM)


def mmada() -> nn.Module:
    code, base = module("MMaDA/models", "modeling_mmada"), module("MMaDA/models", "modeling_llada")

    def config(**sizes: Any) -> Any:
        found = code.MMadaConfig(**sizes)
        for name, value in base.LLaDAConfig(**sizes).__dict__.items():
            if not hasattr(found, name):
                setattr(found, name, value)
        return found

    return _llada(base, config, code.MMadaModelLM)


# Dream, LLaDA-MoE, LLaDA2 --------------------------------------------------------------------------------------------


def _sizes(**more: Any) -> dict[str, Any]:
    return {**hf.SIZES, "mask_token_id": MASK, "use_cache": False, **more}


def dream(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        code = module(path, "modeling_dream")
        return code.DreamModel(code.DreamConfig(**_sizes(attn_implementation="sdpa")))

    return make


def dream_flat() -> nn.Module:
    with flat("Saber/Dream", "modeling_dream", "configuration_dream", "generation_utils"):
        code = importlib.import_module("modeling_dream")
        return code.DreamModel(code.DreamConfig(**_sizes(attn_implementation="sdpa")))


def llada_moe() -> nn.Module:
    code = module("dllm/dllm/pipelines/llada/models", "modeling_lladamoe")
    config = code.LLaDAMoEConfig(
        **_sizes(
            dense_intermediate_size=2 * D, expert_intermediate_size=D, num_experts=4, num_experts_per_tok=2,
            moe_layer_freq=[1] * LAYERS, norm_topk_prob=False, qk_layernorm=True, rope_theta=50000.0,
            partial_rotary_factor=1, num_key_value_heads=HEADS, shared_expert_intermediate_size=None,
            moe_router_score_function="softmax", moe_router_enable_expert_bias=False, router_num_group=None,
            router_topk_group=None,
        )
    )  # fmt: skip
    return code.LLaDAMoEModelLM(config)


def llada2(path: str, file: str, attention: str = "sdpa") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        code = module(path, file)
        config = code.LLaDA2MoeConfig(
            **_sizes(
                num_experts=4, num_experts_per_tok=2, num_shared_experts=1, n_group=1, topk_group=1, use_bias=False,
                moe_intermediate_size=D, first_k_dense_replace=1, head_dim=D // HEADS, embedding_dropout=0.0,
                attention_dropout=0.0, output_dropout=0.0, routed_scaling_factor=1.0, score_function="sigmoid",
            ),
            attn_implementation=attention,
        )  # fmt: skip
        return code.LLaDA2MoeModelLM(config)

    return make


# DiffuLLaMA, MDLM, a2d, Open-dLLM ------------------------------------------------------------------------------------


def diffullama() -> nn.Module:
    """The repository's wrapper without its patch of transformers, which only old versions take."""
    patch = types.ModuleType("attention_patch")
    patch.replace_attention_mask = lambda: None  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"attention_patch": patch}):
        code = module("DiffuLLaMA", "model")
    whole = hf.llama()
    return code.DiscreteDiffusionModel(whole, whole.config, range(V), torch.device("cpu"))


def _flash_attention() -> dict[str, types.ModuleType]:
    """What MDLM calls of flash attention, in plain PyTorch."""
    root, layers, rotary, interface, omegaconf = (
        types.ModuleType(name)
        for name in ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary", "flash_attn.flash_attn_interface",
                     "omegaconf")
    )  # fmt: skip

    def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat([t, t], -1)[None, :, None, None] for t in (cos, sin))
        qk, v = qkv[:, :, :2], qkv[:, :, 2:]
        first, second = qk.chunk(2, -1)
        return torch.cat([qk * cos + torch.cat([-second, first], -1) * sin, v], 2)

    def attend(qkv: Tensor, starts: Tensor, length: int, *_: Any, **__: Any) -> Tensor:
        q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    rotary.apply_rotary_emb_qkv_ = rotate  # type: ignore[attr-defined]
    interface.flash_attn_varlen_qkvpacked_func = attend  # type: ignore[attr-defined]
    root.layers, layers.rotary, root.flash_attn_interface = layers, rotary, interface  # type: ignore[attr-defined]
    return {m.__name__: m for m in (root, layers, rotary, interface, omegaconf)}


def mdlm() -> nn.Module:
    with mock.patch.dict(sys.modules, _flash_attention()):
        code = module("mdlm/models", "dit")
    sizes = SimpleNamespace(
        hidden_size=D, cond_dim=16, n_heads=HEADS, n_blocks=LAYERS, dropout=0.0, scale_by_sigma=True, length=128
    )
    return code.DIT(SimpleNamespace(model=sizes, time_conditioning=False), V)


def a2d(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        code = module(f"dllm/dllm/pipelines/a2d/models/{kind.lower()}", f"modeling_{kind.lower()}")
        more = {"head_dim": D // HEADS} if kind == "Qwen3" else {}
        return getattr(code, f"A2D{kind}LMHeadModel")(getattr(code, f"A2D{kind}Config")(**{**hf.SIZES, **more}))

    return make


def open_dllm() -> nn.Module:
    """The repository's Qwen2; its package is not imported whole, since it wants a training cluster's libraries."""
    root = folder()
    assert root is not None
    names = ("veomni", "veomni.models", "veomni.models.transformers", "veomni.models.transformers.qwen2",
             "veomni.data", "veomni.distributed", "veomni.utils")  # fmt: skip
    packages = {name: types.ModuleType(name) for name in names}
    for name, package in packages.items():
        package.__path__ = [str(root / "Open-dLLM" / name.replace(".", "/"))]
    constants = types.ModuleType("veomni.data.constants")
    constants.IGNORE_INDEX = -100  # type: ignore[attr-defined]
    state, parallel = (types.ModuleType(f"veomni.distributed.{n}") for n in ("parallel_state", "sequence_parallel"))
    state.get_parallel_state = lambda: SimpleNamespace(sp_enabled=False, ulysses_enabled=False)  # type: ignore[attr-defined]
    for name in ("gather_heads_scatter_seq", "gather_seq_scatter_heads", "reduce_sequence_parallel_loss"):
        setattr(parallel, name, None)
    logging, tests = types.ModuleType("veomni.utils.logging"), types.ModuleType("veomni.utils.import_utils")
    logging.get_logger = lambda *_: mock.MagicMock()  # type: ignore[attr-defined]
    tests.is_liger_kernel_available = lambda: False  # type: ignore[attr-defined]
    packages["veomni.utils"].logging = logging  # type: ignore[attr-defined]
    stand_ins = {**packages, **{m.__name__: m for m in (constants, state, parallel, logging, tests)}}
    with mock.patch.dict(sys.modules, stand_ins):
        code = importlib.import_module("veomni.models.transformers.qwen2.modeling_qwen2")
    import transformers

    return code.Qwen2ForCausalLM(transformers.Qwen2Config(**hf.SIZES, use_cache=False))


# What there is -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published(Model):
    """A published file: ``of`` is the row of the table it belongs to, ``versions`` where it can work at all."""

    of: str = ""
    repository: str = ""
    versions: tuple[str, str] = ("0", "99")

    def unavailable(self) -> str:
        """Why it cannot be built here."""
        import transformers
        from packaging.version import Version

        low, high = self.versions
        if not Version(low) <= Version(transformers.__version__) < Version(high):
            return f"works with transformers from {low} to below {high}, this is {transformers.__version__}"
        return ""

    def build(self, seed: int = 0) -> nn.Module:
        """The published class, tiny and random."""
        return Model(lambda: built(self.make), self.record).build(seed)


def _published(of: str, repository: str, make: Callable[[], nn.Module], **more: Any) -> Published:
    row = MODELS[of]
    given = {"padding": row.padding, "patterns": row.patterns, "options": row.options, **more}
    return Published(make, row.record, of=of, repository=repository, **given)


_DLLM = "dllm/dllm/pipelines"
_LLADA2 = (f"{_DLLM}/llada2/models", "modeling_llada2_moe")
_LLADA21 = (f"{_DLLM}/llada21/models", "modeling_llada21_moe")
_NEWER = {"versions": ("4.54", "99")}  # what their imports, or (Open-dLLM) attention in both directions, need
_EVERY: dict[str, Published] = {
    "LLaDA-8B: dllm": _published("LLaDA-8B", "dllm", llada(f"{_DLLM}/llada/models")),
    "LLaDA-8B: Fast-dLLM": _published("LLaDA-8B, earlier files", "Fast-dLLM", llada("Fast-dLLM/llada/model")),
    "LLaDA-8B: Saber": _published("LLaDA-8B, earlier files", "Saber", llada_flat),
    "MMaDA-8B: MMaDA": _published("MMaDA-8B", "MMaDA", mmada),
    "Dream-7B: dllm": _published("Dream-7B", "dllm", dream(f"{_DLLM}/dream/models")),
    "Dream-7B: Saber": _published("Dream-7B", "Saber", dream_flat),
    "Dream-7B: Fast-dLLM": _published("Dream-7B", "Fast-dLLM", dream("Fast-dLLM/dream/model")),
    "DiffuLLaMA: DiffuLLaMA": _published("DiffuLLaMA, wrapper", "DiffuLLaMA", diffullama),
    "LLaDA-MoE: dllm": _published("LLaDA-MoE", "dllm", llada_moe),
    "LLaDA2.0: dllm": _published("LLaDA2.x", "dllm", llada2(*_LLADA2), **_NEWER),
    "LLaDA2.1: dllm": _published("LLaDA2.x", "dllm", llada2(*_LLADA21), **_NEWER),
    "LLaDA2.0, eager: dllm": _published("LLaDA2.x, eager", "dllm", llada2(*_LLADA2, attention="eager"), **_NEWER),
    "MDLM: mdlm": _published("MDLM, repository", "mdlm", mdlm),
    "a2d Qwen3: dllm": _published("a2d Qwen3", "dllm", a2d("Qwen3"), **_NEWER),
    "a2d Qwen2: dllm": _published("a2d Qwen2", "dllm", a2d("Qwen2"), **_NEWER),
    "a2d Llama: dllm": _published("a2d Llama", "dllm", a2d("Llama"), **_NEWER),
    "Open-dLLM: Open-dLLM": _published("Open-dLLM", "Open-dLLM", open_dllm, **_NEWER),
}
PUBLISHED = {
    name: model
    for name, model in _EVERY.items()
    if (root := folder()) is not None and (root / model.repository).is_dir()
}

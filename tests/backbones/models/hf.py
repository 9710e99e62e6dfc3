"""Backbones that are transformers' own classes, or a few lines on top of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.tiny import EOS, PAD

from .layers import HEADS, LAYERS, D, V

SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "max_position_embeddings": 128,
    "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def llama() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


class DiscreteDiffusionModel(nn.Module):
    """DiffuLLaMA's wrapper: takes a Llama apart; a mask is required and must be additive and 4-D to be of use."""

    def __init__(self) -> None:
        super().__init__()
        whole = llama()
        self.config, self.embed_tokens, self.lm_head = whole.config, whole.model.embed_tokens, whole.lm_head
        self.denoise_model = whole.model
        del self.denoise_model.embed_tokens

    def get_embeds(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        hidden = self.denoise_model(
            inputs_embeds=self.get_embeds(input_ids), attention_mask=attention_mask, use_cache=False, return_dict=False
        )
        return self.lm_head(hidden[0])


def _a2d(kind: str) -> nn.Module:
    """dLLM's conversions: transformers' causal model with the mask of an encoder, and a name of its own."""
    base: Any = getattr(transformers, f"{kind}ForCausalLM")
    sizes = {**SIZES, "head_dim": D // HEADS} if kind == "Qwen3" else SIZES

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, length)
        if attention_mask.dim() == 2:
            low = torch.finfo(self.dtype).min
            attention_mask = ((1.0 - attention_mask.to(self.dtype)) * low)[:, None, None].expand(-1, 1, length, -1)
        more["use_cache"] = False
        return base.forward(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    name = f"A2D{kind}LMHeadModel"
    cls: Any = type(name, (base,), {"forward": forward, "__module__": __name__})
    return cls(getattr(transformers, f"{kind}Config")(**sizes))


def a2d_qwen3() -> nn.Module:
    return _a2d("Qwen3")


def a2d_qwen2() -> nn.Module:
    return _a2d("Qwen2")


def a2d_llama() -> nn.Module:
    return _a2d("Llama")


class MDMGenerationMixin:
    """What tells Open-dLLM's Qwen2ForCausalLM from transformers' class of that name."""


def open_dllm() -> nn.Module:
    """Causal unless ``is_causal=False`` is passed at each call."""

    def forward(self: Any, input_ids: Tensor, is_causal: bool = True, **more: Any) -> Any:
        batch, length = input_ids.shape
        bias = torch.zeros(batch, 1, length, length, dtype=self.dtype)
        if is_causal:
            bias = bias + torch.full((length, length), torch.finfo(self.dtype).min, dtype=self.dtype).triu(1)
        return transformers.Qwen2ForCausalLM.forward(self, input_ids, attention_mask=bias, use_cache=False)

    cls: Any = type("Qwen2ForCausalLM", (transformers.Qwen2ForCausalLM, MDMGenerationMixin), {"forward": forward})
    return cls(transformers.Qwen2Config(**SIZES))


def modernbert() -> nn.Module:
    """Local attention in two layers of three, a dense layer before the unembedding."""
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    config = transformers.ModernBertConfig(
        **{**sizes, "bos_token_id": PAD, "cls_token_id": PAD, "sep_token_id": EOS}, local_attention=16
    )
    return transformers.ModernBertForMaskedLM(config)


class DiffusionGemmaForBlockDiffusion(nn.Module):
    """Its name is what it is refused by."""

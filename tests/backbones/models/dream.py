"""Dream-7B: logits shifted by one, a one-tuple from each layer, a mask that must not be 2-D in the published file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import HEADS, LAYERS, D, GatedMLP, Output, RMSNorm, V, attend, config, split_heads


class Attention(nn.Module):
    """Biases on q, k and v alone; two key heads for four query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, None]:
        q, k, v = split_heads(self.q_proj(x), HEADS), self.k_proj(x), self.v_proj(x)
        return self.o_proj(attend(q, split_heads(k, HEADS // 2), split_heads(v, HEADS // 2), mask)), None, None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn, self.mlp = Attention(), GatedMLP()

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), mask)[0]
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()

    def forward(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            (x,) = layer(x, mask)
        return self.norm(x)


class DreamModel(nn.Module):
    """The published file wants ``None``, ``"full"``, or a boolean or additive mask that broadcasts to 4-D."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config(model_type="Dream")
        self.model = Base()
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> Output:
        if isinstance(attention_mask, str):
            attention_mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 4:
            raise ValueError("a 2-D mask does not broadcast")
        return Output(logits=self.lm_head(self.model(input_ids, attention_mask)))

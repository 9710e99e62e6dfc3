"""LLaDA-MoE and LLaDA2.x: routed experts; the second's sparse layers return nested tuples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import (
    HEADS,
    LAYERS,
    D,
    GatedMLP,
    Output,
    RMSNorm,
    V,
    attend,
    causal_bias,
    config,
    padding_bias,
    split_heads,
)

EXPERTS, CHOSEN = 4, 2


class Sparse(nn.Module):
    """A router and its experts. ``call_all`` calls every expert, also for no token, as LLaDA-MoE does."""

    def __init__(self, call_all: bool) -> None:
        super().__init__()
        self.call_all = call_all
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.ModuleList(GatedMLP(hidden=D) for _ in range(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.gate(x)
        weights, chosen = scores.float().softmax(-1).to(x.dtype).topk(CHOSEN, -1)
        flat, out = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
        picked, shares = chosen.flatten(0, -2), weights.flatten(0, -2)
        for i, expert in enumerate(self.experts):
            token, place = (picked == i).nonzero(as_tuple=True)
            if self.call_all or len(token):
                out.index_add_(0, token, expert(flat[token]) * shares[token, place, None])
        return out.view_as(x), scores, chosen


class Attention(nn.Module):
    """Norms on each head's queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(D // HEADS), RMSNorm(D // HEADS)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, None]:
        q, k, v = (split_heads(p(x), HEADS) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_norm(q), self.k_norm(k), v, mask)), None, None


class PlainSparse(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        return self.route(x)[0]


class LLaDAMoELayer(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn, self.mlp = Attention(), PlainSparse(call_all=True)
        if shared:
            self.shared_expert = GatedMLP(hidden=D)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), mask)[0]
        h = self.post_attention_layernorm(x)
        out = x + self.mlp(h)
        return (out + self.shared_expert(h) if hasattr(self, "shared_expert") else out,)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], embedding: str = "embed_tokens") -> None:
        super().__init__()
        setattr(self, embedding, nn.Embedding(V, D))
        self.layers, self.norm = nn.ModuleList(layers), RMSNorm()

    def run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)[0]
        return self.norm(x)


class LLaDAMoEStack(Stack):
    def forward(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.run(self.embed_tokens(input_ids), mask)


class LLaDAMoEModelLM(nn.Module):
    """``padding`` False ignores a mask, as two of the three published files do."""

    def __init__(self, padding: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.padding = padding
        self.config = config(model_type="llada", mask_token_id=None)
        self.model = LLaDAMoEStack([LLaDAMoELayer(shared) for _ in range(LAYERS)])
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Output:
        mask = padding_bias(attention_mask) if self.padding else None
        return Output(logits=self.lm_head(self.model(input_ids, mask)))


class FusedAttention(nn.Module):
    """One projection to queries, keys and values; rotary positions on half of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D, bias=False)
        self.query_layernorm, self.key_layernorm = RMSNorm(D // HEADS), RMSNorm(D // HEADS)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, None]:
        q, k, v = self.query_key_value(x).split([D, D // 2, D // 2], -1)
        q, k, v = split_heads(q, HEADS), split_heads(k, HEADS // 2), split_heads(v, HEADS // 2)
        return self.dense(attend(self.query_layernorm(q), self.key_layernorm(k), v, mask, share=0.5)), None, None


class SparseWithShared(Sparse):
    def __init__(self) -> None:
        super().__init__(call_all=False)
        self.shared_experts = GatedMLP(hidden=D)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, scores, chosen = self.route(x)
        return out + self.shared_experts(x), (scores, chosen)


class LLaDA2Layer(nn.Module):
    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.attention = FusedAttention()
        self.mlp: nn.Module = GatedMLP() if dense else SparseWithShared()

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        x = x + self.attention(self.input_layernorm(x), mask)[0]
        h = self.mlp(self.post_attention_layernorm(x))
        return (x + (h[0] if isinstance(h, tuple) else h),)


class LLaDA2Stack(Stack):
    def forward(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.run(self.word_embeddings(input_ids), mask)


class LLaDA2MoeModelLM(nn.Module):
    """Causal with a 2-D mask, and without one where its attention is eager; logits are always float32."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config(model_type="llada2_moe", mask_token_id=None, _attn_implementation=attention)
        self.model = LLaDA2Stack([LLaDA2Layer(dense=i == 0) for i in range(LAYERS)], "word_embeddings")
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Output:
        eager, mask = self.config._attn_implementation == "eager", attention_mask
        dtype = self.lm_head.weight.dtype
        if mask is not None and mask.dim() == 4:
            if eager:  # takes 1 for "attends"
                mask = torch.zeros_like(mask).masked_fill((1.0 - mask).bool(), torch.finfo(dtype).min)
        elif eager or mask is not None:
            extra = padding_bias(mask, dtype)
            mask = causal_bias(input_ids.shape[1], dtype) + (0 if extra is None else extra)
        return Output(logits=self.lm_head(self.model(input_ids, mask)).float())

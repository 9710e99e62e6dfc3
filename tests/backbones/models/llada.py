"""LLaDA-8B and MMaDA: attention and MLP are methods of the block; hooks on the inner model never fire."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .layers import HEADS, LAYERS, D, Output, RMSNorm, V, attend, causal_bias, config, padding_bias, split_heads


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm, self.dropout = RMSNorm(), RMSNorm(), nn.Dropout(0.0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.attn_out = nn.Linear(D, D, bias=False)
        self.ff_proj, self.up_proj = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, 2 * D, bias=False)
        self.ff_out = nn.Linear(2 * D, D, bias=False)

    def attention(self, x: Tensor, bias: Tensor | None) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (split_heads(p(h), HEADS) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.attn_out(attend(q, k, v, bias))

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        x = x + self.dropout(self.attention(x, bias))
        h = self.ff_norm(x)
        return x + self.dropout(self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))), None


class Inner(nn.Module):
    def __init__(self, padding: str) -> None:
        super().__init__()
        self.padding = padding
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, D),
                "blocks": nn.ModuleList(Block() for _ in range(LAYERS)),
                "ln_f": RMSNorm(),
                "ff_out": nn.Linear(D, V, bias=False),
            }
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, attention_bias: Tensor | None) -> Tensor:
        x = self.transformer["wte"](input_ids)
        bias = None if self.padding == "ignored" else attention_bias
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape).masked_fill(~bias, torch.finfo(torch.float32).min)
        if attention_mask is not None and self.padding != "ignored":
            extra = padding_bias(attention_mask)
            if self.padding == "causal":
                extra = extra + causal_bias(input_ids.shape[1])
            bias = extra if bias is None else bias + extra
        for block in self.transformer["blocks"]:
            x, _ = block(x, bias)
        return self.transformer["ff_out"](self.transformer["ln_f"](x))


class LLaDAModelLM(nn.Module):
    """``padding`` says what the published file does with a 2-D mask: all three have been published."""

    def __init__(self, padding: Literal["honoured", "ignored", "causal"] = "honoured", **more: Any) -> None:
        super().__init__()
        self.config = config(**{"model_type": "llada", **more})
        self.model = Inner(padding)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        **_: Any,
    ) -> Output:
        return Output(logits=self.model.forward(input_ids, attention_mask, attention_bias))


class MMadaModelLM(LLaDAModelLM):
    """A subclass whose config has none of the usual size names, and on which a padding mask turns attention causal."""

    def __init__(self) -> None:
        super().__init__("causal", model_type="mmada", hidden_size=None, num_hidden_layers=None, d_model=D)

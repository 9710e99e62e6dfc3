"""Parts that the small models share: rotary attention, norms, gated MLPs, random weights, outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import EOS, MASK, VOCAB

V, D, LAYERS, HEADS = len(VOCAB), 32, 3, 4


class Output(SimpleNamespace):
    """What a model returns: ``.logits``, and whatever else it has."""

    logits: Tensor


def config(**more: Any) -> SimpleNamespace:
    """A config with the names most published ones use; ``None`` leaves one out."""
    all_of_it = {
        "mask_token_id": MASK, "eos_token_id": EOS, "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": V,
        "max_position_embeddings": 128, **more,
    }  # fmt: skip
    return SimpleNamespace(**{name: value for name, value in all_of_it.items() if value is not None})


class RMSNorm(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x: Tensor, first: int = 0, share: float = 1.0) -> Tensor:
    """Rotary positions on ``(B, heads, L, hd)``, from position ``first`` on, on a share of each head."""
    d = int(x.shape[-1] * share)
    turned, rest = x[..., :d], x[..., d:]
    place = torch.arange(first, first + x.shape[-2], device=x.device, dtype=torch.float32)
    angle = place[:, None] * 50.0 ** (-torch.arange(0, d, 2, device=x.device) / d)
    angle = torch.cat([angle, angle], -1)
    half = torch.cat([-turned[..., d // 2 :], turned[..., : d // 2]], -1)
    return torch.cat([turned * angle.cos().to(x) + half * angle.sin().to(x), rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, share: float = 1.0, past: int = 0) -> Tensor:
    """Attention of ``(B, heads, L, hd)``, key heads shared out among the query heads; returns ``(B, L, d)``."""
    q, k = rotate(q, past, share), rotate(k, past, share)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class GatedMLP(nn.Module):
    def __init__(self, d: int = D, hidden: int = 2 * D) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def padding_bias(mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Additive form ``(B, 1, 1, L)`` of a 0/1 padding mask ``(B, L)``."""
    if mask is None:
        return None
    return ((1.0 - mask.to(dtype)) * torch.finfo(dtype).min)[:, None, None]


def causal_bias(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)


def randomise(model: nn.Module, seed: int) -> None:
    """Weights large enough that what is at one position matters at the others, and that predictions are not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
            elif isinstance(module, nn.Linear):
                scale = 0.6 if module.out_features == V else 1.5 / module.in_features**0.5
                module.weight.normal_(std=scale, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(std=0.1, generator=generator)

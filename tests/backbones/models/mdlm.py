"""MDLM: adaptive layer norms shift, scale and gate by the noise level; the embedding is no ``nn.Embedding``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import HEADS, LAYERS, D, V, attend, split_heads

COND = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn_qkv, self.attn_out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.adaLN_modulation = nn.Linear(COND, 6 * D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        q, k, v = (split_heads(t, HEADS) for t in self.attn_qkv(self.norm1(x) * (1 + scale_a) + shift_a).chunk(3, -1))
        x = x + gate_a * self.attn_out(attend(q, k, v))
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(V, D))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding[ids]


class Sigma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, COND), nn.SiLU(), nn.Linear(COND, COND))

    def forward(self, sigma: Tensor) -> Tensor:
        return self.mlp(torch.stack([sigma.cos(), sigma.sin()], -1))


class Final(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(D), nn.Linear(D, V)
        self.adaLN_modulation = nn.Linear(COND, 2 * D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DIT(nn.Module):
    """The repository's class: positional arguments, raw logits, and a config that is no transformers one."""

    def __init__(self, time_conditioning: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(time_conditioning=time_conditioning, model=SimpleNamespace(length=64))
        self.vocab_embed, self.sigma_map = Embedding(), Sigma()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.output_layer = Final()

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        x, c = self.vocab_embed(indices), nn.functional.silu(self.sigma_map(sigma))
        for block in self.blocks:
            x = block(x, c)
        return self.output_layer(x, c)


class MDLM(nn.Module):
    """The Hub's class around it, with names of its own in the config."""

    def __init__(self, time_conditioning: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="mdlm", hidden_dim=D, n_blocks=LAYERS, vocab_size=V, time_conditioning=time_conditioning
        )
        self.backbone = DIT(time_conditioning)

    def forward(self, input_ids: Tensor, timesteps: Tensor, **_: Any) -> Tensor:
        return self.backbone(input_ids, timesteps if self.config.time_conditioning else torch.zeros_like(timesteps))

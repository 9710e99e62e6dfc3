"""Generation loops as other people write them, and small models that take what those loops pass.

Written here, after what such loops do: batches padded to one length with an attention mask, several tokens a step,
guidance by a second half of the batch, and caches of keys and values with slices of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr
from tests.tiny import (
    MASK,
    DreamBaseModel,
    DreamLayer,
    DreamModel,
    LLaDABlock,
    LLaDAModel,
    LLaDAModelLM,
    TinyTokenizer,
    _Norm,
    _randomise,
)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention of two heads; ``seen`` ``(B, L)`` says which keys are there."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    mask = None if seen is None else seen[:, None, None].bool()
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def positions(where: Tensor, d: int) -> Tensor:
    """Sinusoidal encodings of positions ``(B, L)``."""
    angle = where[..., None] / 50 ** (torch.arange(0, d, 2) / d)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).float()


# LLaDA's structure with an attention mask ------------------------------------------------------------------------


class PaddedBlock(LLaDABlock):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        h = self.attn_norm(x)
        x = x + self.attn_out(attend(self.q_proj(h), self.k_proj(h), self.v_proj(h), attention_mask))
        return x + self.ff_out(nn.functional.silu(self.ff_proj(self.ff_norm(x)))), None


class PaddedModel(LLaDAModelLM):
    """What is not seen neither acts nor counts as a position."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        parts = self.model.transformer
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        x = parts["wte"](input_ids) + positions(seen.cumsum(1) - 1, parts["wte"].embedding_dim)
        for block in parts["blocks"]:
            x, _ = block(x, attention_mask=seen)
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)))


def padded_llada(seed: int = 0, d: int = 32, layers: int = 3) -> tr.Backbone:
    """Of the same weights as ``tiny_llada`` of the same seed."""
    model = PaddedModel(LLaDAModel(d, [PaddedBlock(d) for _ in range(layers)], _Norm(d)), d, layers)
    _randomise(model, seed)
    return tr.wrap(model, TinyTokenizer(), name="padded-llada")


@dataclass
class BlockConfig:
    new_tokens: int = 4
    steps: int = 4
    block: int = 2
    cfg_scale: float = 0.0
    left: bool = False


class BlockSampler:
    """A sampler of its own that takes prompts of mixed lengths: one batch, padded with end-of-text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], config: BlockConfig) -> list[list[int]]:
        length = max(map(len, prompts)) + config.new_tokens
        x = torch.full((len(prompts), length), self.tokenizer.eos_token_id)
        seen, asked = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        starts = []
        for row, prompt in enumerate(prompts):
            first = length - len(prompt) - config.new_tokens if config.left else 0
            starts.append(first + len(prompt))
            x[row, first : starts[row]] = torch.tensor(prompt)
            x[row, starts[row] : starts[row] + config.new_tokens] = self.tokenizer.mask_token_id
            seen[row, first : starts[row] + config.new_tokens] = 1
            asked[row, first : starts[row]] = True
        blocks = config.new_tokens // config.block
        for block in range(blocks):
            here = torch.zeros_like(asked)
            for row, start in enumerate(starts):
                here[row, start + block * config.block : start + (block + 1) * config.block] = True
            for step in range(config.steps // blocks):
                logits = self.logits(x, seen, asked, config.cfg_scale)
                share = int((x == MASK)[0][here[0]].sum()) // (config.steps // blocks - step)
                x = surest(x, logits, here, share)
        return [x[row, s : s + config.new_tokens].tolist() for row, s in enumerate(starts)]

    def logits(self, x: Tensor, seen: Tensor, asked: Tensor, scale: float) -> Tensor:
        if not scale:
            return self.model(x, attention_mask=seen).logits
        blind = torch.where(asked, MASK, x)
        found, free = self.model(torch.cat([x, blind]), attention_mask=torch.cat([seen, seen])).logits.chunk(2)
        return free + (scale + 1) * (found - free)


def surest(x: Tensor, logits: Tensor, here: Tensor, count: int, threshold: float = 2.0) -> Tensor:
    """Unmask the ``count`` most confident positions ``here`` of each row, and all above the threshold."""
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    confidence = confidence.masked_fill(~(here & (x == MASK)), -1.0)
    best = torch.zeros_like(here).scatter(1, confidence.topk(max(1, count), 1).indices, True)
    chosen = (best | (confidence > threshold)) & (confidence >= 0)
    return torch.where(chosen, tokens, x)


# Dream's structure with a cache ----------------------------------------------------------------------------------


class CachedLayer(DreamLayer):
    """Attends to what is cached and to itself, or with ``dual_cache`` in the place of part of what is cached."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        dual_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        own, h = self.self_attn, self.input_layernorm(x)
        k, v = own.k_proj(h), own.v_proj(h)
        if past_key_value is not None and dual_cache:
            assert replace_position is not None
            at = replace_position[0].nonzero().flatten()
            k, v = (old.clone().index_copy(1, at, new) for old, new in zip(past_key_value, (k, v), strict=True))
        elif past_key_value is not None:
            k, v = (torch.cat([old, new], 1) for old, new in zip(past_key_value, (k, v), strict=True))
        x = x + own.o_proj(attend(own.q_proj(h), k, v))
        return x + self.mlp(self.post_attention_layernorm(x)), (k, v)


class CachedDream(DreamModel):
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: str = "full",
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = False,
        dual_cache: bool = False,
        replace_position: Tensor | None = None,
    ) -> Any:
        first = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        if dual_cache and replace_position is not None:
            first = int(replace_position[0].nonzero()[0])
        where = (first + torch.arange(input_ids.shape[1])).expand_as(input_ids)
        x = self.model.embed_tokens(input_ids)
        x = x + positions(where, x.shape[-1])
        caches = []
        for i, layer in enumerate(self.model.layers):
            past = None if past_key_values is None else past_key_values[i]
            x, cache = layer(x, past_key_value=past, dual_cache=dual_cache, replace_position=replace_position)
            caches.append(cache)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)), past_key_values=caches if use_cache else None)


def cached_dream(seed: int = 0, d: int = 32, layers: int = 3) -> tr.Backbone:
    """Of the same weights as ``tiny_dream`` of the same seed."""
    model = CachedDream(d, layers)
    base = DreamBaseModel(d, layers)
    base.layers = nn.ModuleList(CachedLayer(d) for _ in range(layers))
    model.model = base
    _randomise(model, seed)
    return tr.wrap(model, TinyTokenizer(), name="cached-dream")


def aligned(logits: Tensor) -> Tensor:
    """Logits of a shifted model at the positions they predict; the first of a slice at itself."""
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


@torch.no_grad()
def cached_generate(
    model: Any, prompt: Tensor, new_tokens: int, block: int, threshold: float = 0.9, dual_cache: bool = False
) -> tuple[Tensor, int]:
    """Blocks from left to right, each begun by one whole forward that fills the cache; then slices.

    Returns:
        The sequences, and the number of forwards.
    """
    x, forwards = nn.functional.pad(prompt, (0, new_tokens), value=MASK), 0
    for start in range(prompt.shape[1], x.shape[1], block):
        end = start + block
        here = torch.zeros_like(x, dtype=torch.bool)
        here[:, start:end] = True
        out = model(x, use_cache=True)
        x, forwards = surest(x, aligned(out.logits), here, 1, threshold), forwards + 1
        past, last = out.past_key_values, end
        if not dual_cache:
            past, last = [(k[:, :start], v[:, :start]) for k, v in past], x.shape[1]
        while (x[:, start:end] == MASK).any():
            more = {"dual_cache": True, "replace_position": here} if dual_cache else {}
            logits = aligned(model(x[:, start:last], past_key_values=past, use_cache=True, **more).logits)
            x[:, start:last] = surest(x[:, start:last], logits, here[:, start:last], 1, threshold)
            forwards += 1
    return x, forwards

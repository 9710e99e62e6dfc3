"""A small model that caches keys and values, and loops that feed it slices, as fast samplers of LLaDA do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr
from tests.tiny import (
    MASK,
    LLaDABlock,
    LLaDAModel,
    LLaDAModelLM,
    TinyTokenizer,
    _attend,
    _Norm,
    _randomise,
    _with_positions,
)

Cache = tuple[Tensor, Tensor]


class CachedBlock(LLaDABlock):
    """Attends to what is cached and to itself; with ``replace_position``, in the place of part of what is cached."""

    def forward(  # type: ignore[override]
        self, x: Tensor, layer_past: Cache | None = None, replace_position: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        h = self.attn_norm(x)
        k, v = self.k_proj(h), self.v_proj(h)
        if layer_past is not None and replace_position is not None:
            at = replace_position[0].nonzero().flatten()
            k, v = (old.clone().index_copy(1, at, new) for old, new in zip(layer_past, (k, v), strict=True))
        elif layer_past is not None:
            k, v = (torch.cat([old, new], 1) for old, new in zip(layer_past, (k, v), strict=True))
        x = x + self.attn_out(_attend(self.q_proj(h), k, v, heads=2))
        return x + self.ff_out(nn.functional.silu(self.ff_proj(self.ff_norm(x)))), (k, v)


class CachedModel(LLaDAModelLM):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, past: list[Cache] | None = None, replace_position: Tensor | None = None, **_: Any
    ) -> Any:
        first = 0 if past is None else past[0][0].shape[1]
        if replace_position is not None:
            first = int(replace_position[0].nonzero()[0])
        parts = self.model.transformer
        x = _with_positions(torch.zeros(1, first + input_ids.shape[1], parts["wte"].embedding_dim))[:, first:]
        x, caches = x + parts["wte"](input_ids), []
        for i, block in enumerate(parts["blocks"]):
            x, cache = block(x, layer_past=None if past is None else past[i], replace_position=replace_position)
            caches.append(cache)
        return type("Out", (), {"logits": parts["ff_out"](parts["ln_f"](x)), "past": caches})()


def cached_llada(seed: int = 0, d: int = 32, layers: int = 3) -> tr.Backbone:
    """Of the same weights as ``tiny_llada`` of the same seed."""
    model = CachedModel(LLaDAModel(d, [CachedBlock(d) for _ in range(layers)], _Norm(d)), d, layers)
    _randomise(model, seed)
    return tr.wrap(model, TinyTokenizer(), name="cached-llada")


def keep_best(ids: Tensor, logits: Tensor) -> Tensor:
    """Unmask the most confident masked position of each row."""
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    best = confidence.masked_fill(ids != MASK, -1).argmax(1, keepdim=True)
    return ids.scatter(1, best, torch.where(ids.gather(1, best) == MASK, tokens.gather(1, best), ids.gather(1, best)))


@torch.no_grad()
def suffix_cached(model: Any, prompt: Tensor, canvas: int, block: int) -> Tensor:
    """The prefix is cached at the start of each block; then what follows it is fed."""
    ids = nn.functional.pad(prompt, (0, canvas), value=MASK)
    for start in range(prompt.shape[1], ids.shape[1], block):
        out = model(ids)
        ids[:, : start + block] = keep_best(ids[:, : start + block], out.logits[:, : start + block])
        past = [(k[:, :start], v[:, :start]) for k, v in out.past]
        while (ids[:, start : start + block] == MASK).any():
            logits = model(ids[:, start:], past=past).logits[:, :block]
            ids[:, start : start + block] = keep_best(ids[:, start : start + block], logits)
    return ids


@torch.no_grad()
def dual_cached(model: Any, prompt: Tensor, canvas: int, block: int) -> Tensor:
    """All is cached at the start of each block; then the block alone is fed."""
    ids = nn.functional.pad(prompt, (0, canvas), value=MASK)
    for start in range(prompt.shape[1], ids.shape[1], block):
        out, end = model(ids), start + block
        ids[:, :end] = keep_best(ids[:, :end], out.logits[:, :end])
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, start:end] = True
        while (ids[:, start:end] == MASK).any():
            logits = model(ids[:, start:end], past=out.past, replace_position=where).logits
            ids[:, start:end] = keep_best(ids[:, start:end], logits)
    return ids


@torch.no_grad()
def block_by_block(model: Any, prompt: Tensor, canvas: int, block: int) -> Tensor:
    """The prompt is cached first, then each block when it is done; a block sees only what came before it."""
    past, done = model(prompt).past, [prompt]
    for _ in range(0, canvas, block):
        ids = torch.full((len(prompt), block), MASK)
        while (ids == MASK).any():
            out = model(ids, past=past)
            ids = keep_best(ids, out.logits)
        past = model(ids, past=past).past
        done.append(ids)
    return torch.cat(done, 1)

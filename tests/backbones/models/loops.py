"""Each backbone's own way of generating, in a few lines: loops that know nothing of this library.

``OWN[record](model, prompt, canvas)`` takes prompt ids ``(B, P)`` and returns ids ``(B, P + canvas)``; greedy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tiny import MASK


def _canvas(prompt: Tensor, canvas: int) -> Tensor:
    return torch.nn.functional.pad(prompt, (0, canvas), value=MASK)


def _keep_best(ids: Tensor, logits: Tensor, count: int, where: Tensor | None = None) -> Tensor:
    """Unmask the ``count`` most confident of the masked positions."""
    logits = logits.clone().float()
    logits[..., MASK] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    masked = ids == MASK if where is None else (ids == MASK) & where
    chosen = confidence.masked_fill(~masked, -1).topk(count, -1).indices
    return ids.scatter(1, chosen, tokens.gather(1, chosen))


def _shifted(logits: Tensor) -> Tensor:
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


@torch.no_grad()
def low_confidence(model: Any, prompt: Tensor, canvas: int) -> Tensor:
    """LLaDA: one forward a step on the whole canvas."""
    ids = _canvas(prompt, canvas)
    for _ in range(canvas):
        ids = _keep_best(ids, model(ids).logits, 1)
    return ids


@torch.no_grad()
def guided(model: Any, prompt: Tensor, canvas: int, scale: float = 1.5) -> Tensor:
    """LLaDA with classifier-free guidance: the batch is doubled, its second half without the prompt."""
    ids = _canvas(prompt, canvas)
    for _ in range(canvas):
        blind = ids.clone()
        blind[:, : prompt.shape[1]] = MASK
        with_prompt, without = model(torch.cat([ids, blind])).logits.chunk(2)
        ids = _keep_best(ids, without + (scale + 1) * (with_prompt - without), 1)
    return ids


@torch.no_grad()
def dream(model: Any, prompt: Tensor, canvas: int) -> Tensor:
    """Dream: shifted logits, least entropy first."""
    ids = _canvas(prompt, canvas)
    for _ in range(canvas):
        ids = _keep_best(ids, _shifted(model(ids, "full").logits), 1)
    return ids


@torch.no_grad()
def diffullama(model: Any, prompt: Tensor, canvas: int) -> Tensor:
    """DiffuLLaMA: a 4-D mask of zeros at each call, a bare tensor back, a random order."""
    ids, generator = _canvas(prompt, canvas), torch.Generator().manual_seed(0)
    for _ in range(canvas):
        mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        out = model(ids, attention_mask=mask)
        logits = _shifted(out if isinstance(out, Tensor) else out.logits)
        places = (ids[0] == MASK).nonzero().flatten()
        place = places[torch.randint(len(places), (1,), generator=generator)]
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, place] = True
        ids = _keep_best(ids, logits, 1, where)
    return ids


@torch.no_grad()
def growing(model: Any, prompt: Tensor, canvas: int, block: int = 2) -> Tensor:
    """LLaDA2: the sequence grows by blocks that see only earlier ones; the outer module is not called."""
    ids = prompt
    for _ in range(-(-canvas // block)):
        ids = _canvas(ids, block)
        of = (torch.arange(ids.shape[1]) - prompt.shape[1]).clamp_min(-1) // block
        # 1 where a position attends; as an additive mask where the attention is not eager.
        sees = (of[:, None] >= of[None]).float()[None, None].expand(len(ids), 1, -1, -1)
        if model.config._attn_implementation != "eager":
            sees = (1 - sees) * torch.finfo(torch.float32).min
        for _ in range(block):
            ids = _keep_best(ids, model.forward(ids, attention_mask=sees).logits, 1)
    return ids


@torch.no_grad()
def mdlm(model: Any, prompt: Tensor, canvas: int) -> Tensor:
    """MDLM: called by position with a noise level, fewer forwards than steps: a prediction is kept for two."""
    ids, logits = _canvas(prompt, canvas), None
    for step in range(canvas):
        if step % 2 == 0:
            logits = model(ids, torch.zeros(len(ids)))
        ids = _keep_best(ids, logits, 1)
    return ids


@torch.no_grad()
def open_dllm(model: Any, prompt: Tensor, canvas: int) -> Tensor:
    """Open-dLLM: Dream's, told at each call that attention is not causal."""
    ids = _canvas(prompt, canvas)
    for _ in range(canvas):
        ids = _keep_best(ids, _shifted(model(ids, is_causal=False).logits), 1)
    return ids


OWN = {
    "llada": low_confidence, "dream": dream, "diffullama": diffullama, "diffullama-plain": diffullama,
    "llada-moe": low_confidence, "llada2": growing, "mdlm": mdlm, "mdlm-hub": mdlm, "a2d": low_confidence,
    "open-dllm": open_dllm, "modernbert": low_confidence,
}  # fmt: skip

"""What a model does rather than what it is called: does it look ahead, does it honour a padding mask?"""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone


class CausalModelError(ValueError):
    """The model sees only what comes before each position: it is autoregressive, not a masked diffusion model."""


def probe_ids(backbone: Backbone, rows: int, length: int = 8) -> Tensor:
    """Return ids ``(rows, length)`` that all begin with a mask token and differ at every later position."""
    length = min(length, backbone.max_length)
    steps = torch.arange(rows)[:, None] * 7 + torch.arange(length)[None] * 3 + 1
    ids = steps % backbone.vocab_size
    ids[ids == backbone.mask_id] = (backbone.mask_id + 1) % backbone.vocab_size
    ids[:, 0] = backbone.mask_id
    return ids.to(backbone.device)


def noise_floor(logits: Tensor) -> float:
    """Largest difference that rounding explains between logits computed in two ways, in their dtype."""
    ulps = 16 if logits.dtype in (torch.float32, torch.float64) else 2
    return ulps * torch.finfo(logits.dtype).eps * float(logits.abs().max())


@torch.no_grad()
def looks_ahead(backbone: Backbone) -> bool:
    """Whether the logits at the first position change when every later token does."""
    first = backbone.forward(probe_ids(backbone, 2))[:, 0]
    return float((first[0] - first[1]).abs().max()) > noise_floor(first)


@torch.no_grad()
def honours_padding(backbone: Backbone) -> bool:
    """Whether tokens hidden by a padding mask have no effect, and those that are not hidden still do.

    Some published files ignore a padding mask and some turn causal when they are given one.
    """
    ids = probe_ids(backbone, 2)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, -3:] = False
    hidden = ids.clone()
    hidden[1, :-3] = hidden[0, :-3]
    first, second = backbone.forward(hidden, attention_mask=keep)[:, :-3]
    same = float((first - second).abs().max()) <= noise_floor(first)
    ahead = backbone.forward(ids, attention_mask=keep)[:, 0]
    return same and float((ahead[0] - ahead[1]).abs().max()) > noise_floor(ahead)


def probe(backbone: Backbone) -> bool:
    """Check a newly wrapped model; return whether it honours padding. Models on the meta device are not run.

    Raises:
        CausalModelError: it does not look ahead.
    """
    if any(parameter.is_meta for parameter in backbone.model.parameters()):
        return backbone.architecture.masks != "none"
    if backbone.max_length > 4 and not looks_ahead(backbone):
        raise CausalModelError(
            f"wrap: {backbone.name} does not look ahead: the logits at the first position stay the same when every "
            "later token changes, so it is a causal (autoregressive) model, or runs as one with this transformers "
            "version. timerome edits masked diffusion models, which attend in both directions; load the diffusion "
            "checkpoint, or give the architecture a call that lets every position see every other. "
            "If yours is meant to be so, pass check=False."
        )
    return backbone.architecture.masks != "none" and honours_padding(backbone)

"""What the corrupted run of a fact is given: other ids, or noise on the subject's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..backbones import Backbone
from ..diffusion import Encoded
from ..functional.corruption import noise_std, seeded_generator, subject_noise

Corruption = Literal["noise", "mask", "subject"]


@dataclass(frozen=True)
class CorruptedInput:
    """One draw of a fact's corruption.

    Attributes:
        ids: the fully masked state, its subject replaced where the corruption does that, ``(L,)``.
        noise: added to the embeddings at every step, ``(L, d)``, zero outside the subject; None for none.
    """

    ids: Tensor
    noise: Tensor | None = None


def corrupted_inputs(
    backbone: Backbone,
    sequences: Sequence[Encoded],
    corruption: Corruption,
    *,
    noise_scale: float,
    draws: int,
    seed: int,
) -> list[list[CorruptedInput]]:
    """Return the draws of each fact's corruption.

    - ``noise``: Gaussian, ``noise_scale`` standard deviations of the subject tokens' embeddings, all given facts taken
      together (ROME's rule, arXiv 2202.05262). One draw's noise is the same at every step, and the same in the
      corrupted run and in all runs restored from it.
    - ``mask``: the subject's tokens are replaced by mask tokens; there is one draw. They are prompt, not canvas: the
      loop neither predicts nor commits them.
    - ``subject``: the subject's tokens are replaced by those of another fact's subject of as many tokens, one a draw,
      as far as there are different ones.

    Args:
        backbone: the model.
        sequences: the facts, each with a subject.
        corruption: which.
        noise_scale: in standard deviations; used by ``noise`` alone.
        draws: wanted draws.
        seed: of the draws; a fact's depend on this and its id (and, through the standard deviation, on the set).

    Returns:
        One list a sequence; empty where ``subject`` finds no other subject of that length.
    """
    if not sequences:
        return []
    if corruption == "mask":
        return [[CorruptedInput(_with_subject(backbone, s, backbone.mask_id))] for s in sequences]
    if corruption == "noise":
        subjects = torch.cat([s.ids[s.subject] for s in sequences]).to(backbone.device)
        with torch.no_grad():
            std = noise_scale * noise_std(backbone.embedding(subjects))
        return [
            [
                CorruptedInput(
                    s.masked(backbone.mask_id),
                    subject_noise(s.subject, backbone.hidden_size, std, seeded_generator(seed, "noise", s.fact_id, k)),
                )
                for k in range(draws)
            ]
            for s in sequences
        ]
    found = []
    for s in sequences:
        own = tuple(s.ids[s.subject].tolist())
        others = sorted({tuple(o.ids[o.subject].tolist()) for o in sequences} - {own})
        others = [ids for ids in others if len(ids) == len(own)]
        order = torch.randperm(len(others), generator=seeded_generator(seed, "subject", s.fact_id)).tolist()
        found.append([CorruptedInput(_with_subject(backbone, s, torch.tensor(others[i]))) for i in order[:draws]])
    return found


def _with_subject(backbone: Backbone, sequence: Encoded, tokens: Tensor | int) -> Tensor:
    ids = sequence.masked(backbone.mask_id)
    ids[sequence.subject] = tokens
    return ids

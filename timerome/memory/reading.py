"""Read what a model computes for many states: each state once, and no further than what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Site
from ..hooks import can_stop, capture

BATCH_TOKENS = 2048  # of one forward on a GPU: enough to be fast, and no more than generating for some prompts takes


class Wish(NamedTuple):
    """What is to be read of one state.

    Attributes:
        ids: the state, ``(L,)``.
        at: the positions to read at each site, boolean ``(L,)``.
    """

    ids: Tensor
    at: Mapping[Site, Tensor]


@torch.no_grad()
def read(
    backbone: Backbone, wishes: Sequence[Wish], *, batch_tokens: int | None = None
) -> Iterator[tuple[int, dict[Site, Tensor]]]:
    """Yield the number of each wish with what was read, as the forwards come, not in order.

    A state that is wished for several times runs once, with others of its length only, so that none needs padding, or
    alone; a forward ends at the last block that is asked for.

    Args:
        backbone: the model.
        wishes: what to read.
        batch_tokens: most tokens of a forward of more than one state. By default a CPU runs every state by itself: what
            is read then depends on no other state, to the last bit, and batches would gain a tenth at most.

    Yields:
        The index of a wish, and each site's output at its positions, ``(n, d)``, on the model's device.
    """
    if batch_tokens is None:
        batch_tokens = 1 if backbone.device.type == "cpu" else BATCH_TOKENS
    stop = can_stop(backbone)
    alike: dict[bytes, list[int]] = {}
    for i, wish in enumerate(wishes):
        alike.setdefault(wish.ids.numpy().tobytes(), []).append(i)
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for same in alike.values():
        deepest = max(site.layer for i in same for site in wishes[i].at)
        groups.setdefault((len(wishes[same[0]].ids), deepest), []).append(same)
    for (length, _), states in sorted(groups.items()):
        rows = max(1, batch_tokens // length)
        for start in range(0, len(states), rows):
            batch = states[start : start + rows]
            sites = list(dict.fromkeys(site for same in batch for i in same for site in wishes[i].at))
            with capture(backbone, sites, stop=stop) as outputs:
                backbone.forward(torch.stack([wishes[same[0]].ids for same in batch]).to(backbone.device))
            for row, same in enumerate(batch):
                for i in same:
                    yield i, {s: outputs[s][row][where.to(outputs[s].device)] for s, where in wishes[i].at.items()}

"""Which sequence each row of a forward is, where its canvas lies, and which denoising step it is at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Role


@dataclass(frozen=True)
class Asked:
    """A sequence as it was asked: its fully masked state, by which it is addressed and recognised.

    Attributes:
        state: ids with the whole canvas masked, ``(L,)`` int64, on the CPU.
        canvas: its answer positions, boolean ``(L,)``, on the CPU.
    """

    state: Tensor
    canvas: Tensor

    @property
    def key(self) -> bytes:
        """Equal for two sequences that ask the same on the same canvas."""
        return self.state.numpy().tobytes() + self.canvas.numpy().tobytes()


@dataclass(frozen=True)
class Rows:
    """The rows of one forward.

    Attributes:
        ids: what the model sees, ``(B, L)``.
        canvas: the answer positions, masked or not, boolean ``(B, L)``.
        step: the denoising step, counted from 0 for each new batch.
        asked: what each row's sequence asks, B of them.
    """

    ids: Tensor
    canvas: Tensor
    step: int
    asked: tuple[Asked, ...]
    _masked: Tensor

    def positions(self, role: Role) -> Tensor:
        """Where an edit of this role acts: where masked answer tokens are predicted, or the prompt, ``(B, L)``."""
        return self._masked if role == "object" else ~self.canvas


class RowTracker:
    """Follows the sequences of a denoising loop from forward to forward, be it this library's or another.

    Which positions form the canvas is announced by this library's samplers (:meth:`Backbone.on_canvas`); in other loops
    it is what was masked when the sequence was first seen.

    Args:
        backbone: the model the loop runs.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._step = -1
        self._last: tuple[Tensor, Tensor] | None = None

    def begin(self, ids: Tensor) -> Rows:
        """Tell of the forward that begins with ``ids`` ``(B, L)``; return its rows."""
        mask_id = self.backbone.mask_id
        canvas = self._canvas_of(ids)
        continued = self._last is not None and _continues(self._last[0], ids, mask_id).all()
        self._step = self._step + 1 if continued else 0
        self._last = (ids.clone(), canvas)
        states, places = torch.where(canvas, mask_id, ids).cpu(), canvas.cpu()
        asked = tuple(Asked(state, place) for state, place in zip(states, places, strict=True))
        return Rows(ids, canvas, self._step, asked, self.backbone.reads_from(canvas & (ids == mask_id)))

    def _canvas_of(self, ids: Tensor) -> Tensor:
        if self.backbone.canvas is not None:
            return self.backbone.canvas.to(ids.device)
        masked = ids == self.backbone.mask_id
        if self._last is None or self._last[0].shape != ids.shape:
            return masked
        same = _continues(self._last[0], ids, self.backbone.mask_id)
        return torch.where(same[:, None], self._last[1], masked)


def _continues(before: Tensor, now: Tensor, mask_id: int) -> Tensor:
    """Whether each row of ``now`` is a later state of the same row of ``before``, boolean ``(B,)``."""
    if before.shape != now.shape:
        return torch.zeros(len(now), dtype=torch.bool, device=now.device)
    return ((before == now) | (before == mask_id)).all(1)

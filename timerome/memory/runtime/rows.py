"""Which sequence each row of a forward is, where its canvas lies, and which denoising step it is at.

Loops other than this library's tell nothing of this, so it is inferred from what the model is given: the ids that reach
the embedding, and the cache and positions that reach the first block (one call of it is one step). All of it happens on
the CPU: the ids of a batch are few, and each question asked of a GPU would be a wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...backbones import Backbone
from ...coordinates import Role
from ...errors import UnknownRowsError

REMEMBERED = 16  # batches that may go on: loops in turns, or a question asked between two steps of another


@dataclass(frozen=True)
class Asked:
    """A sequence as it was asked: its fully masked state, by which it is addressed and recognised.

    Attributes:
        state: ids with the whole canvas masked, ``(L,)`` int64, on the CPU.
        canvas: its answer positions, boolean ``(L,)``, on the CPU; none where nothing is asked.
    """

    state: Tensor
    canvas: Tensor

    @cached_property
    def key(self) -> bytes:
        """Equal for two sequences that ask the same on the same canvas."""
        return self.state.numpy().tobytes() + self.canvas.numpy().tobytes()


@dataclass(frozen=True)
class Rows:
    """The rows of one forward, each a sequence or, where the loop caches, a slice of one. Tensors are on the CPU.

    Attributes:
        backbone: the model.
        canvas: the answer positions, masked or not, boolean ``(B, L)``.
        step: the denoising step, counted from 0 for each new batch.
        problem: why the sequences are not known; empty where they are.
        whole: the whole sequences, ``(B, P)`` int64.
        generated: their answer positions, masked or not, boolean ``(B, P)``.
        columns: which positions of them the forward holds, ``(L,)``; None is all.
        notes: what has been found out about each sequence, kept from forward to forward.
        fresh: whether each sequence is new.
    """

    backbone: Backbone
    canvas: Tensor
    step: int
    problem: str
    _asked: tuple[Asked, ...]
    _ids: Tensor
    _awaited: Tensor
    whole: Tensor
    generated: Tensor
    columns: Tensor | None
    notes: tuple[dict[str, Any], ...]
    fresh: tuple[bool, ...]

    @property
    def asked(self) -> tuple[Asked, ...]:
        """What each row's whole sequence asks, B of them.

        Raises:
            UnknownRowsError: the sequences are not known.
        """
        if self.problem:
            raise UnknownRowsError(self.problem)
        return self._asked

    @cached_property
    def masked(self) -> Tensor:
        """Where masked answer tokens are predicted, boolean ``(B, L)``."""
        return self.backbone.reads_from(self._ids == self._awaited)

    @property
    def predicts(self) -> Tensor:
        """Which position of the whole sequence each column of the forward predicts, int64 ``(L,)``."""
        columns = torch.arange(self._ids.shape[1]) if self.columns is None else self.columns
        return columns + self.backbone.shift

    def positions(self, role: Role) -> Tensor:
        """Where an edit of this role acts: where masked answer tokens are predicted, or the prompt, ``(B, L)``."""
        return self.masked if role == "object" else ~self.canvas


@dataclass
class _Batch:
    """Sequences as last seen: ids and generated positions ``(B, L)``, what they ask, whether they ask nothing.

    Attributes:
        announced: the canvas that was announced with them.
        loop: what was announced to stand for their loop.
        notes: what has been found out about each row.
        step: the denoising step.
        fresh: whether each row was new in the forward before.
    """

    backbone: Backbone
    ids: Tensor
    generated: Tensor
    asked: tuple[Asked, ...]
    silent: Tensor
    announced: Tensor | None
    loop: object | None
    notes: tuple[dict[str, Any], ...]
    step: int = 0
    new: tuple[bool, ...] = ()

    def at(self, ids: Tensor) -> _Batch:
        """Move on to the ids of the next step; return the batch itself."""
        self.ids, self.step, self.new = ids, self.step + 1, (False,) * len(ids)
        return self

    @cached_property
    def canvas(self) -> Tensor:
        """The positions generated for rows that ask something."""
        return self.generated & ~self.silent[:, None]

    @cached_property
    def awaited(self) -> Tensor:
        """The mask where it stands for a token of the answer, -1 elsewhere."""
        return torch.where(self.canvas, self.backbone.mask_id, -1)

    @cached_property
    def fresh(self) -> Tensor:
        """The ids with all that is generated masked."""
        return self.ids.masked_fill(self.generated, self.backbone.mask_id)

    @cached_property
    def masks(self) -> list[int]:
        """How many masks each row has then; -1 for those of which nothing is generated."""
        found = (self.fresh == self.backbone.mask_id).sum(1)
        return found.masked_fill(~self.generated.any(1), -1).tolist()


class RowTracker:
    """Follows the sequences of a denoising loop from forward to forward, be it this library's or another.

    - **Canvas.** This library's samplers announce it (:meth:`Backbone.on_canvas`). In other loops it is what was masked
      when the sequence was first seen.
    - **Steps.** This library's samplers announce them too. In other loops a row goes on with a sequence seen in the
      forward before if all but its canvas is the same; tokens of the canvas may be unmasked, changed, or masked again,
      but not all of them: that is a new beginning. Rows may leave the batch or change places.
    - **Padding.** Special tokens before and after a row's text and canvas are no part of what it asks: a batch padded
      to one length is addressed as its rows are alone. Whether the model heeds them is the loop's affair.
    - **Guidance.** A row that holds nothing but masks and special tokens when it is first seen asks nothing, such as
      the unconditional half of classifier-free guidance. It has no canvas, so a row gate leaves it alone: what it
      predicts is what the model says without being asked, and guidance compares the edited answer with that. A memory
      without row gate edits it as it edits everything.
    - **Growing sequences.** A sequence whose canvas is all unmasked may come back longer, with new masks at its end.
      While its canvas has fewer positions than make an address, it is then asked anew, all its canvas masked again.
    - **Cached slices.** Where a cache of keys and values is passed to the first block, the rows are the part of the
      sequences at the positions given (``replace_position``, ``cache_position``) or after what is cached. Slices of
      sequences not seen before, or without knowable positions, are a problem, which :attr:`Rows.asked` raises.

    Args:
        backbone: the model the loop runs.
        span: how many answer positions make an address.
    """

    def __init__(self, backbone: Backbone, span: int = 16) -> None:
        self.backbone, self.span = backbone, span
        self._recent: list[_Batch] = []  # the latest last
        self._last: _Batch | None = None  # the one that is tried
        names = ("eos_token_id", "pad_token_id", "bos_token_id")
        special = {getattr(backbone.tokenizer, name, None) for name in names} | {backbone.eos_id, backbone.mask_id}
        self._special = torch.tensor(sorted(i for i in special if isinstance(i, int)))
        self._padding = self._special[self._special != backbone.mask_id]

    def begin(self, ids: Tensor, called: Mapping[str, Any] | None = None) -> Rows:
        """Tell of the forward that begins with ``ids`` ``(B, L)``; return its rows.

        Args:
            ids: what reached the embedding.
            called: keyword arguments of the first block's call, in which positions and caches are looked for.
        """
        columns = _columns(called or {}, ids.shape[1])
        columns, ids = None if columns is None else columns.cpu(), ids.cpu()
        batch = self._going_on(ids) if columns is None else None
        if batch is None:
            found, problem = self._best(ids, columns)
            if found is None:
                return self._unknown(ids, problem)
            batch = found
        self._recent = [*[b for b in self._recent if b is not batch and b is not self._last][1 - REMEMBERED :], batch]
        whole = batch.canvas, batch.awaited
        canvas, awaited = whole if columns is None else (of[:, columns] for of in whole)
        step, notes, new = batch.step, batch.notes, batch.new
        return Rows(
            self.backbone, canvas, step, "", batch.asked, ids, awaited, batch.ids, batch.canvas, columns, notes, new
        )

    def _going_on(self, ids: Tensor) -> _Batch | None:
        """Return the batch that plainly goes on by one step, moved on; None if none does."""
        masked = ids == self.backbone.mask_id
        for last in reversed(self._recent):
            self._last = last
            if self._announced_step(ids) or self._one_step_on(ids, masked):
                return last.at(ids)
        return None

    def _best(self, ids: Tensor, columns: Tensor | None) -> tuple[_Batch | None, str]:
        """Return the batch whose rows go on with most of those of a batch seen before; or why there is none."""
        best: tuple[int, _Batch, _Batch | None] | None = None
        self._last = None
        problem = "" if columns is None else self._why_unknown(ids, columns)
        for last in [*reversed(self._recent), *([None] if columns is None else [])]:
            self._last = last
            if columns is not None and (problem := self._why_unknown(ids, columns)):
                continue
            batch, known = self._follow(ids, columns)
            if columns is not None and not known.all():
                problem = _NOT_THE_SAME
                continue
            if last is not None and not known.any():
                continue
            if known.all() or best is None or int(known.sum()) > best[0]:
                best = int(known.sum()), batch, last
            if known.all():
                batch.step = 0 if last is None else last.step + 1
                break
        if best is None:
            return None, problem
        self._last = best[2]
        return best[1], ""

    def _unknown(self, ids: Tensor, problem: str) -> Rows:
        nowhere = torch.zeros_like(ids, dtype=torch.bool)
        return Rows(self.backbone, nowhere, 0, problem, (), ids, nowhere.long() - 1, ids, nowhere, None, (), ())

    def _why_unknown(self, ids: Tensor, columns: Tensor) -> str:
        """Why a slice cannot be placed, or an empty string."""
        if len(columns) != ids.shape[1]:
            return _NO_POSITIONS
        if self._last is None or len(self._last.ids) != len(ids) or int(columns[0]) > self._last.ids.shape[1]:
            return _BEGINNING_UNSEEN.format(int(columns[0]))
        return ""

    def _whole(self, ids: Tensor, columns: Tensor | None) -> Tensor:
        """The whole sequences, with what was last seen where a slice leaves off."""
        if columns is None:
            return ids.clone()
        assert self._last is not None
        more = max(0, int(columns.max()) + 1 - self._last.ids.shape[1])
        whole = torch.nn.functional.pad(self._last.ids, (0, more), value=self.backbone.mask_id)
        return whole.index_copy(1, columns, ids)

    def _follow(self, ids: Tensor, columns: Tensor | None) -> tuple[_Batch, Tensor]:
        """Return the batch of whole sequences, and which rows go on with one seen before, boolean ``(B,)``."""
        sliced = columns is not None
        ids = self._whole(ids, columns)
        masked = ids == self.backbone.mask_id
        said = self.backbone.announced
        announced = None if sliced or said.canvas is None else said.canvas.cpu()
        before = self._sources(ids, masked, announced, sliced)
        known = before >= 0
        if announced is None:
            silent, generated = torch.isin(ids, self._special).all(1), masked
        else:
            silent = ~announced.any(1)
            generated = torch.where(silent[:, None], masked, announced)
        generated = torch.where(silent[:, None], generated & self._answered(generated & ~silent[:, None]), generated)
        asked: list[Asked | None] = [None] * len(ids)
        notes: list[dict[str, Any]] = [{} for _ in ids]
        if self._last is not None and known.any():
            old, source = self._last.ids.shape[1], before.clamp_min(0)
            silent = torch.where(known, self._last.silent[source], silent)
            grown = torch.cat([self._last.generated[source], masked[:, old:]], 1)
            generated = torch.where(known[:, None], grown, generated)
            for row, i in enumerate(before.tolist()):
                if i < 0:
                    continue
                notes[row], earlier = self._last.notes[i], self._last.asked[i]
                if old == ids.shape[1] or int(earlier.canvas.sum()) >= self.span:
                    asked[row] = earlier
        canvas = generated & ~silent[:, None]
        if None in asked:
            states = torch.where(canvas, self.backbone.mask_id, ids)
            new = (self._unpadded(state, place) for state, place in zip(states, canvas, strict=True))
            asked = [earlier or now for earlier, now in zip(asked, new, strict=True)]
        what = tuple(a for a in asked if a)
        fresh = tuple((~known).tolist())
        given = None if sliced else said.canvas
        return _Batch(self.backbone, ids, generated, what, silent, given, said.loop, tuple(notes), 0, fresh), known

    def _answered(self, canvas: Tensor) -> Tensor:
        """Where a row that asks nothing is generated, ``(L,)``: where those are that ask, here or in a batch before.

        Its prompt is masked, too; were that generated, any row might go on with it.
        """
        batches = [canvas, *(b.canvas for b in reversed(self._recent) if b.ids.shape[1] == canvas.shape[1])]
        return next((c.any(0) for c in batches if c.any()), torch.ones(canvas.shape[1], dtype=torch.bool))

    def _announced_step(self, ids: Tensor) -> bool:
        """Whether the running loop is that of the forward before, and its sequences have not grown."""
        loop, last = self.backbone.announced.loop, self._last
        return loop is not None and last is not None and last.loop is loop and last.ids.shape == ids.shape

    def _one_step_on(self, ids: Tensor, masked: Tensor) -> bool:
        """Whether every row plainly goes on where it stands, as nearly all forwards do: what follows is not needed."""
        last, announced = self._last, self.backbone.announced.canvas
        if last is None or last.ids.shape != ids.shape:
            return False
        if announced is not last.announced and (
            announced is None or last.announced is None or not torch.equal(announced, last.announced)
        ):
            return False
        if not torch.equal(ids.masked_fill(last.generated, self.backbone.mask_id), last.fresh):
            return False
        # All that is generated masked again: begun anew.
        return all(now != then for now, then in zip(masked.sum(1).tolist(), last.masks, strict=True))

    def _unpadded(self, state: Tensor, canvas: Tensor) -> Asked:
        """What a row asks, without the special tokens before and after it that bring a batch to one length."""
        inside = (canvas | ~torch.isin(state, self._padding)).nonzero().flatten()
        if not canvas.any() or not len(inside):
            return Asked(state, canvas)
        kept = slice(int(inside[0]), int(inside[-1]) + 1)
        return Asked(state[kept].contiguous(), canvas[kept].contiguous())

    def _sources(self, ids: Tensor, masked: Tensor, announced: Tensor | None, sliced: bool) -> Tensor:
        """Which row of the batch before each row goes on with, ``(B,)``; -1 for none."""
        source, last = torch.full((len(ids),), -1), self._last
        if last is None or ids.shape[1] < last.ids.shape[1]:
            return source
        length = last.ids.shape[1]

        def goes_on(rows: Tensor, sources: Tensor, moved: bool) -> Tensor:
            old, new, canvas = last.ids[sources], ids[rows, :length], last.generated[sources]
            same = ((old == new) | canvas).all(1)
            if announced is not None:
                silent = last.silent[sources] & ~announced[rows].any(1)
                same &= silent | (announced[rows, :length] == canvas).all(1)
            left, had = masked[rows, :length] & canvas, (old == self.backbone.mask_id) & canvas
            if ids.shape[1] > length:
                return same & (sliced | ~left.any(1)) & masked[rows, length:].any(1)
            # A step may unmask nothing; but a fresh row in another place is rather a new beginning.
            return same & ((left != canvas).any(1) | (had == canvas).all(1) & (not moved))

        everyone = torch.arange(len(last.ids))
        here = everyone[: len(ids)]
        source[here] = torch.where(goes_on(here, here, False), here, -1)
        for row in [] if sliced else (source < 0).nonzero().flatten().tolist():
            found = goes_on(torch.full_like(everyone, row), everyone, True).nonzero().flatten()
            if len(found):
                source[row] = found[0]
        return source


_NO_POSITIONS = (
    "EditMemory: this loop caches keys and values, and feeds slices whose positions cannot be known; pass "
    "replace_position or cache_position to the model, generate without a cache, or use timerome.generate."
)
_BEGINNING_UNSEEN = (
    "EditMemory: this loop feeds a slice, from position {} on, of sequences whose beginning was not seen; attach the "
    "memory before the loop's first forward, or do without a cache."
)
_NOT_THE_SAME = (
    "EditMemory: this loop feeds cached slices that do not belong to the sequences seen before; give every sequence "
    "one whole forward while the memory is attached, or generate without a cache."
)


def _columns(called: Mapping[str, Any], length: int) -> Tensor | None:
    """The positions of a slice of ``length``, empty where they cannot be known; None where rows are whole sequences."""
    replaced = called.get("replace_position")
    if isinstance(replaced, (tuple, list)) and len(replaced) == 2:
        return torch.arange(int(replaced[0]), int(replaced[1]))
    if isinstance(replaced, Tensor) and replaced.dim() == 2:
        same = bool((replaced == replaced[:1]).all())
        return replaced[0].nonzero().flatten() if same else torch.empty(0, dtype=torch.int64)
    names = ("layer_past", "past_key_value", "past_key_values")
    cache = next((called[name] for name in names if called.get(name) is not None), None)
    cached = 0 if cache is None else _cached(cache)
    if cached == 0:
        return None
    given = called.get("cache_position")
    if isinstance(given, Tensor) and given.dim() == 1:
        return given
    return torch.empty(0, dtype=torch.int64) if cached is None else torch.arange(cached, cached + length)


def _cached(cache: Any) -> int | None:
    """How many positions a layer's cache holds; None where it does not say."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], Tensor):
        return int(cache[0].shape[1 if cache[0].dim() == 3 else -2])  # (B, L, d), or (B, heads, L, d / heads)
    return 0 if isinstance(cache, (tuple, list)) and not cache else None

"""The denoising loop of every published sampler, and generation with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ..backbones import Backbone
from .choice import confidences, gumbel, highest, keep_likely, times
from .config import SamplerConfig
from .states import by_length


@dataclass(frozen=True)
class StepEvent:
    """What a listener sees after each forward of the loop, before tokens are committed.

    Attributes:
        step: index of the denoising step, from 0.
        ids: the state the model saw, ``(B, L)``; where sequences grow, L does.
        canvas: the generated positions, ``(B, L)``.
        logits: float32, aligned with the positions they predict, ``(B, L, V)``.
    """

    step: int
    ids: Tensor
    canvas: Tensor
    logits: Tensor


Listener = Callable[[StepEvent], None]


@dataclass(frozen=True)
class _Step:
    """One step of the plan.

    Attributes:
        block: whose masks may be unmasked.
        left: steps left in the block, this one included.
        rate: share, or chance, of the masks to unmask.
        share: the least number to unmask, of ``threshold`` transfer.
        greedy: take the most probable tokens, whatever the temperature.
    """

    block: int
    left: int
    rate: float = 1.0
    share: int = 1
    greedy: bool = False


class DenoisingLoop:
    """The state of one batch's generation, advanced a step at a time.

    Args:
        backbone: the model.
        ids: ``(B, L)`` int64; canvas positions that hold the mask token are generated.
        canvas: True where tokens are generated, ``(B, L)`` or ``(L,)``; the same count in every row.
        config: how the canvas is unmasked.

    Raises:
        ValueError: shapes disagree, rows have canvases of different sizes, or the backbone has no end-of-text token
            and the config speaks of it.

    Example:
        >>> import timerome as tr
        >>> from timerome.diffusion import DenoisingLoop, SamplerConfig
        >>> backbone = tr.load("testbed")
        >>> ids = torch.tensor([backbone.encode("The capital city of Kenya is") + [backbone.mask_id] * 2])
        >>> loop = DenoisingLoop(backbone, ids, ids == backbone.mask_id, SamplerConfig(steps=2))
        >>> while not loop.done:
        ...     event = loop.advance()
        >>> bool((loop.ids == backbone.mask_id).any())
        False
    """

    def __init__(self, backbone: Backbone, ids: Tensor, canvas: Tensor, config: SamplerConfig) -> None:
        if canvas.dim() == 1:
            canvas = canvas.expand_as(ids)
        if ids.dim() != 2 or canvas.shape != ids.shape:
            raise ValueError(
                f"DenoisingLoop: expected ids (B, L) and canvas of the same shape, got {tuple(ids.shape)} and "
                f"{tuple(canvas.shape)}."
            )
        sizes = canvas.sum(1)
        if len(sizes) and bool((sizes != sizes[0]).any()):
            raise ValueError(
                f"DenoisingLoop: expected canvases of one size, got {sizes.tolist()}; batch by canvas size."
            )
        if backbone.eos_id is None and (config.eos != "free" or config.stop_at_eos):
            raise ValueError(f"DenoisingLoop: {backbone.name} has no end-of-text token to avoid or to stop at.")
        self.backbone, self.config = backbone, config
        self.ids = ids.to(backbone.device).clone()
        self.canvas = canvas.to(backbone.device).clone()
        self.step = 0
        self._announced = object()  # not the loop: whoever is told of it would keep all it holds
        self._generator = torch.Generator().manual_seed(config.seed)
        self._kept: tuple[Tensor, Tensor] | None = None
        size = int(sizes[0]) if len(sizes) else 0
        block = min(config.block_length or size, size) or 1
        # Position of each canvas token within its row's canvas decides its block; where the sequence grows, its
        # position in the row.
        order = self.canvas.cumsum(1) - 1
        if config.grow:
            assert config.block_length is not None
            block = config.block_length
            order = torch.arange(ids.shape[1], device=order.device).expand_as(order)
        self._block_length = block
        self._block_of = torch.where(self.canvas, order // block, -1)
        blocks = [b for b in self._block_of.unique().tolist() if b >= 0]
        self._plan = [step for i in range(len(blocks)) for step in _plan_block(config, blocks, i, block)]

    @property
    def steps(self) -> int:
        """Number of forwards the loop makes in all; at most, where blocks may end early."""
        return len(self._plan)

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= len(self._plan)

    @property
    def visible(self) -> int:
        """How many positions of each row the model sees at this step, from the first."""
        if not self.config.grow or self.done:
            return self.ids.shape[1]
        return min(self.ids.shape[1], (self._plan[self.step].block + 1) * self._block_length)

    def predict(self) -> Tensor:
        """Run the model on the present state; return logits ``(B, L, V)``, L being :attr:`visible`."""
        ids, canvas = self.ids[:, : self.visible], self.canvas[:, : self.visible]
        sees = self._block_causal(ids) if self.config.grow else None
        if self.config.reuse and self._kept is not None and torch.equal(self._kept[0], ids):
            return self._kept[1]
        with self.backbone.on_loop(self._announced):
            logits = self._guided(ids, canvas, sees)
        if self.config.reuse:
            self._kept = (ids, logits)
        return logits

    def _guided(self, ids: Tensor, canvas: Tensor, sees: Tensor | None) -> Tensor:
        """Return the model's logits, with classifier-free guidance where asked for."""
        if self.config.cfg_scale > 0:
            # Nothing is asked in the second half: it has no canvas, so that no row gate opens for it.
            unasked = torch.where(canvas, ids, self.backbone.mask_id)
            both = self.backbone.logits(
                torch.cat([ids, unasked]),
                torch.cat([canvas, torch.zeros_like(canvas)]),
                attention_mask=None if sees is None else torch.cat([sees, sees]),
            )
            asked, free = both.chunk(2)
            return free + (self.config.cfg_scale + 1) * (asked - free)
        return self.backbone.logits(ids, canvas, attention_mask=sees)

    def _block_causal(self, ids: Tensor) -> Tensor:
        """Which position sees which, ``(B, L, L)``: those of its own block and of the blocks before."""
        block = torch.arange(ids.shape[1], device=ids.device) // self._block_length
        return (block[:, None] >= block).expand(len(ids), -1, -1)

    def commit(self, logits: Tensor, at: Tensor | None = None) -> Tensor:
        """Unmask this step's share of positions from ``logits`` and move on; return the new ids ``(B, L)``.

        Args:
            logits: of every position, ``(B, L, V)``, or those of the positions ``at`` alone, row after row, ``(n, V)``.
            at: boolean ``(B, L)``; True at least at every mask, and, with an ``editing_threshold``, on all the canvas.

        Raises:
            FloatingPointError: logits are NaN or infinite.
        """
        step, end = self._plan[self.step], (logits if at is None else at).shape[1]
        ids = self.ids[:, :end]
        block = self._block_of[:, :end] == step.block
        masked = block & (ids == self.backbone.mask_id)
        editable = block & ~masked if self.config.editing_threshold is not None else torch.zeros_like(block)
        where = masked | editable
        tokens, confidence = self._choose(logits[where if at is None else where[at]], where, step.greedy)
        chosen = self._select(step, masked, confidence)
        if self.config.editing_threshold is not None:
            chosen |= editable & (confidence > self.config.editing_threshold) & (tokens != ids)
        had_masks, changed = bool(masked.any()), bool(chosen.any())
        self.ids = torch.cat([torch.where(chosen, tokens, ids), self.ids[:, end:]], 1)
        self.step += 1
        self._close(step.block, had_masks, changed)
        return self.ids

    def advance(self, listener: Listener | None = None) -> StepEvent:
        """Predict and commit one step; return (and tell ``listener``) what the model saw and said."""
        seen = self.visible
        event = StepEvent(self.step, self.ids[:, :seen], self.canvas[:, :seen], self.predict())
        if listener is not None:
            listener(event)
        self.commit(event.logits)
        return event

    def _uniform(self, row: int, what: str, *shape: int) -> Tensor:
        """Uniform random numbers for the ``tokens``, or for the ``order``, of one row at this step; float64, CPU."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def _choose(self, found: Tensor, where: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        """Predict a token at each of the n positions ``where``, and say how sure it is; both ``(B, L)``.

        Their logits ``found``, ``(n, V)``, are written to.
        """
        config, eos_id, mask_id = self.config, self.backbone.eos_id, self.backbone.mask_id
        if config.eos == "never":
            found[:, eos_id] = -torch.inf
        of_mask = found[:, mask_id].clone()
        found[:, mask_id] = -torch.inf  # a mask is never a prediction, but counts when it is asked how sure one is
        bad = ~torch.isfinite(found.amax(-1))
        if bad.any():
            raise FloatingPointError(
                f"DenoisingLoop: logits are not finite in rows {where.nonzero()[bad, 0].unique().tolist()[:8]} of the "
                "batch; check the weights, the dtype and any memory attached."
            )
        heat = 0.0 if greedy else config.temperature
        token = self._sample(found / heat, where) if heat > 0 else found.argmax(-1)
        found[:, mask_id] = of_mask
        tokens = torch.zeros(where.shape, dtype=torch.int64, device=found.device)
        tokens[where] = token
        if config.transfer == "independent":
            return tokens, tokens
        if config.remasking == "random":
            return tokens, self._order(where)
        if config.eos == "last":
            found[:, [eos_id, *config.end_ids]] = -torch.inf
        if config.sampled_confidence:
            found = keep_likely(found / heat if heat > 0 else found, config.top_p, config.top_k)
        confidence = torch.full(where.shape, -torch.inf, dtype=found.dtype, device=found.device)
        confidence[where] = confidences(found, token, config.remasking)
        return tokens, confidence

    def _sample(self, scores: Tensor, where: Tensor) -> Tensor:
        """Sample a token ``(n,)`` from logits ``(n, V)`` of the n positions ``where`` ``(B, L)``."""
        scores = keep_likely(scores, self.config.top_p, self.config.top_k).double()
        found, shape = [], (where.shape[1], scores.shape[-1])
        for row, mine in enumerate(scores.split(where.sum(1).tolist())):  # a row at a time: its noise is large
            noise = gumbel(self._uniform(row, "tokens", *shape).to(scores.device)[where[row]])
            found.append((mine + noise).argmax(-1))
        return torch.cat(found)

    def _order(self, where: Tensor) -> Tensor:
        """Uniform random numbers for every position, ``(B, L)`` float64."""
        rows = [self._uniform(row, "order", where.shape[1]) for row in range(len(where))]
        return torch.stack(rows).to(where.device)

    def _select(self, step: _Step, masked: Tensor, confidence: Tensor) -> Tensor:
        """Which masked positions to unmask now, boolean ``(B, L)``."""
        config, left = self.config, masked.sum(1)
        if config.transfer == "independent":
            return masked if step.rate >= 1 else masked & (self._order(masked) < step.rate)
        confidence = confidence.masked_fill(~masked, -torch.inf)
        if config.transfer == "threshold":
            sure = confidence > config.threshold
            least = masked & highest(confidence, left.clamp(max=step.share))
            return torch.where(sure.sum(1, keepdim=True) >= step.share, sure, least)
        counts = torch.ceil(left / step.left) if config.transfer == "even" else (left * step.rate).floor()
        if config.alg_temp:
            # The highest of scores with Gumbel noise are a sample without replacement from their softmax.
            confidence = confidence / config.alg_temp + gumbel(self._order(masked))
        return masked & highest(confidence, counts)

    def _close(self, block: int, had_masks: bool, changed: bool) -> None:
        """After a step: leave a block that needs no more steps, and stop where every row has come to its end."""
        rest = self._plan[self.step :]
        if self.config.transfer == "threshold" and rest and rest[0].block == block:
            masks = bool(((self.ids == self.backbone.mask_id) & (self._block_of == block)).any())
            if not masks:
                here = sum(step.block == block for step in rest)
                keep = min(here, self.config.max_post_steps) if self.config.editing_threshold is not None else 0
                del self._plan[self.step + (keep if had_masks else here if changed else 0) : self.step + here]
        ended = self.done or self._plan[self.step].block != block
        if self.config.stop_at_eos and ended and ((self.ids == self.backbone.eos_id) & self.canvas).any(1).all():
            del self._plan[self.step :]
            empty = self.canvas & (self.ids == self.backbone.mask_id)
            self.ids = self.ids.masked_fill(empty, self.backbone.eos_id or 0)


def _plan_block(config: SamplerConfig, blocks: list[int], i: int, length: int) -> list[_Step]:
    """The steps of the ``i``-th of the ``blocks``, each of ``length`` positions."""
    block = blocks[i]
    if config.transfer == "threshold":
        n = min(config.steps, length)
        shares = [length // n + (k < length % n) for k in range(n)]
        if config.num_to_transfer is not None:
            shares = [config.num_to_transfer] * -(-length // config.num_to_transfer)
        if config.editing_threshold is not None:
            shares += [1] * config.max_post_steps
        return [_Step(block, len(shares) - k, share=share) for k, share in enumerate(shares)]
    # A block needs at least one step, also where fewer steps than blocks were asked for.
    n = max(1, config.steps // len(blocks) + (i < config.steps % len(blocks)))
    rates = times(n, config.eps)
    if not config.noise_removal:
        rates[-1] = 1.0
    plan = [_Step(block, n - k, rate) for k, rate in enumerate(rates)]
    return plan + [_Step(block, 1, greedy=True)] * config.noise_removal


@overload
def generate(backbone: Backbone, prompts: str, *, canvas: int = 64, config: SamplerConfig | None = None, batch_size: int = 32, listener: Listener | None = None) -> str: ...  # type: ignore[overload-overlap]  # fmt: skip  # noqa: E501
@overload
def generate(backbone: Backbone, prompts: Sequence[str], *, canvas: int = 64, config: SamplerConfig | None = None, batch_size: int = 32, listener: Listener | None = None) -> list[str]: ...  # fmt: skip  # noqa: E501
@torch.no_grad()
def generate(
    backbone: Backbone,
    prompts: str | Sequence[str],
    *,
    canvas: int = 64,
    config: SamplerConfig | None = None,
    batch_size: int = 32,
    listener: Listener | None = None,
) -> str | list[str]:
    """Answer prompts by denoising a canvas of a given length; the text ends at the first end-of-text token.

    Args:
        backbone: the model, with whatever is attached to it.
        prompts: one text, or several.
        canvas: number of answer positions.
        config: how the canvas is unmasked.
        batch_size: prompts of one length that are run together.
        listener: told about each step of each batch.

    Returns:
        One text a prompt, in order, without leading or trailing white space; of a single prompt its text.

    Raises:
        ValueError: ``canvas`` is not positive, a prompt is empty, or prompt and canvas exceed the context.
    """
    if isinstance(prompts, str):
        (text,) = generate(backbone, [prompts], canvas=canvas, config=config, batch_size=batch_size, listener=listener)
        return text
    encoded = [backbone.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ValueError(f"generate: expected prompts with at least one token, got {prompt!r}.")
    found = complete(backbone, encoded, canvas=canvas, config=config, batch_size=batch_size, listener=listener)
    return [backbone.decode(row).strip() for row in found]


@torch.no_grad()
def complete(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    canvas: int = 64,
    config: SamplerConfig | None = None,
    batch_size: int = 32,
    listener: Listener | None = None,
) -> list[Tensor]:
    """Complete prompts given as token ids, as :func:`generate` does; return the canvas of each, int64 ``(canvas,)``.

    Raises:
        ValueError: ``canvas`` is not positive, or prompt and canvas exceed the context.
    """
    if canvas < 1:
        raise ValueError(f"generate: expected a canvas of at least one token, got {canvas}.")
    config = config or SamplerConfig()
    found = [torch.empty(0, dtype=torch.int64)] * len(prompts)
    for batch in by_length([len(tokens) for tokens in prompts], batch_size):
        prompt_ids = torch.tensor([list(prompts[i]) for i in batch], dtype=torch.int64, device=backbone.device)
        # A growing sequence ends with a whole block; what is beyond the canvas is left out of the text.
        spare = -(prompt_ids.shape[1] + canvas) % config.block_length if config.grow and config.block_length else 0
        ids = torch.nn.functional.pad(prompt_ids, (0, canvas + spare), value=backbone.mask_id)
        where = torch.arange(ids.shape[1], device=ids.device) >= prompt_ids.shape[1]
        loop = DenoisingLoop(backbone, ids, where, config)
        with backbone.on_rows(batch):
            while not loop.done:
                loop.advance(listener)
        for i, row in zip(batch, loop.ids[:, prompt_ids.shape[1] :][:, :canvas], strict=True):
            found[i] = row
    return found

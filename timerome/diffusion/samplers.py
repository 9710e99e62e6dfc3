"""The denoising loop: LLaDA's low-confidence and random unmasking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..backbones import Backbone
from .states import by_length

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class SamplerConfig:
    """How a canvas is unmasked (LLaDA, Nie et al. 2025, arXiv 2502.09992, and its published ``generate``).

    Attributes:
        steps: denoising steps over the whole canvas, shared out evenly over its blocks.
        block_length: canvas positions that are unmasked before the next block begins; None is the whole canvas.
        temperature: of Gumbel noise added to the logits; 0 is greedy.
        remasking: which predictions are kept at a step: the most confident, or random ones.
        seed: of the noise and of random remasking.

    Raises:
        ValueError: a field is outside its range.
    """

    steps: int = 16
    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"SamplerConfig: expected steps >= 1, got {self.steps}.")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"SamplerConfig: expected block_length >= 1 or None, got {self.block_length}.")
        if self.temperature < 0:
            raise ValueError(f"SamplerConfig: expected temperature >= 0, got {self.temperature}.")
        if self.remasking not in get_args(Remasking):
            raise ValueError(f"SamplerConfig: expected remasking in {get_args(Remasking)}, got {self.remasking!r}.")


@dataclass(frozen=True)
class StepEvent:
    """What a listener sees after each forward of the loop, before tokens are committed.

    Attributes:
        step: index of the denoising step, from 0.
        ids: the state the model saw, ``(B, L)``.
        canvas: the generated positions, ``(B, L)``.
        logits: float32, aligned with the positions they predict, ``(B, L, V)``.
    """

    step: int
    ids: Tensor
    canvas: Tensor
    logits: Tensor


Listener = Callable[[StepEvent], None]


class DenoisingLoop:
    """The state of one batch's generation, advanced a step at a time.

    Args:
        backbone: the model.
        ids: ``(B, L)`` int64; canvas positions that hold the mask token are generated.
        canvas: True where tokens are generated, ``(B, L)`` or ``(L,)``; the same count in every row.
        config: how the canvas is unmasked.

    Raises:
        ValueError: shapes disagree, or rows have canvases of different sizes.

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
        self.backbone, self.config = backbone, config
        self.ids = ids.to(backbone.device).clone()
        self.canvas = canvas.to(backbone.device).clone()
        self.step = 0
        self._generator = torch.Generator().manual_seed(config.seed)
        size = int(sizes[0]) if len(sizes) else 0
        block = min(config.block_length or size, size) or 1
        # Position of each canvas token within its row's canvas decides its block.
        order = self.canvas.cumsum(1) - 1
        self._block_of = torch.where(self.canvas, order // block, -1)
        blocks = -(-size // block)
        per_block = [config.steps // blocks + (i < config.steps % blocks) for i in range(blocks)] if blocks else []
        # A block needs at least one step, also where fewer steps than blocks were asked for.
        self._plan = [(b, n - i) for b, n in enumerate(max(1, n) for n in per_block) for i in range(n)]

    @property
    def steps(self) -> int:
        """Number of forwards the loop makes in all."""
        return len(self._plan)

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= len(self._plan)

    def predict(self) -> Tensor:
        """Run the model on the present state; return logits ``(B, L, V)``."""
        return self.backbone.logits(self.ids, self.canvas)

    def commit(self, logits: Tensor) -> Tensor:
        """Unmask this step's share of positions from ``logits`` and move on; return the new ids ``(B, L)``.

        Raises:
            FloatingPointError: logits are NaN or infinite.
        """
        block, steps_left = self._plan[self.step]
        masked = (self.ids == self.backbone.mask_id) & (self._block_of == block)
        tokens, confidence = self._choose(logits)
        confidence = confidence.masked_fill(~masked, -torch.inf)
        counts = torch.ceil(masked.sum(1) / steps_left).long()
        order = confidence.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        self.ids = torch.where(masked & (rank < counts[:, None]), tokens, self.ids)
        self.step += 1
        return self.ids

    def advance(self, listener: Listener | None = None) -> StepEvent:
        """Predict and commit one step; return (and tell ``listener``) what the model saw and said."""
        event = StepEvent(self.step, self.ids, self.canvas, self.predict())
        if listener is not None:
            listener(event)
        self.commit(event.logits)
        return event

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone()
        logits[..., self.backbone.mask_id] = -torch.inf  # a mask is never a prediction
        if self.config.temperature > 0:
            # Float64, as the published sampler: in float32 Gumbel noise loses its tail.
            noise = torch.rand(logits.shape, generator=self._generator, dtype=torch.float64).to(logits.device)
            tokens = (logits.double() - self.config.temperature * torch.log(-torch.log(noise))).argmax(-1)
        else:
            tokens = logits.argmax(-1)
        # argmax chooses NaN before all else, so looking at what was chosen is enough.
        bad = (~torch.isfinite(logits.gather(-1, tokens[..., None]))).flatten(1).any(1)
        if bad.any():
            raise FloatingPointError(
                f"DenoisingLoop: logits are not finite in rows {bad.nonzero().flatten().tolist()[:8]} of the batch; "
                "check the weights, the dtype and any memory attached."
            )
        if self.config.remasking == "random":
            return tokens, torch.rand(tokens.shape, generator=self._generator).to(logits.device)
        return tokens, logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    canvas: int = 64,
    config: SamplerConfig | None = None,
    batch_size: int = 32,
    listener: Listener | None = None,
) -> list[str]:
    """Answer prompts by denoising a canvas of a given length; the text ends at the first end-of-text token.

    Args:
        backbone: the model, with whatever is attached to it.
        prompts: texts.
        canvas: number of answer positions.
        config: how the canvas is unmasked.
        batch_size: prompts of one length that are run together.
        listener: told about each step of each batch.

    Returns:
        One text a prompt, in order, without leading or trailing white space.

    Raises:
        ValueError: ``canvas`` is not positive, a prompt is empty, or prompt and canvas exceed the context.
    """
    if canvas < 1:
        raise ValueError(f"generate: expected a canvas of at least one token, got {canvas}.")
    encoded = [backbone.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ValueError(f"generate: expected prompts with at least one token, got {prompt!r}.")
    texts = [""] * len(prompts)
    for batch in by_length([len(tokens) for tokens in encoded], batch_size):
        prompt_ids = torch.tensor([encoded[i] for i in batch], device=backbone.device)
        ids = torch.nn.functional.pad(prompt_ids, (0, canvas), value=backbone.mask_id)
        where = torch.arange(ids.shape[1], device=ids.device) >= prompt_ids.shape[1]
        loop = DenoisingLoop(backbone, ids, where, config or SamplerConfig())
        while not loop.done:
            loop.advance(listener)
        for i, row in zip(batch, loop.ids[:, prompt_ids.shape[1] :], strict=True):
            texts[i] = backbone.decode(row).strip()
    return texts

"""How a canvas is unmasked: one description for the samplers of all published backbones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Remasking = Literal["low_confidence", "random", "topk_margin", "entropy"]
Transfer = Literal["even", "schedule", "independent", "threshold"]
Eos = Literal["free", "last", "never"]
DreamAlgorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True)
class SamplerConfig:
    """How a canvas is unmasked. The defaults are LLaDA's low-confidence decoding in 16 steps.

    Each step predicts a token for every masked position, ranks the predictions (``remasking``), and keeps some of them
    (``transfer``). The class methods give the published samplers with their published defaults.

    A mask is never predicted: the published samplers may commit one, which leaves a hole in the answer. Confidences are
    those of the whole vocabulary, the mask included, as published.

    Attributes:
        steps: denoising steps over the whole canvas, shared out evenly over its blocks; with ``threshold``, at most so
            many for each block.
        block_length: canvas positions that are unmasked before the next block begins; None is the whole canvas.
        temperature: of the sampled tokens; 0 is greedy.
        remasking: which predictions are kept first: the most probable, random ones, those furthest ahead of the second
            best, or those of the distribution with the least entropy.
        seed: of all random choices.
        transfer: how many are kept at a step. ``even``: equal shares (LLaDA). ``schedule``: the whole part of
            masked · (1 - s/t), times t falling evenly from 1 to ``eps``, all at the last step (Dream).
            ``independent``: each position by itself with probability 1 - s/t (Dream's ``origin``, DiffuLLaMA, MDLM).
            ``threshold``: all that are more probable than ``threshold``, and at least the step's share (LLaDA2).
        eps: the last time of ``schedule`` and ``independent``.
        top_p: sample from the smallest set of tokens of this probability; None from all.
        top_k: sample from so many most probable tokens; None from all.
        sampled_confidence: rank by the distribution sampled from, after ``temperature``, ``top_p`` and ``top_k``
            (Dream), rather than by the model's own (LLaDA).
        alg_temp: temperature of the order in which predictions are kept; None or 0 is the order itself (Dream).
        cfg_scale: classifier-free guidance, u + (1 + scale)(c - u), where u are the logits with the prompt masked. The
            rows with masked prompts run in the same forward; they are asked nothing, so no row gate opens for them.
        eos: ``never`` predicts an end token, ``last`` keeps it after all others (LLaDA's ``logits_eos_inf`` and
            ``confidence_eos_eot_inf``).
        end_ids: end tokens besides the backbone's end-of-text for ``last``, such as LLaDA's ``<|eot_id|>``, 126348.
        noise_removal: after the last step, one more that takes the most probable token wherever a mask is left (MDLM).
        reuse: make no forward where no token changed since the last (MDLM's ``ddpm_cache``).
        grow: show the model only what lies before the end of the present block; blocks are counted from the start of
            the sequence, the prompt included (LLaDA2).
        threshold: of ``threshold`` transfer, a probability.
        num_to_transfer: the least number kept at a step of ``threshold`` transfer; None is the even share of the block.
        editing_threshold: replace tokens of the present block for which another is more probable than this (LLaDA2.1);
            None never does.
        max_post_steps: steps of editing after a block holds no mask any more.
        stop_at_eos: begin no new block once every row has an end-of-text token; fill up with end-of-text.

    Raises:
        ValueError: a field is outside its range, or does not go with another.

    Example:
        >>> SamplerConfig.dream("entropy", steps=8, temperature=0.2, top_p=0.95).transfer
        'schedule'
    """

    steps: int = 16
    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    seed: int = 0
    transfer: Transfer = "even"
    eps: float = 1e-3
    top_p: float | None = None
    top_k: int | None = None
    sampled_confidence: bool = False
    alg_temp: float | None = None
    cfg_scale: float = 0.0
    eos: Eos = "free"
    end_ids: tuple[int, ...] = ()
    noise_removal: bool = False
    reuse: bool = False
    grow: bool = False
    threshold: float = 0.95
    num_to_transfer: int | None = None
    editing_threshold: float | None = None
    max_post_steps: int = 16
    stop_at_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "block_length", "top_k", "num_to_transfer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                optional = "" if name == "steps" else " or None"
                raise ValueError(f"SamplerConfig: expected {name} >= 1{optional}, got {value}.")
        for name in ("temperature", "alg_temp", "cfg_scale", "max_post_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"SamplerConfig: expected {name} >= 0, got {value}.")
        for name in ("eps", "top_p", "threshold", "editing_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"SamplerConfig: expected {name} between 0 and 1, got {value}.")
        for name, known in (("remasking", Remasking), ("transfer", Transfer), ("eos", Eos)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"SamplerConfig: expected {name} in {get_args(known)}, got {getattr(self, name)!r}.")
        if self.grow and self.block_length is None:
            raise ValueError("SamplerConfig: grow shows block after block, so it needs a block_length, got None.")
        if self.editing_threshold is not None and self.transfer != "threshold":
            raise ValueError(f"SamplerConfig: editing goes with transfer='threshold', got {self.transfer!r}.")

    def describe(self) -> str:
        """Say which rank, how many steps, and what else differs from the defaults but seed and temperature."""
        plain, told = SamplerConfig(), ("remasking", "steps", "seed", "temperature")
        more = [
            f"{name} {value}"
            for name, value in vars(self).items()
            if name not in told and value != getattr(plain, name)
        ]
        return ", ".join([self.remasking, f"{self.steps} steps", *more])

    @classmethod
    def llada(cls, steps: int = 128, **changes: Any) -> SamplerConfig:
        """LLaDA, LLaDA-MoE, MMaDA (text) and dLLM's a2d models: ``generate`` of ML-GSAI/LLaDA."""
        return cls(steps=steps, **changes)

    @classmethod
    def dream(cls, alg: DreamAlgorithm = "origin", steps: int = 512, **changes: Any) -> SamplerConfig:
        """Dream and Open-dLLM: ``diffusion_generate``.

        Raises:
            ValueError: an unknown algorithm.
        """
        if alg not in get_args(DreamAlgorithm):
            raise ValueError(f"SamplerConfig.dream: expected alg in {get_args(DreamAlgorithm)}, got {alg!r}.")
        ranks: dict[str, Remasking] = {"topk_margin": "topk_margin", "entropy": "entropy"}
        made = cls(
            steps=steps,
            transfer="independent" if alg == "origin" else "schedule",
            remasking=ranks.get(alg, "low_confidence"),
            sampled_confidence=True,
        )
        return replace(made, **changes)

    @classmethod
    def diffullama(cls, steps: int = 64, **changes: Any) -> SamplerConfig:
        """DiffuLLaMA: ``generate_samples``, which unmasks 1/t of what is left, whichever it is, at each step."""
        return replace(cls(steps=steps, transfer="independent", eps=0.0, temperature=0.9, top_p=0.9), **changes)

    @classmethod
    def mdlm(cls, steps: int = 128, **changes: Any) -> SamplerConfig:
        """MDLM: ``ddpm_cache`` sampling with noise removal, log-linear noise."""
        made = cls(steps=steps, transfer="independent", eps=1e-5, temperature=1.0, noise_removal=True, reuse=True)
        return replace(made, **changes)

    @classmethod
    def llada2(cls, steps: int = 32, **changes: Any) -> SamplerConfig:
        """LLaDA2.0: blocks of 32, all predictions above the threshold at once, the sequence growing block by block."""
        made = cls(
            steps=steps, block_length=32, transfer="threshold", sampled_confidence=True, grow=True, stop_at_eos=True
        )
        return replace(made, **changes)

    @classmethod
    def llada21(cls, **changes: Any) -> SamplerConfig:
        """LLaDA2.1: LLaDA2.0 that also replaces tokens already there, until a block no longer changes."""
        return replace(cls.llada2(num_to_transfer=1, editing_threshold=0.9, stop_at_eos=False), **changes)

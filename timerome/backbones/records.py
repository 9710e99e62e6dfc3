"""The built-in records: published masked diffusion models and what their code really does.

A record is recognised by structure (its module paths resolve) and by class name, never by ``model_type`` alone:
LLaDA-8B and LLaDA-MoE share one, and plain causal Llama shares one with DiffuLLaMA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Architecture, Gates, Inputs


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive form of a boolean mask: 0 where it is True, the lowest finite value elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _attention_bias(model: nn.Module, inputs: Inputs) -> Any:
    """LLaDA's classes: ``attention_mask`` is ignored by some published files and turns others causal; a bias works."""
    if inputs.mask is None:
        return model(input_ids=inputs.ids)
    return model(input_ids=inputs.ids, attention_bias=additive(inputs.mask, torch.float32))


def _full_mask(model: nn.Module, inputs: Inputs) -> Any:
    """Models that are causal without a mask, or with some attention kernels: always given a 4-D additive one."""
    batch, length = inputs.ids.shape
    mask = inputs.mask
    if mask is None:
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=inputs.ids.device)
    return model(input_ids=inputs.ids, attention_mask=additive(mask, _dtype(model)))


def _llada2(model: nn.Module, inputs: Inputs) -> Any:
    """As above; but its eager attention wants 1 where a position attends and inverts the mask itself."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "eager":
        return _full_mask(model, inputs)
    batch, length = inputs.ids.shape
    keep = torch.ones(batch, 1, length, length, device=inputs.ids.device) if inputs.mask is None else inputs.mask
    return model(input_ids=inputs.ids, attention_mask=keep.to(_dtype(model)))


def _additive_mask(model: nn.Module, inputs: Inputs) -> Any:
    if inputs.mask is None:
        return model(input_ids=inputs.ids)
    return model(input_ids=inputs.ids, attention_mask=additive(inputs.mask, _dtype(model)))


def _not_causal(model: nn.Module, inputs: Inputs) -> Any:
    """Open-dLLM: causal unless told otherwise at each call."""
    return model(input_ids=inputs.ids, is_causal=False)


def _sigma(model: nn.Module, inputs: Inputs) -> Tensor:
    """MDLM's noise level; zero where the checkpoint is not conditioned on it, as the published code does."""
    conditioned = bool(getattr(getattr(model, "config", None), "time_conditioning", False))
    if conditioned and inputs.timestep is None:
        raise ValueError(
            "Backbone.forward: this MDLM is conditioned on the noise level (config.time_conditioning); pass "
            "timestep=..., its sigma, of shape (B,)."
        )
    if conditioned and inputs.timestep is not None:
        return inputs.timestep.to(inputs.ids.device, torch.float32)
    return torch.zeros(len(inputs.ids), device=inputs.ids.device)


def _mdlm(model: nn.Module, inputs: Inputs) -> Any:
    return model(inputs.ids, _sigma(model, inputs))


def _mdlm_unembed(model: nn.Module, hidden: Tensor) -> Tensor:
    """The final norm is shifted and scaled by the noise level before the unembedding."""
    inner: Any = getattr(model, "backbone", model)
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    sigma = _sigma(model, Inputs(torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)))
    logits: Tensor = inner.output_layer(flat, nn.functional.silu(inner.sigma_map(sigma)))
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def _modernbert_unembed(model: nn.Module, hidden: Tensor) -> Tensor:
    """A dense layer lies between the final norm and the unembedding."""
    whole: Any = model
    logits: Tensor = whole.decoder(whole.head(whole.model.final_norm(hidden)))
    return logits


_LLAMA_PARTS: dict[str, Any] = {
    "blocks": "model.layers",
    "attn": "self_attn",
    "mlp": "mlp",
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_DIT_PARTS: dict[str, Any] = {
    "blocks": "blocks",
    "embedding": "vocab_embed",
    "final_norm": "output_layer.norm_final",
    "head": "output_layer.linear",
}
_DIT_REST: dict[str, Any] = {
    "attn": "attn_out",
    "mlp": "mlp",
    "call": _mdlm,
    "timestep": True,
    "excludes_mask": True,
    "gates": Gates("adaLN_modulation", chunks=6, attn=2, mlp=5),
    "unembed": _mdlm_unembed,
}

TESTBED = Architecture("testbed", ("TestbedModel",), **_LLAMA_PARTS, masks="padding")
LLADA = Architecture(
    "llada",
    ("LLaDAModelLM", "MMadaModelLM", "FastdLLMLLaDAModelLM"),
    blocks="model.transformer.blocks",
    # Attention and MLP are methods of the block; their last linear layers are what is added to the residual stream.
    attn="attn_out",
    mlp="ff_out",
    embedding="model.transformer.wte",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    call=_attention_bias,
    masks="any",
    mask_token_id=126336,
)
# Its code takes any mask that broadcasts to 4-D; of the published files one coerces it to boolean, so it is boolean.
DREAM = Architecture(
    "dream", ("DreamModel", "FastdLLMDreamModel"), **_LLAMA_PARTS, shift=1, masks="any", mask_token_id=151666
)
DIFFULLAMA = Architecture(
    "diffullama",
    ("DiscreteDiffusionModel",),
    blocks="denoise_model.layers",
    attn="self_attn",
    mlp="mlp",
    embedding="embed_tokens",
    final_norm="denoise_model.norm",
    head="lm_head",
    shift=1,
    call=_full_mask,
    masks="any",
    mask_token_id=811,
)
DIFFULLAMA_PLAIN = Architecture(
    "diffullama-plain",
    ("LlamaForCausalLM",),
    **_LLAMA_PARTS,
    shift=1,
    call=_full_mask,
    masks="any",
    mask_token_id=811,
    explicit=True,
)
LLADA_MOE = Architecture(
    "llada-moe",
    ("LLaDAMoEModelLM",),
    **_LLAMA_PARTS,
    masks="padding",
    mask_token_id=156895,
    absent=("shared_expert",),
)
LLADA2 = Architecture(
    "llada2",
    ("LLaDA2MoeModelLM",),
    blocks="model.layers",
    attn="attention",
    mlp="mlp",
    embedding="model.word_embeddings",
    final_norm="model.norm",
    head="lm_head",
    call=_llada2,
    masks="any",
    mask_token_id=156895,
)
MDLM = Architecture("mdlm", ("DIT", "DITBackbone"), **_DIT_PARTS, **_DIT_REST)
_HUB_PARTS: dict[str, Any] = {name: f"backbone.{path}" for name, path in _DIT_PARTS.items()}
MDLM_HUB = Architecture("mdlm-hub", ("MDLM",), **_HUB_PARTS, **_DIT_REST)
A2D = Architecture(
    "a2d",
    ("A2DQwen3LMHeadModel", "A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel"),
    **_LLAMA_PARTS,
    call=_additive_mask,
    masks="any",
)
# Its Qwen2ForCausalLM has the name of transformers' own, causal class; the mixin is what only this one has.
OPEN_DLLM = Architecture("open-dllm", ("MDMGenerationMixin",), **_LLAMA_PARTS, shift=1, call=_not_causal)
MODERNBERT = Architecture(
    "modernbert",
    ("ModernBertForMaskedLM",),
    blocks="model.layers",
    attn="attn",
    mlp="mlp",
    embedding="model.embeddings.tok_embeddings",
    final_norm="model.final_norm",
    head="decoder",
    unembed=_modernbert_unembed,
    lens=False,
    masks="padding",
)
DIFFUSION_GEMMA = Architecture(
    "diffusion-gemma",
    ("DiffusionGemmaForBlockDiffusion",),
    blocks="model.decoder.layers",
    attn="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.norm",
    head="lm_head",
    refusal="it has no mask token: its canvas starts from random tokens and each step is fed the previous logits, so "
    "there is no state that says which positions are still to be written, which tracing and editing here read",
)

BUILT_IN = (
    TESTBED, LLADA, DREAM, DIFFULLAMA, LLADA_MOE, LLADA2, MDLM, MDLM_HUB, A2D, OPEN_DLLM, MODERNBERT,
    DIFFULLAMA_PLAIN, DIFFUSION_GEMMA,
)  # fmt: skip

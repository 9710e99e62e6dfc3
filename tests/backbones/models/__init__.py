"""Small models of every supported backbone's structure, written for the tests from what the published code does.

Random weights, three layers, the vocabulary of ``tests.tiny``. ``MODELS[name].wrap()`` gives a backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

import timerome as tr
from tests.tiny import MASK, TinyTokenizer

from . import dream, hf, llada, mdlm, moe
from .layers import randomise


@dataclass(frozen=True)
class Model:
    """A backbone to test.

    Attributes:
        make: builds it.
        record: the name of the architecture it must be recognised as.
        padding: whether it can honour a padding mask.
        patterns: whether it can honour any pattern of which position sees which.
        needs: attribute of ``transformers`` without which it cannot be built.
        options: passed on to ``wrap``.
    """

    make: Callable[[], nn.Module]
    record: str
    padding: bool = True
    patterns: bool = True
    needs: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def unavailable(self) -> str:
        """Why it cannot be built here; empty where it can."""
        if self.needs and not hasattr(transformers, self.needs):
            return f"transformers {transformers.__version__} has no {self.needs}"
        return ""

    def build(self, seed: int = 0) -> nn.Module:
        """The model with random weights, in eval mode."""
        torch.manual_seed(seed)
        model = self.make().eval()
        randomise(model, seed)
        if hasattr(model, "vocab_embed") or hasattr(getattr(model, "backbone", None), "vocab_embed"):
            with torch.no_grad():
                getattr(model, "backbone", model).vocab_embed.embedding.normal_()
        return model

    def wrap(self, seed: int = 0) -> tr.Backbone:
        """The model as a backbone."""
        return tr.wrap(self.build(seed), TinyTokenizer(), name=f"tiny-{self.record}", **self.options)


_MASK = {"mask_token_id": MASK}
MODELS: dict[str, Model] = {
    "LLaDA-8B": Model(llada.LLaDAModelLM, "llada"),
    "LLaDA-8B, earlier files": Model(lambda: llada.LLaDAModelLM("ignored"), "llada", False, False),
    "MMaDA-8B": Model(llada.MMadaModelLM, "llada"),
    "Dream-7B": Model(dream.DreamModel, "dream"),
    "DiffuLLaMA, wrapper": Model(hf.DiscreteDiffusionModel, "diffullama", options=_MASK),
    "DiffuLLaMA, plain Llama": Model(
        hf.llama, "diffullama-plain", options={**_MASK, "architecture": "diffullama-plain"}
    ),
    "LLaDA-MoE": Model(moe.LLaDAMoEModelLM, "llada-moe", patterns=False),
    "LLaDA-MoE, Hub file": Model(lambda: moe.LLaDAMoEModelLM(padding=False), "llada-moe", False, False),
    "LLaDA2.x": Model(moe.LLaDA2MoeModelLM, "llada2"),
    "LLaDA2.x, eager": Model(lambda: moe.LLaDA2MoeModelLM("eager"), "llada2"),
    "MDLM, repository": Model(mdlm.DIT, "mdlm", False, False),
    "MDLM, Hub": Model(mdlm.MDLM, "mdlm-hub", False, False),
    "a2d Qwen3": Model(hf.a2d_qwen3, "a2d", needs="Qwen3Config"),
    "a2d Qwen2": Model(hf.a2d_qwen2, "a2d"),
    "a2d Llama": Model(hf.a2d_llama, "a2d"),
    "Open-dLLM": Model(hf.open_dllm, "open-dllm", False, False),
    "ModernBERT": Model(hf.modernbert, "modernbert", patterns=False, needs="ModernBertForMaskedLM"),
}

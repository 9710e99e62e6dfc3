"""Architectures as data: where things are in each published masked diffusion model, and how it is called.

A record is recognised by structure (its module paths resolve) and by class name, never by ``model_type`` alone:
LLaDA-8B and LLaDA-MoE share one, and plain causal Llama shares one with DiffuLLaMA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Call = Callable[[nn.Module, Tensor], Any]


def _plain(model: nn.Module, ids: Tensor) -> Any:
    """Call with ids alone: without a mask, these models attend in both directions."""
    return model(input_ids=ids)


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a masked diffusion model are.

    Paths are relative to the loaded model; those of ``attn`` and ``mlp`` are relative to a block and name the module
    whose (first) output is added to the residual stream.

    Attributes:
        name: what it is called in messages and manifests.
        classes: names of the model classes it covers, anywhere in the class's ancestry; empty means any.
        blocks: path of the list of blocks.
        attn: path of the attention contribution, below a block.
        mlp: path of the MLP contribution, below a block.
        embedding: path of the token embedding.
        final_norm: path of the norm before the unembedding.
        head: path of the unembedding.
        shift: 0 where position i is predicted by the logits at i, 1 where by those at i - 1.
        call: runs the model on ids ``(B, L)`` so that every position sees every other.
        mask_token_id: the mask's id where neither config nor tokenizer names it.

    Example:
        >>> from timerome.backbones import register
        >>> register(Architecture("mine", ("MyModel",), "layers", "attn", "mlp", "embed", "norm", "head"))
    """

    name: str
    classes: tuple[str, ...]
    blocks: str
    attn: str
    mlp: str
    embedding: str
    final_norm: str
    head: str
    shift: int = 0
    call: Call = _plain
    mask_token_id: int | None = None

    def mismatch(self, model: nn.Module) -> str | None:
        """Return why ``model`` is not of this architecture, or None if it is."""
        names = {cls.__name__ for cls in type(model).__mro__}
        if self.classes and not names & set(self.classes):
            return f"class is {type(model).__name__}, not {' or '.join(self.classes)}"
        for path in (self.blocks, self.embedding, self.final_norm, self.head):
            if resolve(model, path) is None:
                return f"has no {path!r}"
        blocks = resolve(model, self.blocks)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            return f"{self.blocks!r} is no list of blocks"
        for path in (self.attn, self.mlp):
            missing = next((i for i, block in enumerate(blocks) if resolve(block, path) is None), None)
            if missing is not None:
                return f"block {missing} has no {path!r}"
        return None


def resolve(root: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at the dotted ``path`` below ``root``, or None."""
    module: Any = root
    for part in path.split("."):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module


_LLAMA_PARTS: dict[str, Any] = {
    "blocks": "model.layers",
    "attn": "self_attn",
    "mlp": "mlp",
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}

TESTBED = Architecture("testbed", ("TestbedModel",), **_LLAMA_PARTS)
LLADA = Architecture(
    "llada",
    ("LLaDAModelLM", "MMadaModelLM"),
    blocks="model.transformer.blocks",
    # Attention and MLP are methods of the block; their last linear layers are what is added to the residual stream.
    attn="attn_out",
    mlp="ff_out",
    embedding="model.transformer.wte",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    mask_token_id=126336,
)
DREAM = Architecture("dream", ("DreamModel",), **_LLAMA_PARTS, shift=1, mask_token_id=151666)

BUILT_IN = (TESTBED, LLADA, DREAM)

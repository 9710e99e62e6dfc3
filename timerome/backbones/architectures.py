"""Architectures as data: where things are in a masked diffusion model, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn


class Inputs(NamedTuple):
    """What one forward is given.

    Attributes:
        ids: token ids, ``(B, L)`` int64.
        mask: None where every position sees every other; otherwise boolean, True where position i (second-last axis)
            attends to position j: ``(B, 1, L, L)`` for a record with ``masks="any"``, or, for one with
            ``masks="padding"``, True at real tokens, ``(B, L)``.
        timestep: the noise level a record with ``timestep=True`` takes, ``(B,)``, or None for its default.
    """

    ids: Tensor
    mask: Tensor | None = None
    timestep: Tensor | None = None


Call = Callable[[nn.Module, Inputs], Any]
Masks = Literal["none", "padding", "any"]


def plain(model: nn.Module, inputs: Inputs) -> Any:
    """Call with ids, and the padding mask where there is one: what most models of this kind take."""
    if inputs.mask is None:
        return model(input_ids=inputs.ids)
    return model(input_ids=inputs.ids, attention_mask=inputs.mask if inputs.mask.dim() > 2 else inputs.mask.long())


class Gates(NamedTuple):
    """Factors between a module's output and the residual stream, computed in each block from the noise level.

    Attributes:
        module: path below a block of the module that computes them; its output is ``(B, chunks * d)``.
        chunks: how many parts of size d that output has.
        attn: index of the part that multiplies the attention's output.
        mlp: index of the part that multiplies the MLP's output.
    """

    module: str
    chunks: int
    attn: int
    mlp: int


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a masked diffusion model are.

    Paths are relative to the loaded model; those of ``attn`` and ``mlp`` are relative to a block and name the module
    whose (first) output is added to the residual stream, after a gate where there is one.

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
        call: runs the model so that every position sees every other that the inputs' mask allows.
        masks: which attention masks ``call`` can honour: none, padding alone, or any ``(L, L)`` pattern.
        timestep: whether the model is given the noise level.
        excludes_mask: whether the mask token is no part of the predicted distribution (SUBS): its logit is -inf.
        gates: factors between the modules' outputs and the residual stream.
        unembed: logits of residual-stream activations, where that is more than ``head(final_norm(h))``.
        lens: whether the unembedding is linear after the final norm, which ``lens`` targets need.
        mask_token_id: the mask's id where neither config nor tokenizer names it.
        absent: paths below a block that must not exist; with them, contributions would be other than said here.
        refusal: why models of this class cannot be used; empty where they can.
        explicit: used only when asked for by name, because its structure and class do not tell it from a causal model.

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
    call: Call = plain
    masks: Masks = "none"
    timestep: bool = False
    excludes_mask: bool = False
    gates: Gates | None = None
    unembed: Callable[[nn.Module, Tensor], Tensor] | None = None
    lens: bool = True
    mask_token_id: int | None = None
    absent: tuple[str, ...] = ()
    refusal: str = ""
    explicit: bool = False

    def covers(self, model: nn.Module) -> bool:
        """Return whether the class of ``model``, or one it derives from, is among ``classes``."""
        return not self.classes or bool({cls.__name__ for cls in type(model).__mro__} & set(self.classes))

    def mismatch(self, model: nn.Module) -> str | None:
        """Return why ``model`` is not of this architecture, or None if it is."""
        if not self.covers(model):
            return f"class is {type(model).__name__}, not {' or '.join(self.classes)}"
        for path in (self.blocks, self.embedding, self.final_norm, self.head):
            if resolve(model, path) is None:
                return f"has no {path!r}"
        blocks = resolve(model, self.blocks)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            return f"{self.blocks!r} is no list of blocks"
        for path in (self.attn, self.mlp, *([self.gates.module] if self.gates else [])):
            missing = next((i for i, block in enumerate(blocks) if resolve(block, path) is None), None)
            if missing is not None:
                return f"block {missing} has no {path!r}"
        for path in self.absent:
            found = next((i for i, block in enumerate(blocks) if resolve(block, path) is not None), None)
            if found is not None:
                return f"block {found} has {path!r}, which also adds to the residual stream"
        return None


def resolve(root: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at the dotted ``path`` below ``root``, or None."""
    module: Any = root
    for part in path.split("."):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module

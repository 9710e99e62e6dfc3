"""Find the backbone in a LightningModule that knows nothing of this library."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn

from ..backbones import Backbone, wrap


def backbone_of(pl_module: LightningModule, given: Backbone | None = None) -> Backbone:
    """Return ``given``, else ``pl_module.backbone``, else ``pl_module.model`` wrapped with ``pl_module.tokenizer``.

    Raises:
        RuntimeError: the module has neither.
        UnknownArchitectureError: ``pl_module.model`` is of no known architecture.
        ValueError: the id of its mask token is unknown.
    """
    if given is not None:
        return given
    backbone = getattr(pl_module, "backbone", None)
    if isinstance(backbone, Backbone):
        return backbone
    model = getattr(pl_module, "model", None)
    if isinstance(model, nn.Module):
        return wrap(model, getattr(pl_module, "tokenizer", None))
    raise RuntimeError(
        f"timerome callback: expected {type(pl_module).__name__}.backbone to be a timerome Backbone or "
        f"{type(pl_module).__name__}.model to be an nn.Module (with its tokenizer in .tokenizer), got "
        f"{type(backbone).__name__} and {type(model).__name__}; name one of them so, or pass backbone=..."
    )

"""Inference loops as users have them, and what must hold around them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import timerome as tr
from tests.tiny import decoded_facts, tiny_facts
from timerome.diffusion import encode

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def trainer(*callbacks: Any, **more: Any) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**QUIET, **more})


class TheirLoop(LightningModule):
    """A module that knows nothing of timerome: it has a model and a tokenizer, and calls the model."""

    def __init__(self, backbone: tr.Backbone, fail_at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        self.fail_at, self.error = fail_at, error
        self.hooks: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.hooks.append(count_hooks(self.model))
        return self.model(ids).logits

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self(batch)
        if batch_idx == self.fail_at:
            raise self.error("from the loop")
        return logits

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("mean", self(batch).mean(), batch_size=len(batch))

    validation_step = test_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def count_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def masked_rows(backbone: tr.Backbone, n: int = 4) -> Tensor:
    """The first facts' fully masked states, ``(n, L)``."""
    return torch.stack([encode(backbone, fact).masked(backbone.mask_id) for fact in tiny_facts(n)])


def loader(backbone: tr.Backbone, n: int = 4, batch_size: int = 2) -> DataLoader[Tensor]:
    return DataLoader(masked_rows(backbone, n), batch_size=batch_size)


def shared_memory(
    backbone: tr.Backbone, facts: slice | list[tr.Fact] = slice(0, 1), *, at: Any = 1, **more: Any
) -> tr.EditMemory:
    """A memory of the paper's form, which edits every row at every token."""
    chosen = tiny_facts(8)[facts] if isinstance(facts, slice) else facts
    states = tr.BankConfig(canvases=(None,), reveal=(0.0,))
    method = tr.Ridge(**{"states": states, "sparsity": 0.0, **more})
    return tr.paper_memory(backbone, chosen, at=at, method=method)


def gated_memory(
    backbone: tr.Backbone, facts: slice = slice(0, 1), *, canvas: int = 3, answer: str = "old north king", **more: Any
) -> tr.EditMemory:
    """A memory that edits the rows of its facts alone: where the model says what it decodes on a canvas."""
    memory = tr.EditMemory(backbone)
    memory.replace(decoded_facts(backbone, 8, canvas)[facts], answer, **more)
    return memory

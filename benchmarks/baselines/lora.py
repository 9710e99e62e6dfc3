"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), in the few lines that the LoRA baseline needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """A frozen linear layer plus (scale / rank) · B A; B starts at zero, so that nothing changes before training."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.factor = base, scale / rank
        a = torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5
        self.a = nn.Parameter(a.to(base.weight))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor * (x @ self.a.T) @ self.b.T


def add_lora(model: nn.Module, targets: tuple[str, ...], rank: int, scale: float, seed: int) -> list[nn.Parameter]:
    """Freeze ``model`` and put an adapter on every linear layer whose name ends in one of ``targets``; return them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: list[nn.Parameter] = []
    for path, module in list(model.named_modules()):
        name = path.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and name in targets:
            parent = model.get_submodule(path[: -len(name) - 1]) if "." in path else model
            adapter = LoRA(module, rank, scale, generator)
            setattr(parent, name, adapter)
            found += [adapter.a, adapter.b]
    if not found:
        raise ValueError(f"add_lora: no linear layer of the model is called one of {targets}.")
    return found


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weight it adapts and take it out."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            with torch.no_grad():
                module.base.weight += module.factor * module.b @ module.a
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], module.base)

"""What a call of the library leaves in a model that caches tables: nothing that a later backward stumbles over."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome.diffusion import encode
from timerome.inspection import inspect_backbone

FACT = tiny_facts(1)[0]
QUICK = tr.TraceConfig(modules=["block"], draws=1, min_total_effect=1e-6)
CALLS: dict[str, Callable[[tr.Backbone], object]] = {
    "generate": lambda b: tr.generate(b, FACT.prompt, canvas=3),
    "log_likelihood": lambda b: tr.log_likelihood(b, [encode(b, FACT)], samples=2),
    "trace": lambda b: tr.CausalTracer(b, QUICK).trace([FACT]),
    "inspect": inspect_backbone,
    "replace": lambda b: tr.EditMemory(b).replace(FACT, "old north king"),
    "paper_memory": lambda b: tr.paper_memory(b, FACT),
    "explain": lambda b: tr.EditMemory.build(b, FACT).explain(FACT.prompt),
    "generate under a memory": lambda b: under(b, tr.EditMemory.build(b, FACT)),
}


def under(backbone: tr.Backbone, memory: tr.EditMemory) -> str:
    with memory.attached():
        return tr.generate(backbone, FACT.prompt, canvas=3)


class Caching(nn.Module):
    """Scales by a table that the first forward makes and the others use, as rotary tables are kept."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.table = inner, None

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.9, 1.1, x.shape[-1])
        return self.inner(x) * self.table


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_caches_a_table_can_be_trained_afterwards(name: str) -> None:
    backbone = tiny_llada()
    for block in backbone.model.model.transformer["blocks"]:
        block.attn_out = Caching(block.attn_out)
    CALLS[name](backbone)
    assert any(block.attn_out.table is not None for block in backbone.model.model.transformer["blocks"])
    backbone.logits(torch.tensor([[5, 6, 7]])).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.embedding.parameters())

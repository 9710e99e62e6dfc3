"""Two processes: ``python -m tests.lightning.module_in_two FOLDER ddp|sharded``; run by test_two_processes.py."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import timerome as tr
from tests.lightning.loops import QUIET, gated_memory, shared_memory
from tests.tiny import tiny_facts, tiny_llada
from timerome.lightning import fact_loader


def measured(folder: Path, **where: object) -> dict[str, float]:
    """Measure four facts with a memory, in as many processes as asked for."""
    torch.set_num_threads(1)
    backbone = tiny_llada()
    memory = gated_memory(backbone, slice(0, 2))
    module = tr.EditModule(backbone, memory, canvas=3, config=tr.SamplerConfig(steps=3), samples=4)
    trainer = Trainer(**{**QUIET, **where, "default_root_dir": folder})
    [metrics] = trainer.test(module, fact_loader(tiny_facts(4), 2), verbose=False)
    texts = trainer.predict(module, fact_loader(tiny_facts(4), 2))
    found = {name: float(value) for name, value in metrics.items()}
    (folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps({"metrics": found, "texts": texts}))
    return found


class Sharded(tr.EditModule):
    """A model that does not fit: every block's weights lie in parts in both processes."""

    def configure_model(self) -> None:
        if not any(hasattr(p, "full_tensor") for p in self.model.parameters()):
            mesh = self.device_mesh["data_parallel"]
            for layer in range(self.backbone.n_layers):
                fully_shard(self.backbone.module(tr.Site(layer)), mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def sharded(folder: Path, **where: object) -> None:
    """Answer with a memory without row gate, and be refused with one that has it."""
    torch.set_num_threads(1)
    backbone = tiny_llada()
    how = {"canvas": 3, "config": tr.SamplerConfig(steps=3)}
    kind = Sharded if where else tr.EditModule
    module = kind(backbone, shared_memory(backbone, slice(0, 2)), **how)
    gated = gated_memory(backbone, slice(0, 2))
    trainer = Trainer(**{**QUIET, **where, "default_root_dir": folder})
    texts = trainer.predict(module, fact_loader(tiny_facts(4), 2))
    refused = ""
    if where:
        try:
            gated.attached(backbone).attach()
        except RuntimeError as error:
            refused = str(error)
    (folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps({"refused": refused, "texts": texts}))


if __name__ == "__main__":
    if sys.argv[2] == "ddp":
        measured(Path(sys.argv[1]), strategy="ddp", devices=2)
    else:
        sharded(Path(sys.argv[1]), strategy=ModelParallelStrategy(2, 1), devices=2)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"

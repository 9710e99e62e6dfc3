"""Facts over two processes: ``python -m tests.modules.two_processes FOLDER``; run by test_two_processes.py."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

import timerome as tr
from tests.callbacks.loops import QUIET, gated_memory
from tests.tiny import tiny_facts, tiny_llada
from timerome.modules import fact_loader


def measured(folder: Path, **where: object) -> dict[str, float]:
    """Measure four facts with a memory, in as many processes as asked for."""
    torch.set_num_threads(1)
    backbone = tiny_llada()
    memory = gated_memory(backbone, slice(0, 2))
    module = tr.EditModule(backbone, memory, canvas=3, sampler=tr.SamplerConfig(steps=3), samples=4)
    trainer = Trainer(**{**QUIET, **where, "default_root_dir": folder})
    [metrics] = trainer.test(module, fact_loader(tiny_facts(4), 2), verbose=False)
    texts = trainer.predict(module, fact_loader(tiny_facts(4), 2))
    found = {name: float(value) for name, value in metrics.items()}
    (folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps({"metrics": found, "texts": texts}))
    return found


if __name__ == "__main__":
    measured(Path(sys.argv[1]), strategy="ddp", devices=2)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"

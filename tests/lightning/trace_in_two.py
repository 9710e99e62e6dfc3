"""Traces in two processes: ``python -m tests.lightning.trace_in_two FOLDER``; run by test_trace_callback.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

import timerome as tr
from tests.lightning.loops import TheirLoop, loader
from tests.lightning.test_trace_callback import CONFIG
from tests.tiny import planted, tiny_facts


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    backbone = planted(layer=1)
    callback = tr.TraceCallback(tiny_facts(5), CONFIG, backbone=backbone, checkpoint=folder / "t.jsonl")
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.predict(TheirLoop(backbone), loader(backbone), return_predictions=False)
    assert trainer.world_size == 2 and torch.distributed.get_backend() == "gloo"
    callback.result.save(folder / f"of_rank_{trainer.global_rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A causal trace in an inference loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..backbones import Backbone
from .finding import find_backbone

if TYPE_CHECKING:
    from ..facts import Fact
    from ..tracing import Shard, TraceConfig, TraceResult


class TraceCallback(Callback):
    """Trace facts once, at the start of the first predict, test or validate loop.

    It only passes its arguments on: the result is that of ``CausalTracer(backbone, config).trace(facts)``. With
    a strategy of several processes that each hold the model (``ddp``) the facts are shared out over them, to the same
    result, which each of them has in the end. The model is traced with whatever is attached to it, so put this callback
    before any ``EditCallback`` to trace the model as it is. The validation that checks a training run before it begins
    is left out.

    Args:
        facts: what to trace.
        config: how, see :class:`timerome.TraceConfig`.
        path: where to save the result; None keeps it in :attr:`result` only.
        checkpoint: file that keeps what is done, fact by fact, so that a stopped trace goes on.
        backbone: what to trace; by default it is found in the module as by ``EditCallback``, and needs a tokenizer.

    Attributes:
        result: the :class:`timerome.TraceResult`; None before there is one.

    Example:
        >>> import timerome as tr
        >>> from lightning.pytorch import Trainer
        >>> from timerome.lightning import fact_loader
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> trace = tr.TraceCallback([fact], tr.TraceConfig(modules=["block"], roles=["object"], draws=1))
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> module = tr.EditModule(tr.load("testbed"), canvas=2, config=tr.SamplerConfig(steps=2))
        >>> texts = Trainer(callbacks=[trace], **quiet).predict(module, fact_loader([fact]))
        >>> [str(site) for site in trace.result.sites[:2]]
        ['block.0', 'block.1']
    """

    def __init__(
        self,
        facts: Iterable[Fact],
        config: TraceConfig | None = None,
        *,
        path: str | Path | None = None,
        checkpoint: str | Path | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        self.facts, self.config = list(facts), config
        self.path, self.checkpoint = path, checkpoint
        self.backbone = backbone
        self.result: TraceResult | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace, unless that is done."""
        self._trace(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace, unless that is done."""
        self._trace(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace, unless that is done."""
        if not trainer.sanity_checking:
            self._trace(trainer, pl_module)

    def _trace(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.result is not None:
            return
        from ..tracing import CausalTracer

        found = find_backbone(pl_module, self.backbone, who="TraceCallback")
        tracer = CausalTracer(found.backbone, self.config)
        n = len(self.facts)
        rank_zero_info(f"TraceCallback: traces {found}, {n} fact{'' if n == 1 else 's'}")
        shard = shard_of(trainer)
        writes = trainer.is_global_zero
        # A process that traces its own facts keeps them; of those that all trace the same, one does.
        keeps = writes or shard.world_size > 1
        self.result = tracer.trace(self.facts, checkpoint=self.checkpoint if keeps else None, shard=shard)
        if self.path is not None and writes:
            self.result.save(self.path)


def shard_of(trainer: Trainer) -> Shard:
    """Return which facts this process of a Trainer traces.

    Where every process has the whole model (``ddp`` and its kin) facts are shared out. Where the model itself is
    sharded every forward needs all processes, so each traces all facts.
    """
    from ..tracing import Shard

    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, DDPStrategy):
        return Shard()

    def gather(mine: bytes) -> list[bytes]:
        device = strategy.root_device
        sizes = strategy.all_gather(torch.tensor([len(mine)], device=device)).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
        parts = strategy.all_gather(padded)
        return [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    return Shard(trainer.global_rank, trainer.world_size, gather)

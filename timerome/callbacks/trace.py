"""A causal trace in an inference loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..backbones import Backbone
from .backbone_of import backbone_of

if TYPE_CHECKING:
    from ..facts import Fact
    from ..tracing import TraceResult


class TraceCallback(Callback):
    """Trace facts once, at the start of the first predict, test or validate loop.

    It only passes its arguments on: the result is that of ``CausalTracer(backbone, **tracer_args).trace(facts)``. The
    model is traced with whatever is attached to it, so put this callback before any ``EditCallback`` to trace the model
    as it is. The validation that checks a training run before it begins is left out.

    Args:
        facts: what to trace.
        path: where to save the result; None keeps it in :attr:`result` only.
        checkpoint: file that keeps what is done, fact by fact, so that a stopped trace goes on.
        backbone: what to trace; found in the module as ``EditCallback`` does by default.
        tracer_args: arguments of :class:`timerome.CausalTracer`.

    Attributes:
        result: the :class:`timerome.TraceResult`; None before there is one.

    Example:
        >>> import timerome as tr
        >>> from lightning.pytorch import Trainer
        >>> from timerome.modules import fact_loader
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> trace = tr.TraceCallback([fact], modules=["block"], roles=["object"], draws=1)
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> module = tr.EditModule(tr.load("testbed"), canvas=2, sampler=tr.SamplerConfig(steps=2))
        >>> texts = Trainer(callbacks=[trace], **quiet).predict(module, fact_loader([fact]))
        >>> [str(site) for site in trace.result.sites[:2]]
        ['block.0', 'block.1']
    """

    def __init__(
        self,
        facts: Iterable[Fact],
        *,
        path: str | Path | None = None,
        checkpoint: str | Path | None = None,
        backbone: Backbone | None = None,
        **tracer_args: Any,
    ) -> None:
        self.facts = list(facts)
        self.path, self.checkpoint = path, checkpoint
        self.backbone = backbone
        self.tracer_args = tracer_args
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

        tracer = CausalTracer(backbone_of(pl_module, self.backbone), **self.tracer_args)
        # Every process traces, to the same result, since a sharded model needs them all; one of them writes.
        writes = trainer.is_global_zero
        self.result = tracer.trace(self.facts, checkpoint=self.checkpoint if writes else None)
        if self.path is not None and writes:
            self.result.save(self.path)

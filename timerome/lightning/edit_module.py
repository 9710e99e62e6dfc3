"""A LightningModule that answers prompts and measures facts, with or without an edit memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader

from ..backbones import Backbone
from ..diffusion import Estimator, SamplerConfig, generate
from ..evaluation import evaluate
from ..facts import Fact
from ..memory import Attachment, EditMemory

_NO_FIT = (
    "EditModule: there is nothing to fit. Edits are closed-form and act at inference time, so this module has no "
    "training step and no optimizer: build a memory with EditMemory.build(backbone, facts), then use "
    "Trainer.predict, Trainer.test or Trainer.validate."
)


def fact_loader(facts: Iterable[Fact], batch_size: int = 8) -> DataLoader[Fact]:
    """Return a loader whose batches are lists of facts, in order.

    Example:
        >>> import timerome as tr
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> [fact.id for fact in next(iter(fact_loader([fact])))]
        ['kenya']
    """
    return DataLoader(list(facts), batch_size=batch_size, collate_fn=list)  # type: ignore[arg-type]


class EditModule(LightningModule):
    """Answer prompts in ``Trainer.predict``; measure facts in ``Trainer.test`` and ``Trainer.validate``.

    The model is registered as the submodule ``model``, so that Lightning moves it to its device and restores weights
    given as ``ckpt_path``; nothing else is done to it: flags, modes, weights and buffers are after a run what they were
    before. Steps run in inference mode. The memory is attached during each step alone, so that no error can leave it on
    the model, and a step called without a Trainer is edited too. ``fit`` is refused.

    ``predict_step`` takes a batch of prompts or of facts (whose prompts are asked) and returns one text each.
    ``test_step`` and ``validation_step`` take a batch of facts and log under ``test/`` and ``validate/``, averaged over
    facts: ``log_prob`` of the answer, summed over its tokens, nats; ``exact``, 1 where the decoded text is the answer
    (white space and letter case aside); ``rouge_recall`` of the decoded text against the answer; and, with a memory,
    ``edited_rows``, summed over all forwards.

    Args:
        backbone: the model.
        memory: an edit memory or the path of its file; None leaves the model as it is.
        canvas: answer positions that text is decoded on.
        config: how they are unmasked. Its seed also draws the masks of the likelihood.
        estimator: of the likelihood, see :func:`timerome.log_likelihood`.
        samples: mask draws an answer.

    Attributes:
        backbone: the model, as a :class:`timerome.Backbone`.
        memory: the memory, or None.

    Raises:
        TypeError: ``backbone`` is no Backbone, or a batch holds something else than prompts or facts.
        MemoryMismatchError: the memory was built on another model; raised when a path is read or a step runs.
        RuntimeError: ``fit`` was called.

    Example:
        >>> import timerome as tr
        >>> from lightning.pytorch import Trainer
        >>> from timerome.lightning import fact_loader
        >>> module = tr.EditModule(tr.load("testbed"), canvas=2, config=tr.SamplerConfig(steps=2))
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer = Trainer(enable_model_summary=False, **quiet)
        >>> [metrics] = trainer.test(module, fact_loader([fact]), verbose=False)
        >>> sorted(metrics)
        ['test/exact', 'test/log_prob', 'test/rouge_recall']
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: EditMemory | str | Path | None = None,
        *,
        canvas: int = 64,
        config: SamplerConfig | None = None,
        estimator: Estimator = "elbo_sum",
        samples: int = 16,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"EditModule: expected a Backbone, got {type(backbone).__name__}; timerome.wrap(model, tokenizer)."
            )
        self.backbone = backbone
        self.model = backbone.model
        self.memory = EditMemory.load(memory, backbone) if isinstance(memory, (str, Path)) else memory
        self.canvas, self.config = canvas, config or SamplerConfig()
        self.estimator, self.samples = estimator, samples
        self._attachment: Attachment | None = None

    def predict_step(self, batch: Sequence[str | Fact], batch_idx: int = 0, dataloader_idx: int = 0) -> list[str]:
        """Return the text that each prompt, or each fact's prompt, is answered with."""
        if isinstance(batch, str) or not all(isinstance(item, (str, Fact)) for item in batch):
            raise TypeError(
                f"EditModule.predict_step: expected a list of prompts or of facts, got {_kinds(batch)}; "
                "load facts with timerome.lightning.fact_loader."
            )
        prompts = [item if isinstance(item, str) else item.prompt for item in batch]
        with self._edited():
            return generate(self.backbone, prompts, canvas=self.canvas, config=self.config)

    def test_step(self, batch: Sequence[Fact], batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, float]:
        """Measure a batch of facts; log and return the means."""
        return self._measure(batch, "test")

    def validation_step(self, batch: Sequence[Fact], batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, float]:
        """Measure a batch of facts; log and return the means."""
        return self._measure(batch, "validate")

    def configure_optimizers(self) -> None:
        """Return None: nothing is optimized."""
        return None

    def configure_callbacks(self) -> list[Callback]:
        """Refuse ``fit`` here: the first hook of all, before Lightning asks for a training step.

        Raises:
            RuntimeError: ``fit`` was called.
        """
        if self.trainer.state.fn == "fit":
            raise RuntimeError(_NO_FIT)
        return []

    def setup(self, stage: str) -> None:
        """Forget the last run's attachment: weights may have been restored and moved since."""
        self._attachment = None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is: texts and facts live nowhere, and Lightning refuses to look into frozen facts."""
        return batch

    @contextmanager
    def _edited(self) -> Iterator[None]:
        """Run the inside with the memory, through one attachment a run: it remembers which rows it has addressed."""
        if self.memory is None:
            yield
            return
        if self._attachment is None:
            self._attachment = self.memory.attached(self.backbone)
        with self._attachment:
            yield

    def _measure(self, batch: Sequence[Fact], stage: str) -> dict[str, float]:
        if isinstance(batch, Fact) or not all(isinstance(item, Fact) for item in batch):
            raise TypeError(
                f"EditModule.{stage}: expected a list of facts, got {_kinds(batch)}; load them with "
                "timerome.lightning.fact_loader."
            )
        with self._edited():
            before = self._attachment.hits.total() if self._attachment else 0
            found = evaluate(
                self.backbone,
                batch,
                estimator=self.estimator,
                samples=self.samples,
                seed=self.config.seed,
                canvas=self.canvas,
                sampler=self.config,
            )
        values = {f"{stage}/{name}": found.mean(name) for name in ("log_prob", "exact", "rouge_recall")}
        if self._attachment is not None:
            values[f"{stage}/edited_rows"] = float(self._attachment.hits.total() - before)
        for name, value in values.items():
            reduce = "sum" if name.endswith("rows") else "mean"
            self.log(name, value, batch_size=len(batch), on_step=False, on_epoch=True, reduce_fx=reduce, sync_dist=True)
        return values


def _kinds(batch: Any) -> str:
    if not isinstance(batch, (list, tuple)):
        return type(batch).__name__
    return f"{type(batch).__name__} of {', '.join(sorted({type(item).__name__ for item in batch})) or 'nothing'}"

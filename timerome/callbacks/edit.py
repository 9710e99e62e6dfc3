"""An edit memory in an inference loop."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..backbones import Backbone
from ..memory import Attachment, EditMemory
from .backbone_of import backbone_of

Select = Callable[[Any], Sequence[Iterable[str] | None]]


class EditCallback(Callback):
    """Let an edit memory act in a predict, test or validate loop; the loop's module stays as it is.

    The backbone is, in this order: ``backbone``, ``pl_module.backbone``, ``pl_module.model`` wrapped together with
    ``pl_module.tokenizer``. ``setup`` reads the file. The hooks are attached when the loop starts, since only then have
    weights been restored from ``ckpt_path`` and moved to their device; they are removed in ``teardown``, and in
    ``on_exception``, which is all that runs after an error. Several callbacks with different memories act in the order
    in which the Trainer has them.

    In test and validate loops, what the memory did in this run is logged when the epoch ends, summed over processes:
    ``edit/NAME/rows``, ``edit/NAME/fact/ID`` and ``edit/NAME/step/N``, in rows edited. Predict loops cannot log;
    read :attr:`hits` there.

    Edits may be made and undone between batches; they act from the next forward on. While no edit is there, or none is
    selected, no hook is on the model.

    Args:
        memory: the memory, or the path of its file.
        backbone: what it acts on; found in the module by default.
        select: which edits each row of a batch may have: the name of the batch's column that holds it, or a function of
            the batch that returns it. For each row the ids of edits, none for an empty list, all for None. A row gate
            still decides whether the row is given them.
        name: tells callbacks apart in logs and checkpoints; by default the file's path (its stem in logs), or a digest
            of the memory.

    Raises:
        TypeError: ``memory`` is neither a memory nor a path.
        KeyError: a batch has no such column, or a row names an edit that is not there.

    Example:
        >>> import timerome as tr
        >>> from lightning.pytorch import Trainer
        >>> from timerome.modules import fact_loader
        >>> backbone = tr.load("testbed")
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> memory = tr.EditMemory.build(backbone, [fact], coordinate=tr.Coordinate(3))
        >>> edit = tr.EditCallback(memory, name="forget-kenya")
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer = Trainer(callbacks=[edit], **quiet)
        >>> module = tr.EditModule(backbone, canvas=2, sampler=tr.SamplerConfig(steps=2))
        >>> texts = trainer.predict(module, fact_loader([fact]))
        >>> edit.hits_by_step
        Counter({0: 1, 1: 1})
    """

    def __init__(
        self,
        memory: EditMemory | str | Path,
        *,
        backbone: Backbone | None = None,
        name: str | None = None,
        select: str | Select | None = None,
    ) -> None:
        if not isinstance(memory, (EditMemory, str, Path)):
            raise TypeError(f"EditCallback: expected an EditMemory or a path, got {type(memory).__name__}.")
        self.path = None if isinstance(memory, EditMemory) else Path(memory)
        self.memory = memory if isinstance(memory, EditMemory) else None
        self.backbone, self.select = backbone, select
        key = name or (str(self.path) if self.path else _digest(memory))  # type: ignore[arg-type]
        self._key, self._label = key, name or (self.path.stem if self.path else key)
        self._attachment: Attachment | None = None
        self._hits: Counter[str] = Counter()
        self._hits_by_step: Counter[int] = Counter()

    @property
    def attached(self) -> bool:
        """Whether the memory acts at present."""
        return self._attachment is not None

    @property
    def hits(self) -> Counter[str]:
        """Rows edited in all runs so far, by fact id (``"*"`` for a memory without row gate)."""
        return self._hits + (self._attachment.hits if self._attachment else Counter())

    @property
    def hits_by_step(self) -> Counter[int]:
        """Rows edited in all runs so far, by denoising step."""
        return self._hits_by_step + (self._attachment.hits_by_step if self._attachment else Counter())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the memory's file.

        Raises:
            RuntimeError: the stage is ``fit``.
            EditFileError: the file is missing, damaged, or no edit file.
        """
        if stage == "fit":
            raise RuntimeError(
                "EditCallback: an edit memory acts at inference time and cannot be there during fit: weights trained "
                "under an edit would train around it, and would no longer be those it was built on. Remove the "
                "callback from this Trainer, or edit after training."
            )
        if self.memory is None:
            assert self.path is not None
            self.memory = EditMemory.load(self.path)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the memory."""
        self._attach(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the memory."""
        self._attach(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the memory."""
        self._attach(pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which edits the batch's rows may have."""
        self._select(batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which edits the batch's rows may have."""
        self._select(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which edits the batch's rows may have."""
        self._select(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the memory did."""
        self._log(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the memory did."""
        self._log(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the memory."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the memory: after an error, ``teardown`` does not run."""
        self._detach()

    @property
    def state_key(self) -> str:
        """Identifies this callback among others of its kind in a checkpoint."""
        return self._generate_state_key(memory=self._key)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {"hits": dict(self.hits), "hits_by_step": dict(self.hits_by_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from the counters of :meth:`state_dict`."""
        self._hits = Counter(state_dict["hits"])
        self._hits_by_step = Counter(state_dict["hits_by_step"])

    def _attach(self, pl_module: LightningModule) -> None:
        self._detach()
        assert self.memory is not None
        self._attachment = self.memory.attached(backbone_of(pl_module, self.backbone)).attach()

    def _select(self, batch: Any) -> None:
        if self.select is None or self._attachment is None:
            return
        if callable(self.select):
            sets = self.select(batch)
        elif isinstance(batch, Mapping) and self.select in batch:
            sets = batch[self.select]
        else:
            came = f"the columns {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise KeyError(
                f"EditCallback: expected a batch with the column {self.select!r}, got {came}; give select a function "
                "of the batch."
            )
        self._attachment.select(sets)

    def _detach(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.remove()
            self._hits += attachment.hits
            self._hits_by_step += attachment.hits_by_step

    def _log(self, pl_module: LightningModule) -> None:
        if self._attachment is None:
            return
        assert self.memory is not None
        rows, steps = self._attachment.hits, self._attachment.hits_by_step
        # Every process must log the same names, or their sums wait for each other.
        n_steps = int(pl_module.all_gather(torch.tensor(max(steps, default=-1) + 1)).max())
        ids = [edit.id for edit in self.memory.edits] if self.memory.gated else ["*"]
        values = {
            "rows": rows.total(),
            **{f"fact/{i}": rows[i] for i in ids},
            **{f"step/{n}": steps[n] for n in range(n_steps)},
        }
        for name, value in values.items():
            pl_module.log(f"edit/{self._label}/{name}", float(value), reduce_fx="sum", sync_dist=True)


def _digest(memory: EditMemory) -> str:
    facts, spared = [edit.fact.to_dict() for edit in memory.edits], [one.id for one in memory.spared]
    about = [memory.settings.to_dict(), facts, memory.fingerprint, spared]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for edit in memory.edits:
        for tensor in (edit.keys, edit.targets):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]

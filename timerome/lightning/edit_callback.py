"""An edit memory in an inference loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import default_collate

from ..backbones import Backbone
from ..memory import Attachment, EditMemory
from .finding import find_backbone

Select = Callable[[Any], Sequence[Iterable[str] | None] | None]


class EditCallback(Callback):
    """Let an edit memory act in a predict, test or validate loop; the loop's module stays as it is.

    The model is found among the module's attributes, wherever it is; in this order: ``backbone``; a
    :class:`timerome.Backbone`; the submodule that the memory was made on; the only submodule that a record of
    :mod:`timerome.backbones` recognises. Where it was found is said when a loop starts. A tokenizer among the
    attributes is used; none is needed to apply edits.

    ``setup`` reads the file. The hooks are attached when the loop starts, since only then have weights been restored
    from ``ckpt_path`` and moved to their device; they are removed in ``teardown``, and in ``on_exception``, which is
    all that runs after an error. Several callbacks with different memories act in the order in which the Trainer has
    them.

    In test and validate loops, what the memory did in this run is logged when the epoch ends, summed over processes:
    ``edit/NAME/rows``, ``edit/NAME/fact/ID`` and ``edit/NAME/step/N``, in rows edited. Predict loops cannot log;
    read :attr:`hits` there.

    Edits may be made and undone between batches; they act from the next forward on. While no edit is there, or none is
    selected, no hook is on the model.

    Args:
        memory: the memory, or the path of its file.
        backbone: what it acts on; found in the module by default.
        select: which edits each row of a batch may have: the name of the batch's column that holds it, or a function of
            the batch that returns it. For each row the ids of edits, or one id; none for an empty list, all for None.
            What the edit itself asks of a row to act on it, it still asks.
        name: tells callbacks apart in logs and checkpoints; by default the file's path (its stem in logs), or the
            digest that the memory had when the callback was made.

    Raises:
        TypeError: ``memory`` is neither a memory nor a path.
        UnknownArchitectureError: no model is found.
        ValueError: several are found, or edits are named for other rows than a batch has.
        MemoryMismatchError: the memory was made on another model.
        KeyError: a batch has no such column, or a row names an edit that is not there.

    Example:
        >>> import timerome as tr
        >>> from lightning.pytorch import Trainer
        >>> from timerome.lightning import fact_loader
        >>> backbone = tr.load("testbed")
        >>> fact = tr.Fact(id="egypt", prompt="The capital city of Egypt is", subject="Egypt", object="Cairo")
        >>> memory = tr.EditMemory(backbone)
        >>> _ = memory.replace(fact, "Mombasa")
        >>> edit = tr.EditCallback(memory, name="egypt")
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer = Trainer(callbacks=[edit], **quiet)
        >>> module = tr.EditModule(backbone, canvas=8, config=tr.SamplerConfig(steps=8))
        >>> texts = trainer.predict(module, fact_loader([fact]))
        >>> list(edit.hits)
        ['egypt']
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
        key = name or (memory.digest() if isinstance(memory, EditMemory) else str(self.path))
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
        """Rows edited in all runs so far, by edit id (``"*"`` for edits that act on every row together)."""
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
        self._select(trainer, batch, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which edits the batch's rows may have."""
        self._select(trainer, batch, dataloader_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which edits the batch's rows may have."""
        self._select(trainer, batch, dataloader_idx)

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
        found = find_backbone(pl_module, self.backbone, fingerprint=self.memory.fingerprint, who="EditCallback")
        self._attachment = self.memory.attached(found.backbone).attach()
        n = len(self.memory.edits)
        rank_zero_info(f"EditCallback: edits act on {found}, {n} edit{'' if n == 1 else 's'}")

    def _select(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
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
        if sets is not None:
            sets = [[ids] if isinstance(ids, str) else ids for ids in _checked(sets, batch, trainer, dataloader_idx)]
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
        mine = torch.tensor([max(steps, default=-1) + 1, rows["*"]], device=pl_module.device)
        n_steps, together = pl_module.all_gather(mine).reshape(-1, 2).amax(0).tolist()
        values = {
            "rows": rows.total(),
            **{f"fact/{i}": rows[i] for i in [edit.id for edit in self.memory.edits] + ["*"] * bool(together)},
            **{f"step/{n}": steps[n] for n in range(n_steps)},
        }
        for name, value in values.items():
            pl_module.log(f"edit/{self._label}/{name}", float(value), reduce_fx="sum", sync_dist=True)


def _checked(sets: Any, batch: Any, trainer: Trainer, dataloader_idx: int) -> Sequence[Any]:
    """Return what was said of the rows, if it is said row by row as far as can be known."""
    if isinstance(sets, (str, bytes, Mapping)) or not isinstance(sets, Sequence):
        raise TypeError(
            f"EditCallback: expected select to give a list with an entry for each row, got {type(sets).__name__}."
        )
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    as_it_came = any(part is sets for part in parts)
    many = any(ids is not None and not isinstance(ids, str) for ids in sets)
    if as_it_came and many and _collate(trainer, dataloader_idx) is default_collate:
        raise ValueError(
            "EditCallback: the loader's default_collate turns lists of ids by row into lists by place in the list; "
            "give the DataLoader a collate_fn that leaves them as they are, or name one id a row, as a string."
        )
    rows = _rows(batch, sets)
    if rows is not None and len(sets) != rows:
        raise ValueError(
            f"EditCallback: edits are named for {len(sets)} rows, but the batch has {rows}; name them for each row. "
            "Does the loader's collate_fn keep lists as they are? torch's default_collate turns them."
        )
    return sets


def _rows(batch: Any, sets: Any) -> int | None:
    """How many rows a batch has, where its parts agree; None where that cannot be told."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        if not any(isinstance(part, (torch.Tensor, list, tuple, Mapping)) for part in batch):
            return len(batch)  # texts, facts
        parts = list(batch)
    else:
        return None
    tensors = {len(part) for part in parts if isinstance(part, torch.Tensor) and part.dim()}
    lists = {len(part) for part in parts if isinstance(part, (list, tuple)) and part is not sets}
    sizes = tensors or lists
    return sizes.pop() if len(sizes) == 1 else None


def _collate(trainer: Trainer, dataloader_idx: int) -> Any:
    """The function that made the batch, or None."""
    loaders = (
        trainer.predict_dataloaders
        if trainer.predicting
        else trainer.test_dataloaders
        if trainer.testing
        else trainer.val_dataloaders
    )
    flat = CombinedLoader(loaders, "sequential").flattened if loaders is not None else []
    return getattr(flat[dataloader_idx], "collate_fn", None) if dataloader_idx < len(flat) else None

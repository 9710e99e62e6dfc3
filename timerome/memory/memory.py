"""The edit memory: built in closed form, changed edit by edit, attached without touching the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Site
from ..facts import Fact, FactError, FactSet
from . import making
from .address import AddressBook, Gate
from .attachment import Attachment, check_belongs
from .background import Background
from .bank import BankConfig
from .calibration import Calibration
from .combine import Difference, diff, merged, rebuilt
from .edit import Edit, Operation, Spared, in_force
from .operations import OnConflict, Planned, plan, spared
from .policy import Policy, coordinates_of, usual_coordinate
from .settings import Settings
from .systems import System, Systems
from .targets import EstimatorName

if TYPE_CHECKING:
    from .ledger import Ledger


class EditMemory:
    """Closed-form edits of what a masked diffusion model knows, kept outside its weights.

    Make one with :meth:`build` or :meth:`load`; change it with :meth:`insert`, :meth:`update`, :meth:`forget` and
    :meth:`undo`; use it with :meth:`attached` or in an ``EditCallback``. Each change is a transaction: all of it
    happens or nothing, and after it the memory is the one that would have been built from the edits that are left, but
    that questions of undone ones are spared.

    Attributes:
        settings: hyperparameters of new edits, where nothing else is said.
        history: all edits that were not undone, in order; those that others supersede do not act.
        retired: ids of edits that were undone; never given away again.
        spared: questions of undone edits, which no other edit may answer.
        background: what is known of the facts that must be left alone.
        fingerprint: of the backbone it was built on.
        tokenizer: digest of that backbone's tokenizer.
        ledger: where changes are recorded; None records nothing.
    """

    def __init__(
        self,
        settings: Settings,
        history: Iterable[Edit] = (),
        *,
        background: Background | None = None,
        retired: Iterable[str] = (),
        spared: Iterable[Spared] = (),
        fingerprint: str,
        tokenizer: str,
        ledger: Ledger | None = None,
    ) -> None:
        self.settings = settings
        self.history = tuple(history)
        self.retired = tuple(retired)
        self.spared = tuple(spared)
        self.background = background or Background(bank=settings.bank)
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.ledger = ledger
        self._backbone: Callable[[], Backbone | None] = _nothing
        self._systems = Systems()
        self._attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()
        self._derive()

    # Building --------------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        facts: FactSet | Sequence[Fact],
        *,
        coordinate: Policy = None,
        alpha: float = 1.0,
        ridge: float = 0.01,
        sparsity: float = 0.5,
        rank: int = 64,
        beta: float = 1.0,
        protect: FactSet | None = None,
        gate: Gate | Calibration | None = None,
        estimator: EstimatorName = "null",
        margin: float = 8.0,
        bank: BankConfig | None = None,
        shared: bool | None = None,
        by_place: bool | None = None,
        null_space: float | None = None,
    ) -> EditMemory:
        r"""Build a memory for some facts: gather keys and targets, choose keys, solve, calibrate. No gradient is taken.

        With ``gate=None, protect=None`` this is the paper's form: one shared ridge system, added at every token of
        every forward. What the paper's text leaves open is ours: μ is the mean key, keys are read over a bank of
        partially masked states, at most ``rank`` a fact by pivoted Cholesky.

        Args:
            backbone: the model to edit.
            facts: what to change. A fact with ``new_object`` is replaced, one without is forgotten.
            coordinate: where; the last block but one third for ``null`` and ``corrupt``, the last block for ``lens``,
                by default. One coordinate is for all facts; several span several sites, the strength shared out; a
                mapping by fact id or group, or a function of the fact, says it for each. Take any of them from a trace:
                ``CausalTracer(backbone).trace(facts).best(policy)``.
            alpha: strength α.
            ridge: λ > 0, relative.
            sparsity: q, share of each row's entries that are dropped, 0 <= q < 1.
            rank: most keys a fact may have, at each coordinate.
            beta: β >= 0, weight of the protected keys.
            protect: facts whose activations get target zero; None protects nothing.
            gate: which rows and tokens may be edited; None edits all. Calibrating a gate takes longer than most edits:
                a :class:`Calibration` in its place has been read before.
            estimator: ``"null"``, ``"corrupt"`` (forget), ``"lens"``, ``"donor"`` (replace).
            margin: logit lead that ``lens`` asks for.
            bank: which states give keys.
            shared: one system over all facts; by default only without a row gate.
            by_place: change each place of the answer by what it needs, whatever the key; by default for ``lens``
                targets behind a row gate without token gate, see :class:`Settings`.
            null_space: share of the protected keys' energy that is projected out of the keys, 0 to 1, in place of the
                penalty β; ``protect`` must say whose.

        Returns:
            The memory, on the CPU; nothing is attached.

        Raises:
            FactError: no facts, duplicates, or an answer that does not fit; ``lens``/``donor`` without ``new_object``.
            ValueError: a hyperparameter is out of range, or activations are not finite.

        Source: TimeROME-DLM (Yao et al. 2026, arXiv 2606.12841); design section 2.2 for gates and protection.

        Example:
            >>> import timerome as tr
            >>> backbone = tr.load("testbed")
            >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
            >>> memory = tr.EditMemory.build(backbone, [fact], coordinate=tr.Coordinate(3))
            >>> with memory.attached(backbone):
            ...     _ = tr.generate(backbone, [fact.prompt], canvas=2)
        """
        facts = facts if isinstance(facts, FactSet) else FactSet(facts)
        if len(facts) == 0:
            raise FactError("EditMemory.build: expected at least one fact, got none.")
        first = coordinates_of(coordinate, facts[0], usual_coordinate(backbone, estimator))
        if isinstance(gate, Calibration):
            gate.check(backbone)
            background = gate.background(protect)
        else:
            background = Background(None if gate is None else gate.resolved(backbone), protect, bank)
        gate = background.gate
        together = not (gate and gate.address) if shared is None else shared
        settings = Settings(
            coordinate=first[0],
            alpha=alpha,
            ridge=ridge,
            sparsity=sparsity,
            rank=rank,
            beta=beta,
            estimator=estimator,
            margin=margin,
            bank=bank or BankConfig(),
            shared=together,
            also=first[1:],
            by_place=making.by_place(by_place, estimator, together, gate),
            null_space=null_space,
        )
        making.check_null_space(null_space, protect, gate)
        memory = cls(
            settings,
            background=background,
            fingerprint=backbone.fingerprint(),
            tokenizer=backbone.tokenizer_digest(),
        )
        memory._backbone = weakref.ref(backbone)
        planned = [Planned(fact.id, fact) for fact in facts]
        memory._commit(making.make(backbone, memory.background, planned, "update", coordinate, settings))
        return memory

    # Operations ------------------------------------------------------------------------------------------------------

    def insert(
        self, facts: Fact | Iterable[Fact], *, backbone: Backbone | None = None, on_conflict: OnConflict = "error",
        coordinate: Policy = None, **settings: Any,
    ) -> tuple[str, ...]:  # fmt: skip
        """Teach facts the model lacks: each is to be answered with its ``new_object``, or else its ``object``.

        Args:
            facts: one or several; all or none are inserted.
            backbone: the model; by default the one the memory was built on or loaded with.
            on_conflict: what to do where an edit in force has the same subject and relation: ``"error"``,
                ``"replace"`` (the old edit comes back if the new one is undone) or ``"keep"`` the old one.
            coordinate: where, as in :meth:`build`.
            settings: other hyperparameters than :attr:`settings`, by name.

        Returns:
            The id of the edit now in force for each fact, in order.

        Raises:
            EditConflictError: facts conflict with edits in force; nothing was changed.
            MemoryMismatchError: the memory was built on another model.
            RuntimeError: no backbone is known.
            ValueError: a setting is out of range.

        Example:
            >>> import timerome as tr
            >>> from timerome.splits import bundled_facts
            >>> backbone, facts = tr.load("testbed"), bundled_facts("relations")
            >>> memory = tr.EditMemory.build(backbone, facts[:1], gate=tr.Gate(facts[10:30]))
            >>> memory.insert(facts[1].with_new_object("Lagos"))
            ('country_capital_city-1',)
            >>> memory.undo(facts[1].id)
            >>> [edit.id for edit in memory.edits] == [facts[0].id]
            True
        """
        stated = [f if f.new_object is not None else f.with_new_object(f.object) for f in _several(facts)]
        return self._change("insert", stated, backbone, on_conflict, coordinate, {"estimator": "lens", **settings})

    def update(
        self, facts: Fact | Iterable[Fact], *, backbone: Backbone | None = None, on_conflict: OnConflict = "replace",
        coordinate: Policy = None, **settings: Any,
    ) -> tuple[str, ...]:  # fmt: skip
        """Replace answers: each fact is to be answered with its ``new_object``. Arguments as in :meth:`insert`.

        Raises:
            FactError: a fact has no ``new_object``.
            EditConflictError: facts conflict with edits in force and ``on_conflict`` is ``"error"``.
        """
        facts = _several(facts)
        if without := [fact.id for fact in facts if fact.new_object is None]:
            raise FactError(
                f"EditMemory.update: facts {without[:5]} have no new_object; give them one, or forget() them."
            )
        return self._change("update", facts, backbone, on_conflict, coordinate, {"estimator": "lens", **settings})

    def forget(
        self, facts: Fact | Iterable[Fact], *, answer: str | None = None, backbone: Backbone | None = None,
        on_conflict: OnConflict = "error", coordinate: Policy = None, **settings: Any,
    ) -> tuple[str, ...]:  # fmt: skip
        """Make the model leave facts unsaid. Other arguments as in :meth:`insert`.

        Args:
            facts: one or several; all or none are forgotten.
            answer: what to say instead, e.g. :data:`timerome.memory.REFUSAL`; None steers to what the model would say
                without being asked.
            backbone: the model.
            on_conflict: where an edit in force has the same subject and relation.
            coordinate: where.
            settings: other hyperparameters.
        """
        wanted = [fact.with_new_object(answer) for fact in _several(facts)]
        usual = {"estimator": "null" if answer is None else "lens"}
        return self._change("forget", wanted, backbone, on_conflict, coordinate, usual | settings)

    def undo(self, *edit_ids: str, spare: bool = True) -> None:
        """Take edits back, whatever came after them; what they superseded acts again. No model is needed.

        Behind a row gate the question of an undone edit is spared from then on: an edit about something else of the
        same subject, which might have taken it for its own, leaves it alone, and the model answers as it used to. That
        ends with an edit about the same subject and relation (or prompt, where a fact names no relation).

        Args:
            edit_ids: of the edits.
            spare: whether to keep the questions' addresses for that; without, nothing stays of an edit but its id.

        Raises:
            KeyError: there is no such edit (also where it was undone before); nothing was changed.
        """
        present = {edit.id for edit in self.history}
        if unknown := [name for name in edit_ids if name not in present]:
            raise KeyError(
                f"EditMemory.undo: no edit {unknown[0]!r}; there are {', '.join(sorted(present)) or 'none'}. "
                "Nothing was changed."
            )
        gone = set(edit_ids)
        left = tuple(edit for edit in self.history if edit.id not in gone)
        self._commit(left, "undo", [edit for edit in self.history if edit.id in gone], spare)

    # Beside other memories --------------------------------------------------------------------------------------------

    def diff(self, other: EditMemory) -> Difference:
        """Return how another memory differs from this one; false where it does not."""
        return diff(self, other)

    def merge(self, other: EditMemory, *, on_conflict: OnConflict = "error") -> tuple[str, ...]:
        """Take over another memory's edits; one transaction. No model is needed.

        Args:
            other: built on the same model, with the same gate and protected facts.
            on_conflict: where an edit in force has the same subject and relation, as in :meth:`insert`.

        Returns:
            Ids of the edits taken over; edits that both have are left as they are. Questions that the other memory
            spares are not taken over.

        Raises:
            MemoryMismatchError: the memories do not fit together; nothing was changed.
            EditConflictError: edits conflict and ``on_conflict`` is ``"error"``; nothing was changed.
        """
        taken = merged(self, other, on_conflict)
        if taken:
            self.background.take_over(other.background)
            self._commit((*self.history, *taken), "merge", taken)
        return tuple(edit.id for edit in taken)

    def rebase(self, backbone: Backbone) -> EditMemory:
        """Return the same edits built again on another model, from their facts; this memory stays as it is.

        For a model that was trained further or whose tokenizer changed. The ledger is not taken along, nor are the
        questions of undone edits that are spared.

        Raises:
            FactError: a fact does not fit the other model.
            ValueError: a coordinate does not exist there.
        """
        return rebuilt(self, backbone)

    def _change(
        self,
        operation: Operation,
        facts: Sequence[Fact],
        backbone: Backbone | None,
        on_conflict: OnConflict,
        coordinate: Policy,
        changes: dict[str, Any],
    ) -> tuple[str, ...]:
        backbone = self._bound(backbone)
        settings = making.settings_for(self.settings, self.background, backbone, changes)
        used = {*self.retired, *(edit.id for edit in self.history)}
        planned = plan(facts, self.history, used, on_conflict)
        fresh = [p for p in planned if not p.kept]
        if fresh:
            made = making.make(backbone, self.background, fresh, operation, coordinate, settings)
            self._commit((*self.history, *made), operation, made)
        return tuple(p.id for p in planned)

    def _commit(
        self, history: Sequence[Edit], operation: str | None = None, edits: Sequence[Edit] = (), spare: bool = True
    ) -> None:
        """Make ``history`` the memory's, and tell whatever is attached and the ledger; all or nothing."""
        before = self.history, self.retired, self.spared
        kept = {edit.id for edit in history}
        gone = [edit for edit in self.history if edit.id not in kept]
        retired = self.retired + tuple(edit.id for edit in gone)
        left = spared(self.spared, gone if spare else [], self.edits, in_force(history))
        try:
            self._become(tuple(history), retired, tuple(left))
            if self.ledger is not None and operation is not None:
                self.ledger.record(operation, edits, self)
        except BaseException:
            self._become(*before)
            raise

    def _become(self, history: tuple[Edit, ...], retired: tuple[str, ...], spared: tuple[Spared, ...]) -> None:
        self.history, self.retired, self.spared = history, retired, spared
        self._derive()
        for attachment in list(self._attachments):
            attachment.refresh()

    def _derive(self) -> None:
        """Bring what depends on the edits in force up to date."""
        self.edits = in_force(self.history)
        self.book: AddressBook | None = self.background.book(self.edits, self.spared)
        self.token_threshold = self.background.token_threshold(self.edits)
        self._solved: tuple[System, ...] | None = None

    @property
    def systems(self) -> tuple[System, ...]:
        """The solved ridge systems of the edits in force."""
        if self._solved is None:
            self._solved = self._systems.of(self.edits, self.background.frames)
        return self._solved

    def _bound(self, backbone: Backbone | None) -> Backbone:
        backbone = backbone or self._backbone()
        if backbone is None:
            raise RuntimeError(
                "EditMemory: no backbone is known to read activations from; pass backbone=..., or load the memory "
                "with one."
            )
        check_belongs(self, backbone)
        self._backbone = weakref.ref(backbone)
        return backbone

    # Use -------------------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> FactSet:
        """The facts of the edits in force, in order."""
        return FactSet([edit.fact for edit in self.edits])

    @property
    def gated(self) -> bool:
        """Whether sequences are addressed: each is given at most one edit."""
        return self.background.gate is not None and self.background.gate.address

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the edits in force act."""
        return tuple(dict.fromkeys(part.coordinate.site for edit in self.edits for part in edit.parts))

    @property
    def protect(self) -> FactSet | None:
        """Facts whose activations get target zero."""
        return self.background.protect

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the memory holds while attached."""
        tensors: list[Tensor] = [t for system in self.systems for t in system.solved]
        tensors += [part.targets for edit in self.edits if edit.settings.by_place for part in edit.parts]
        if self.book is not None:
            tensors += [self.book.mean, self.book.vectors, self.book.owner]
        return sum(t.numel() * t.element_size() for t in tensors)

    def attached(self, backbone: Backbone) -> Attachment:
        """Return a context manager inside which every forward of ``backbone`` is edited.

        Hooks are removed on exit and on any exception; weights and buffers are never written. Edits made meanwhile act
        from the next forward on.

        Raises:
            MemoryMismatchError: the memory was built on another model or tokenizer.
        """
        attachment = Attachment(self, backbone)
        self._attachments.add(attachment)
        return attachment

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the memory as one safetensors file, its manifest inside; whole or not at all.

        Args:
            path: the file.
            dtype: of keys, targets and addresses; bfloat16 halves the file and rounds them.
        """
        from .files import save

        save(self, Path(path), dtype)

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | None = None) -> EditMemory:
        """Read a memory; with a backbone, check that it was built on that one.

        Raises:
            EditFileError: the file is missing, truncated, or no edit file.
            MemoryMismatchError: it was built on another model or tokenizer.
        """
        from .files import load

        memory = load(Path(path))
        if backbone is not None:
            memory._bound(backbone)
        return memory

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process knows neither this one's backbone nor its hooks."""
        return self.__dict__ | {"_backbone": None, "_attachments": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _backbone=_nothing, _attachments=weakref.WeakSet())

    def __repr__(self) -> str:
        s = self.settings
        gates = [n for n, g in (("row", self.gated), ("token", self.token_threshold is not None)) if g]
        return (
            f"EditMemory({len(self.edits)} facts at {s.coordinate}, {s.estimator}, alpha {s.alpha}, ridge {s.ridge}, "
            f"sparsity {s.sparsity}, gate {'+'.join(gates) or None}, {self.nbytes / 1024:.0f} KiB)"
        )


def _several(facts: Fact | Iterable[Fact]) -> list[Fact]:
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise FactError("EditMemory: expected at least one fact, got none.")
    return facts


def _nothing() -> None:
    return None

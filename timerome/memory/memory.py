"""The edit memory: built in closed form, attached without touching the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Coordinate
from ..facts import Fact, FactError, FactSet
from ..functional.gate import cosine_similarity
from ..functional.selection import pivoted_cholesky
from ..functional.solve import RidgeMemory, solve
from .address import AddressBook, Gate, threshold_of
from .attachment import Attachment
from .bank import BankConfig, State, activations, positions_of, states_of
from .targets import EstimatorName, estimator_of

MEAN_FACTS = 16  # negatives that the background mean is taken over, spread over all of them


@dataclass(frozen=True)
class Settings:
    """Everything that determines a memory besides its facts and the backbone; stored in the edit file.

    Attributes:
        coordinate: where keys are read and the edit is added. The edit acts at every step; the coordinate's step is the
            evidence it was chosen by.
        alpha: strength α.
        ridge: λ, relative to the mean squared norm of the keys.
        sparsity: q, share of each row's entries that are dropped.
        rank: most keys a fact may have.
        beta: β, weight of protected keys.
        estimator: how targets are made.
        margin: logit lead ``lens`` targets ask for.
        bank: which states give keys.
        shared: one system over all facts (the paper's form) instead of one a fact.
    """

    coordinate: Coordinate
    alpha: float = 1.0
    ridge: float = 0.01
    sparsity: float = 0.5
    rank: int = 64
    beta: float = 1.0
    estimator: EstimatorName = "null"
    margin: float = 8.0
    bank: BankConfig = field(default_factory=BankConfig)
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"EditMemory.build: expected ridge > 0, got {self.ridge}.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"EditMemory.build: expected 0 <= sparsity < 1, got {self.sparsity}.")
        if self.rank < 1:
            raise ValueError(f"EditMemory.build: expected rank >= 1, got {self.rank}.")
        if self.beta < 0 or self.margin <= 0:
            raise ValueError(f"EditMemory.build: expected beta >= 0 and margin > 0, got {self.beta} and {self.margin}.")
        estimator_of(self.estimator)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`."""
        rest = {k: v for k, v in values.items() if k not in ("coordinate", "bank")}
        return cls(Coordinate(**values["coordinate"]), bank=BankConfig.from_dict(values["bank"]), **rest)


@dataclass
class Edit:
    """One fact's part of a memory: its keys and targets, ``(n, d)`` float32 on the CPU."""

    fact: Fact
    keys: Tensor
    targets: Tensor


class EditMemory:
    """A closed-form edit of what a masked diffusion model knows, kept outside its weights.

    Make one with :meth:`build` or :meth:`load`; use it with :meth:`attached` or in an ``EditCallback``.

    Attributes:
        settings: hyperparameters and coordinate.
        edits: one a fact, in order.
        systems: solved ridge systems: one a fact, or a single one where ``settings.shared``.
        book: the row gate, or None.
        token_threshold: the token gate's cosine similarity, or None.
        fingerprint: of the backbone it was built on.
        tokenizer: digest of that backbone's tokenizer.
    """

    def __init__(
        self,
        settings: Settings,
        edits: Sequence[Edit],
        *,
        mean: Tensor,
        protect: Tensor | None,
        book: AddressBook | None,
        token_threshold: float | None,
        fingerprint: str,
        tokenizer: str,
    ) -> None:
        self.settings = settings
        self.edits = list(edits)
        self.mean = mean
        self.protect = protect
        self.book = book
        self.token_threshold = token_threshold
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.systems = self._solve()

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        facts: FactSet | Sequence[Fact],
        *,
        coordinate: Coordinate | None = None,
        alpha: float = 1.0,
        ridge: float = 0.01,
        sparsity: float = 0.5,
        rank: int = 64,
        beta: float = 1.0,
        protect: FactSet | None = None,
        gate: Gate | None = None,
        estimator: EstimatorName = "null",
        margin: float = 8.0,
        bank: BankConfig | None = None,
        shared: bool | None = None,
    ) -> EditMemory:
        r"""Build a memory for some facts: gather keys and targets, choose keys, solve, calibrate. No gradient is taken.

        With ``gate=None, protect=None`` this is the paper's form: one shared ridge system, added at every token of
        every forward. What the paper's text leaves open is ours: μ is the mean key, keys are read over a bank of
        partially masked states, at most ``rank`` a fact by pivoted Cholesky.

        Args:
            backbone: the model to edit.
            facts: what to change. A fact with ``new_object`` is replaced, one without is forgotten.
            coordinate: where; the last block but one third for ``null`` and ``corrupt``, the last block for ``lens``,
                by default. Take it from a trace: ``CausalTracer(backbone).trace(facts).best()``.
            alpha: strength α.
            ridge: λ > 0, relative.
            sparsity: q, share of each row's entries that are dropped, 0 <= q < 1.
            rank: most keys a fact may have.
            beta: β >= 0, weight of the protected keys.
            protect: facts whose activations get target zero; None protects nothing.
            gate: which rows and tokens may be edited; None edits all.
            estimator: ``"null"``, ``"corrupt"`` (forget), ``"lens"``, ``"donor"`` (replace).
            margin: logit lead that ``lens`` asks for.
            bank: which states give keys.
            shared: one system over all facts; by default only without a row gate.

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
        if estimator in ("lens", "donor") and (without := [f.id for f in facts if f.new_object is None]):
            raise FactError(
                f"EditMemory.build: estimator {estimator!r} replaces answers, but {without[:5]} have no new_object; "
                "give them one, or use 'null' to forget."
            )
        if coordinate is None:
            last = backbone.n_layers - 1
            coordinate = Coordinate(last if estimator == "lens" else max(0, last - backbone.n_layers // 3))
        settings = Settings(
            coordinate=coordinate,
            alpha=alpha,
            ridge=ridge,
            sparsity=sparsity,
            rank=rank,
            beta=beta,
            estimator=estimator,
            margin=margin,
            bank=bank or BankConfig(),
            shared=not (gate and gate.address) if shared is None else shared,
        )
        gathered = [gather(backbone, fact, settings) for fact in facts]
        guarded = None if protect is None else torch.cat([untouched_keys(backbone, fact, settings) for fact in protect])
        # A fact's few keys share most of their direction; a mean over other facts keeps that in what is solved.
        if guarded is not None:
            mean = guarded.mean(0)
        elif gate is not None:
            spread = gate.negatives[:: -(-len(gate.negatives) // MEAN_FACTS)]
            mean = torch.cat([untouched_keys(backbone, fact, settings) for fact in spread]).mean(0)
        else:
            mean = torch.cat([keys for keys, _ in gathered]).mean(0)
        edits = [
            Edit(fact, *select(keys, targets, mean, rank))
            for fact, (keys, targets) in zip(facts, gathered, strict=True)
        ]
        book = AddressBook.build(backbone, facts, gate, settings.bank) if gate is not None and gate.address else None
        token_threshold = None
        if gate is not None and gate.token:
            own = torch.cat([edit.keys for edit in edits]) - mean
            others = [untouched_keys(backbone, fact, settings) for fact in gate.negatives]
            scores = torch.stack([cosine_similarity(keys - mean, own).max() for keys in others])
            token_threshold = threshold_of(scores, gate.epsilon)
        return cls(
            settings,
            edits,
            mean=mean,
            protect=guarded,
            book=book,
            token_threshold=token_threshold,
            fingerprint=backbone.fingerprint(),
            tokenizer=backbone.tokenizer_digest(),
        )

    def _solve(self) -> list[RidgeMemory]:
        s = self.settings
        groups = [self.edits] if s.shared else [[edit] for edit in self.edits]
        return [
            solve(
                torch.cat([edit.keys for edit in group]),
                torch.cat([edit.targets for edit in group]),
                ridge=s.ridge,
                mean=self.mean,
                protect=self.protect,
                beta=s.beta,
            )
            for group in groups
        ]

    @property
    def facts(self) -> FactSet:
        """The edited facts, in order."""
        return FactSet([edit.fact for edit in self.edits])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the memory holds while attached."""
        tensors = [t for system in self.systems for t in system]
        if self.book is not None:
            tensors += [self.book.mean, self.book.vectors, self.book.owner]
        return sum(t.numel() * t.element_size() for t in tensors)

    def attached(self, backbone: Backbone) -> Attachment:
        """Return a context manager inside which every forward of ``backbone`` is edited.

        Hooks are removed on exit and on any exception; weights and buffers are never written.

        Raises:
            MemoryMismatchError: the memory was built on another model or tokenizer.
        """
        return Attachment(self, backbone)

    def save(self, path: str | Path) -> None:
        """Write the memory as one safetensors file, its manifest inside; whole or not at all."""
        from .files import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | None = None) -> EditMemory:
        """Read a memory; with a backbone, check that it was built on that one.

        Raises:
            EditFileError: the file is missing, truncated, or no edit file.
            MemoryMismatchError: it was built on another model or tokenizer.
        """
        from .files import load

        return load(Path(path), backbone)

    def __repr__(self) -> str:
        s = self.settings
        gates = [n for n, g in (("row", self.book), ("token", self.token_threshold)) if g is not None]
        return (
            f"EditMemory({len(self.edits)} facts at {s.coordinate}, {s.estimator}, alpha {s.alpha}, ridge {s.ridge}, "
            f"sparsity {s.sparsity}, gate {'+'.join(gates) or None}, {self.nbytes / 1024:.0f} KiB)"
        )


def gather(backbone: Backbone, fact: Fact, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return a fact's keys and targets over its state bank, ``(n, d)`` each.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    states, keys = bank_keys(backbone, fact, settings)
    extra = {"margin": settings.margin} if settings.estimator == "lens" else {}
    targets = estimator_of(settings.estimator)(backbone, fact, states, keys, settings.coordinate, **extra)
    _refuse_nonfinite(torch.cat(targets), fact, settings)
    return torch.cat(keys), torch.cat(targets)


def untouched_keys(backbone: Backbone, fact: Fact, settings: Settings) -> Tensor:
    """Return the keys of a fact that is to be left alone: its present answer's states, ``(n, d)``."""
    return torch.cat(bank_keys(backbone, fact, settings)[1])


def bank_keys(backbone: Backbone, fact: Fact, settings: Settings) -> tuple[list[State], list[Tensor]]:
    """Return the states of a fact's bank and the keys read in each, ``(n_i, d)``.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    states = states_of(backbone, fact, settings.bank)
    positions = [positions_of(backbone, state, settings.coordinate.role) for state in states]
    keys = activations(backbone, [state.ids for state in states], settings.coordinate.site, positions)
    _refuse_nonfinite(torch.cat(keys), fact, settings)
    return states, keys


def select(keys: Tensor, targets: Tensor, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Keep at most ``rank`` keys, those that span the others best, with their targets."""
    if len(keys) <= rank:
        return keys, targets
    centred = keys.double() - mean.double()
    chosen = pivoted_cholesky(centred @ centred.T, rank)
    return keys[chosen], targets[chosen]


def _refuse_nonfinite(values: Tensor, fact: Fact, settings: Settings) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"EditMemory.build: activations of fact {fact.id!r} at {settings.coordinate.site} are not finite; "
            "check the model's weights and dtype."
        )

"""The row gate: which fact, if any, a sequence is about to state, and so which edit it gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Site
from ..diffusion.states import Encoded
from ..facts import Fact, FactSet
from ..functional.gate import conformal_threshold, cosine_similarity
from .bank import BankConfig, activations, masked_states


@dataclass(frozen=True)
class Gate:
    """Which rows and tokens an edit may touch, calibrated on facts it must leave alone.

    Attributes:
        negatives: facts whose prompts, paraphrases and neighbours must not be edited. For calibration only: never
            report locality on them.
        address: choose each sequence's edit by what the model is about to say (the row gate); otherwise all edits form
            one shared memory.
        token: within an edited row, edit only tokens similar to a key (the token gate).
        epsilon: promised rate of false triggers on prompts like the negatives; None takes the largest calibration score
            as the threshold, which promises 1 / (n + 1).
        layer: block at which sequences are addressed; None is two thirds of the depth.
        span: how many answer positions, from the first, make the address. A long canvas is mostly end-of-text, which
            says nothing about the fact: on the testbed half trained, 16 positions found the right fact for 96 % of
            unseen wordings, the mean over the whole canvas for 88 %.

    Raises:
        ValueError: no negatives, neither gate asked for, or ``epsilon`` outside (0, 1).
    """

    negatives: FactSet
    address: bool = True
    token: bool = False
    epsilon: float | None = None
    layer: int | None = None
    span: int = 16

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ValueError(f"Gate: expected a span of at least one position, got {self.span}.")
        if len(self.negatives) == 0:
            raise ValueError("Gate: expected at least one negative fact to calibrate on, got none.")
        if not (self.address or self.token):
            raise ValueError("Gate: neither address nor token gate asked for; pass gate=None for an ungated memory.")
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise ValueError(f"Gate: expected 0 < epsilon < 1 or None, got {self.epsilon}.")

    def site(self, backbone: Backbone) -> Site:
        """The block whose output addresses a sequence."""
        return Site(backbone.n_layers * 2 // 3 if self.layer is None else self.layer)


def threshold_of(scores: Tensor, epsilon: float | None) -> float:
    """Return the threshold strictly above which a gate fires; see :class:`Gate`."""
    return float(scores.max()) if epsilon is None else conformal_threshold(scores, epsilon)


def addresses(backbone: Backbone, ids: Sequence[Tensor], canvases: Sequence[Tensor], site: Site, span: int) -> Tensor:
    """Return the address of fully masked states: the site's output, averaged over the answer's first positions.

    Args:
        backbone: the model, without a memory acting on it.
        ids: states ``(L,)`` each.
        canvases: their answer positions, boolean ``(L,)`` each.
        site: where to read.
        span: at most so many positions, from the first.

    Returns:
        ``(n, d)`` float32 on the CPU; a state without answer positions has address zero, which matches nothing.
    """
    first = [canvas & (canvas.cumsum(0) <= span) for canvas in canvases]
    found = activations(backbone, ids, site, [backbone.reads_from(positions) for positions in first])
    return torch.stack([f.mean(0) if len(f) else torch.zeros(backbone.hidden_size) for f in found])


def wordings(fact: Fact) -> list[str]:
    """Return every prompt a negative is known by: its own, its paraphrases and its neighbours."""
    return list(dict.fromkeys((fact.prompt, *fact.paraphrases, *fact.neighbours)))


def masked_wordings(backbone: Backbone, facts: Iterable[Fact], bank: BankConfig) -> list[Encoded]:
    """Return every wording of every fact, as it is asked, on every canvas of the bank."""
    bank = replace(bank, prompt_dropout=(0.0,))
    return [
        state.sequence
        for fact in facts
        for prompt in wordings(fact)
        for state in masked_states(backbone, fact, bank, prompt=prompt)
    ]


@dataclass
class AddressBook:
    """Addresses of the edited facts, and the similarity a sequence must exceed to be given a fact's edit.

    Attributes:
        site: where addresses are read.
        span: how many answer positions make an address.
        mean: of the negatives' addresses, ``(d,)``; similarities are taken after subtracting it.
        vectors: addresses, ``(n, d)``.
        owner: index of the fact each belongs to, ``(n,)`` int64.
        threshold: a sequence is given an edit strictly above this cosine similarity.
        calibration: every negative's largest similarity, ``(m,)``.
    """

    site: Site
    span: int
    mean: Tensor
    vectors: Tensor
    owner: Tensor
    threshold: float
    calibration: Tensor

    @classmethod
    def build(cls, backbone: Backbone, facts: Sequence[Fact], gate: Gate, bank: BankConfig) -> AddressBook:
        """Read the facts' addresses and calibrate the threshold on the gate's negatives.

        Raises:
            ValueError: ``epsilon`` is too small for so few negatives, or the layer does not exist.
        """
        site, span = gate.site(backbone), gate.span
        states = [(i, s) for i, fact in enumerate(facts) for s in masked_states(backbone, fact, bank)]
        vectors = addresses(backbone, [s.ids for _, s in states], [s.sequence.canvas for _, s in states], site, span)
        negatives = masked_wordings(backbone, gate.negatives, bank)
        others = addresses(
            backbone, [s.masked(backbone.mask_id) for s in negatives], [s.canvas for s in negatives], site, span
        )
        book = cls(site, span, others.mean(0), vectors, torch.tensor([i for i, _ in states]), 0.0, torch.empty(0))
        book.calibration = book.similarities(others).amax(1)
        book.threshold = threshold_of(book.calibration, gate.epsilon)
        return book

    def similarities(self, found: Tensor) -> Tensor:
        """Cosine similarity of addresses ``(m, d)`` with every stored one, ``(m, n)``."""
        return cosine_similarity(found - self.mean, self.vectors - self.mean)

    def lookup(self, found: Tensor) -> Tensor:
        """Return the fact index each address ``(m, d)`` is given, -1 for none, int64 ``(m,)``."""
        best, index = self.similarities(found).max(1)
        fires = (best > self.threshold) & found.any(1)  # nothing to go by where no answer position was read
        return torch.where(fires, self.owner[index], -1)

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

ROUNDING = 1e-5  # more than the float32 cosine similarities of one state differ by from batch to batch


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

    def resolved(self, backbone: Backbone) -> Gate:
        """The same gate with its layer chosen."""
        return self if self.layer is not None else replace(self, layer=backbone.n_layers * 2 // 3)

    @property
    def site(self) -> Site:
        """The block whose output addresses a sequence.

        Raises:
            ValueError: the layer was left to be chosen; see :meth:`resolved`.
        """
        if self.layer is None:
            raise ValueError("Gate: no layer chosen yet; resolve the gate on its backbone first.")
        return Site(self.layer)


def threshold_of(scores: Tensor, epsilon: float | None) -> float:
    """Return the threshold strictly above which a gate fires; see :class:`Gate`."""
    # A negative is addressed again in a batch of another shape, where its score may differ in the last digits.
    return ROUNDING + (float(scores.max()) if epsilon is None else conformal_threshold(scores, epsilon))


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


def address_of(backbone: Backbone, fact: Fact, gate: Gate, bank: BankConfig) -> Tensor:
    """Return a fact's address, one vector a fully masked state of its bank, ``(k, d)``."""
    states = masked_states(backbone, fact, bank)
    canvases = [state.sequence.canvas for state in states]
    return addresses(backbone, [state.ids for state in states], canvases, gate.site, gate.span)


def negative_addresses(backbone: Backbone, gate: Gate, bank: BankConfig) -> Tensor:
    """Return the addresses of every wording of every negative, ``(m, d)``.

    Raises:
        ValueError: the layer does not exist.
    """
    states = masked_wordings(backbone, gate.negatives, bank)
    ids = [state.masked(backbone.mask_id) for state in states]
    return addresses(backbone, ids, [state.canvas for state in states], gate.site, gate.span)


@dataclass
class AddressBook:
    """Addresses of the edited facts, and the similarity a sequence must exceed to be given a fact's edit.

    Attributes:
        site: where addresses are read.
        span: how many answer positions make an address.
        mean: of the negatives' addresses, ``(d,)``; similarities are taken after subtracting it.
        vectors: addresses, ``(n, d)``.
        owner: index of the edit each belongs to, ``(n,)`` int64.
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
    def of(cls, gate: Gate, mean: Tensor, vectors: Sequence[Tensor], scores: Sequence[Tensor]) -> AddressBook:
        """Put edits together: the address ``(k, d)`` of each, and each negative's similarity to it, ``(m,)``.

        Raises:
            ValueError: ``epsilon`` is too small for so few negatives.
        """
        owner = torch.tensor([i for i, own in enumerate(vectors) for _ in own], dtype=torch.int64)
        calibration = torch.stack(list(scores)).amax(0)
        threshold = threshold_of(calibration, gate.epsilon)
        return cls(gate.site, gate.span, mean, torch.cat(list(vectors)), owner, threshold, calibration)

    def similarities(self, found: Tensor) -> Tensor:
        """Cosine similarity of addresses ``(m, d)`` with every stored one, ``(m, n)``."""
        return cosine_similarity(found - self.mean, self.vectors - self.mean)

    def lookup(self, found: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the index of the edit each address ``(m, d)`` is given, -1 for none, int64 ``(m,)``.

        Args:
            found: addresses of sequences.
            allowed: edits that each may have, boolean ``(m, edits)``; None is all.
        """
        similarities = self.similarities(found)
        if allowed is not None:
            similarities = similarities.masked_fill(~allowed[:, self.owner], -torch.inf)
        best, index = similarities.max(1)
        fires = (best > self.threshold) & found.any(1)  # nothing to go by where no answer position was read
        return torch.where(fires, self.owner[index], -1)

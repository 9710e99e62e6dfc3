"""Facts that must be left alone, and what a memory has to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones import Backbone
from ..facts import FactSet
from ..functional.gate import cosine_similarity, name_overlap
from .address import (
    AddressBook,
    Gate,
    Reading,
    Spellings,
    by_wording,
    combined,
    directions,
    floor_of,
    negative_addresses,
    related_cosines,
    spellings,
    threshold_of,
)
from .bank import BankConfig
from .edit import Edit, Part, Spared
from .gather import Readings, untouched_keys
from .settings import Place

MEAN_FACTS = 16  # negatives that the background mean is taken over, spread over all of them


@dataclass(frozen=True)
class Frame:
    """What the ridge systems at one place share; fixed, so that edits can come and go without moving it.

    Attributes:
        mean: μ, ``(d,)`` float32: of the protected keys, else of the negatives'.
        scale: s̄ of shared systems: the mean squared norm of those keys about μ.
        protect: protected keys, ``(P, d)``, or None.
    """

    mean: Tensor
    scale: float
    protect: Tensor | None


class Background:
    """Negatives and protected facts of a memory, with what was read of them.

    What is read is kept: frames and the addresses' mean also in the edit file, the rest until the process ends.

    Attributes:
        gate: the gate and its negatives; None edits every row and token.
        protect: facts whose activations get target zero, or None.
        bank: over which they and the negatives are read, whatever the bank of an edit.
        frames: by place.
        centre: mean of the negatives' addresses, ``(d,)``; None before they were read, or without a row gate.
        floor: cosine that two questions about one subject seldom exceed; -1 before the negatives were read.
        negatives: addresses of the negatives' wordings, and which wording each is of; None before they were read.
    """

    def __init__(
        self,
        gate: Gate | None = None,
        protect: FactSet | None = None,
        bank: BankConfig | None = None,
        frames: dict[Place, Frame] | None = None,
        centre: Tensor | None = None,
        floor: float = -1.0,
        negatives: tuple[Reading, Tensor] | None = None,
    ) -> None:
        self.gate, self.protect, self.bank = gate, protect, bank or BankConfig()
        self.frames = frames or {}
        self.centre, self.floor = centre, floor
        self.negatives = negatives
        self._keys: dict[Place, list[Tensor]] = {}

    def frame(self, backbone: Backbone, place: Place) -> Frame | None:
        """Return the frame of a place; None without negatives and protected facts.

        A fact's few keys share most of their direction: a mean over other facts keeps that in what is solved.
        """
        if place not in self.frames:
            if self.protect is not None:
                facts = self.protect
            elif self.gate is not None:
                facts = self.gate.negatives[:: -(-len(self.gate.negatives) // MEAN_FACTS)]
            else:
                return None
            keys = torch.cat(untouched_keys(backbone, facts, self.bank, place))
            mean = keys.mean(0)
            scale = float((keys.double() - mean.double()).square().sum(1).mean())
            self.frames[place] = Frame(mean, scale, None if self.protect is None else keys)
        return self.frames[place]

    def take_over(self, other: Background) -> None:
        """Take over what another background, of the same facts, has read and this one has not."""
        self.frames = {**other.frames, **self.frames}
        if self.centre is None:
            self.centre, self.floor = other.centre, other.floor

    def read(self, backbone: Backbone) -> tuple[Reading, Tensor, Tensor]:
        """Return the addresses of all wordings of the negatives, which wording each is of, and the addresses' mean.

        Raises:
            ValueError: there is no row gate.
        """
        if self.gate is None or not self.gate.address:
            raise ValueError("Background.read: there is no gate that addresses rows; pass one with address=True.")
        if self.negatives is None:
            self.negatives = negative_addresses(backbone, self.gate, self.bank)
        others, wording = self.negatives
        if self.centre is None:
            self.centre = others.vectors.mean(0)
            self.floor = floor_of(related_cosines(backbone, self.gate, self.centre, self.bank), self.gate.same_subject)
        return others, wording, self.centre

    def addressed(
        self, backbone: Backbone, readings: Sequence[Readings]
    ) -> list[tuple[Tensor | None, Spellings, Tensor | None]]:
        """Return each fact's address, its subject's spellings and each negative's score; none without a row gate."""
        if self.gate is None or not self.gate.address:
            return [(None, (), None)] * len(readings)
        others, wording, centre = self.read(backbone)
        found = [directions(r.said, centre) for r in readings]
        spelled = {name: spellings(backbone, name) for name in {r.fact.subject for r in readings}}
        subjects = [spelled[r.fact.subject] for r in readings]
        cosines = cosine_similarity(others.vectors - centre, torch.cat(found)).split([len(f) for f in found], 1)
        named = name_overlap(others.prompts, subjects)
        # Without the floor, which only makes fewer fire: with it, hardly a negative is left to set a threshold by.
        scores = [combined(self.gate, -2.0, c.amax(1), named[:, i]) for i, c in enumerate(cosines)]
        return [
            (address, subject, by_wording(score, wording))
            for address, subject, score in zip(found, subjects, scores, strict=True)
        ]

    def token_scores(self, backbone: Backbone, parts: tuple[Part, ...]) -> Tensor | None:
        """Return each negative's largest similarity with an edit's keys, ``(m,)``; None without a token gate."""
        if self.gate is None or not self.gate.token:
            return None
        scores = []
        for part in parts:
            place = Place.of(part.coordinate)
            frame = self.frame(backbone, place)
            assert frame is not None
            if place not in self._keys:
                self._keys[place] = untouched_keys(backbone, self.gate.negatives, self.bank, place)
            own = part.keys - frame.mean
            scores.append(torch.stack([cosine_similarity(keys - frame.mean, own).max() for keys in self._keys[place]]))
        return torch.stack(scores).amax(0)

    def book(self, edits: tuple[Edit, ...], spared: tuple[Spared, ...] = ()) -> AddressBook | None:
        """Return the address book of some edits and questions to spare; None without a row gate, or without edits."""
        if self.gate is None or not self.gate.address or not edits:
            return None
        assert self.centre is not None
        vectors = [edit.address for edit in edits if edit.address is not None]
        scores = [edit.address_scores for edit in edits if edit.address_scores is not None]
        vectors += [one.address for one in spared]
        subjects = [edit.subject for edit in edits] + [one.spellings for one in spared]
        return AddressBook.of(self.gate, self.centre, self.floor, vectors, subjects, scores)

    def token_threshold(self, edits: tuple[Edit, ...]) -> float | None:
        """Return the token gate's cosine similarity for some edits; None without a token gate."""
        scores = [edit.token_scores for edit in edits if edit.token_scores is not None]
        if self.gate is None or not scores:
            return None
        return threshold_of(torch.stack(scores).amax(0), self.gate.epsilon)

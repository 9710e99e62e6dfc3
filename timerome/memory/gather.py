"""What an edit is solved from: keys and targets read over a fact's state bank, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Coordinate
from ..facts import Fact
from ..functional.selection import pivoted_cholesky
from .bank import BankConfig, State, activations, places_of, positions_of, states_of
from .settings import Place, Settings
from .targets import estimator_of, lens_offsets


def gather(
    backbone: Backbone, fact: Fact, settings: Settings, coordinate: Coordinate | None = None
) -> tuple[Tensor, Tensor]:
    """Return a fact's keys and targets at a coordinate over its state bank, ``(n, d)`` each.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    coordinate = coordinate or settings.coordinate
    place = Place.of(coordinate)
    states, keys = bank_keys(backbone, fact, settings.bank, place)
    extra = {"margin": settings.margin} if settings.estimator == "lens" else {}
    targets = estimator_of(settings.estimator)(backbone, fact, states, keys, coordinate, **extra)
    _refuse_nonfinite(torch.cat(targets), fact, place)
    return torch.cat(keys), torch.cat(targets)


def gather_by_place(backbone: Backbone, fact: Fact, settings: Settings, coordinate: Coordinate) -> Tensor:
    """Return what each place of a fact's answer is to be changed by, ``(places, d)``; see :class:`Settings`.

    What the k-th token of an answer shall be does not depend on how the fact was asked for, so one change is sought
    that gives it its margin in every state of the bank.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    place = Place.of(coordinate)
    states, keys = bank_keys(backbone, fact, settings.bank, place)
    places, count = places_of(backbone, fact, states)
    offsets = lens_offsets(backbone, states, keys, places, count, coordinate, margin=settings.margin)
    _refuse_nonfinite(offsets, fact, place)
    return offsets


def untouched_keys(backbone: Backbone, fact: Fact, bank: BankConfig, place: Place) -> Tensor:
    """Return the keys of a fact that is to be left alone: its present answer's states, ``(n, d)``."""
    return torch.cat(bank_keys(backbone, fact, bank, place)[1])


def bank_keys(backbone: Backbone, fact: Fact, bank: BankConfig, place: Place) -> tuple[list[State], list[Tensor]]:
    """Return the states of a fact's bank and the keys read in each, ``(n_i, d)``.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    states = states_of(backbone, fact, bank)
    positions = [positions_of(backbone, state, place.role) for state in states]
    keys = activations(backbone, [state.ids for state in states], place.site, positions)
    _refuse_nonfinite(torch.cat(keys), fact, place)
    return states, keys


def select(keys: Tensor, targets: Tensor, mean: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Keep at most ``rank`` keys, those that span the others best about ``mean``, with their targets."""
    if len(keys) <= rank:
        return keys, targets
    centred = keys.double() if mean is None else keys.double() - mean.double()
    chosen = pivoted_cholesky(centred @ centred.T, rank)
    return keys[chosen], targets[chosen]


def _refuse_nonfinite(values: Tensor, fact: Fact, place: Place) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"EditMemory.build: activations of fact {fact.id!r} at {place.site} are not finite; "
            "check the model's weights and dtype."
        )

"""What edits are solved from: keys and targets read over the state banks of facts, without a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Coordinate
from ..facts import Fact
from ..functional.selection import pivoted_cholesky
from .address import Gate, address_wish, pooled
from .bank import BankConfig, State, masked_states, places_of, positions_of, sequences_of, states_of
from .reading import Wish, read
from .settings import Place, Settings
from .targets import estimator_of, lens_offsets

TOGETHER = 8192  # tokens of the states that are read and held at once


@dataclass
class Readings:
    """What was read of one fact, float32 on the CPU.

    Attributes:
        fact: the fact.
        states: of its bank.
        keys: at each place, ``(n_i, d)`` a state.
        said: what the model is about to say in each fully masked state, ``(k, d)``; none without a row gate.
    """

    fact: Fact
    states: list[State]
    keys: dict[Place, list[Tensor]] = field(default_factory=dict)
    said: Tensor = field(default_factory=lambda: torch.empty(0))


def read_facts(
    backbone: Backbone,
    facts: Sequence[Fact],
    bank: BankConfig,
    places: Sequence[Sequence[Place]],
    gate: Gate | None = None,
) -> Iterator[list[Readings]]:
    """Yield what is read of facts, in order, as many together as may be held at once.

    Args:
        backbone: the model.
        facts: the facts.
        bank: their states.
        places: where keys are read, for each fact.
        gate: what they are to be addressed by; None reads no address.

    Raises:
        FactError: a fact does not fit.
        FloatingPointError: an activation is not finite.
    """
    some: list[_Plan] = []
    for fact, where in zip(facts, places, strict=True):
        some.append(_Plan(backbone, fact, bank, where, gate))
        if sum(plan.tokens for plan in some) >= TOGETHER:
            yield _read_together(backbone, some, gate)
            some = []
    if some:
        yield _read_together(backbone, some, gate)


class _Plan:
    """What is to be read of one fact."""

    def __init__(
        self, backbone: Backbone, fact: Fact, bank: BankConfig, places: Sequence[Place], gate: Gate | None
    ) -> None:
        self.fact, self.places = fact, places
        sequences = sequences_of(backbone, fact, bank)
        self.states = states_of(backbone, fact, bank, sequences)
        self.wishes = [
            Wish(state.ids, {place.site: positions_of(backbone, state, place.role) for place in places})
            for state in self.states
        ]
        if gate is not None:
            self.wishes += [
                address_wish(backbone, state.ids, state.sequence.canvas, gate.site, gate.span)
                for state in masked_states(backbone, sequences)
            ]
        self.tokens = sum(len(wish.ids) for wish in self.wishes)


def _read_together(backbone: Backbone, plans: Sequence[_Plan], gate: Gate | None) -> list[Readings]:
    found = [Readings(plan.fact, plan.states) for plan in plans]
    for plan, readings in zip(plans, found, strict=True):
        readings.keys = {place: [torch.empty(0)] * len(plan.states) for place in plan.places}
        readings.said = torch.zeros(len(plan.wishes) - len(plan.states), backbone.hidden_size)
    owners = [(plan, readings, i) for plan, readings in zip(plans, found, strict=True) for i in range(len(plan.wishes))]
    for n, rows in read(backbone, [plan.wishes[i] for plan, _, i in owners]):
        plan, readings, i = owners[n]
        if i >= len(plan.states):
            assert gate is not None
            readings.said[i - len(plan.states)] = pooled(backbone, rows, gate.site)
            continue
        for place in plan.places:
            readings.keys[place][i] = rows[place.site].float().cpu()
    for readings in found:
        for place, keys in readings.keys.items():
            _refuse_nonfinite(torch.cat(keys), readings.fact, place)
    return found


def targets_of(
    backbone: Backbone, readings: Sequence[Readings], coordinate: Coordinate, settings: Settings
) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and targets of facts at a coordinate, ``(n, d)`` each.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    place = Place.of(coordinate)
    facts = [r.fact for r in readings for _ in r.states]
    states, keys = [s for r in readings for s in r.states], [k for r in readings for k in r.keys[place]]
    extra = {"margin": settings.margin} if settings.estimator == "lens" else {}
    targets = estimator_of(settings.estimator)(backbone, facts, states, keys, coordinate, **extra)
    found, start = [], 0
    for r in readings:
        own = torch.cat(targets[start : start + len(r.states)])
        start += len(r.states)
        _refuse_nonfinite(own, r.fact, place)
        found.append((torch.cat(r.keys[place]), own))
    return found


def offsets_of(
    backbone: Backbone, readings: Sequence[Readings], coordinate: Coordinate, settings: Settings
) -> list[Tensor]:
    """Return what each place of each fact's answer is to be changed by, ``(places, d)``; see :class:`Settings`.

    What the k-th token of an answer shall be does not depend on how the fact was asked for, so one change is sought
    that gives it its margin in every state of the bank.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    place = Place.of(coordinate)
    found = []
    for r in readings:  # each by itself: what one fact's changes are must not depend on which others are made with it
        places, count = places_of(backbone, r.fact, r.states)
        own = lens_offsets(backbone, r.states, r.keys[place], places, count, coordinate, margin=settings.margin)
        _refuse_nonfinite(own, r.fact, place)
        found.append(own)
    return found


def gather(
    backbone: Backbone, facts: Sequence[Fact], settings: Settings, coordinate: Coordinate | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and targets of facts at a coordinate over their state banks, ``(n, d)`` each.

    Raises:
        FloatingPointError: an activation is not finite.
    """
    coordinate = coordinate or settings.coordinate
    places = [[Place.of(coordinate)]] * len(facts)
    return [
        pair
        for readings in read_facts(backbone, facts, settings.bank, places)
        for pair in targets_of(backbone, readings, coordinate, settings)
    ]


def untouched_keys(backbone: Backbone, facts: Sequence[Fact], bank: BankConfig, place: Place) -> list[Tensor]:
    """Return the keys of facts that are to be left alone: their present answers' states, ``(n, d)`` each."""
    found = read_facts(backbone, facts, bank, [[place]] * len(facts))
    return [torch.cat(readings.keys[place]) for some in found for readings in some]


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

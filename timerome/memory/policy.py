"""Coordinate policies: one place for all facts, one for each, for each group, or several sites at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..backbones import Backbone
from ..coordinates import Coordinate
from ..facts import Fact

Coordinates = Coordinate | Sequence[Coordinate]
Policy = Coordinates | Mapping[Any, Coordinates] | Callable[[Fact], Coordinates] | None


def usual_coordinate(backbone: Backbone, estimator: str) -> Coordinate:
    """Where an estimator works best: the last block for ``lens``, a third of the depth before it for the others."""
    last = backbone.n_layers - 1
    return Coordinate(last if estimator == "lens" else max(0, last - backbone.n_layers // 3))


def coordinates_of(policy: Policy, fact: Fact, usual: Coordinates) -> tuple[Coordinate, ...]:
    """Return a fact's coordinates under a policy; see :meth:`EditMemory.build`.

    Raises:
        ValueError: a mapping has neither the fact's id nor its group, or there is no coordinate.
    """
    found: Any = usual if policy is None else policy
    if isinstance(found, Mapping):
        if fact.id not in found and fact.group not in found:
            raise ValueError(
                f"EditMemory.build: no coordinate for fact {fact.id!r}, nor for its group {fact.group!r}; "
                f"the mapping has {list(found)[:5]}."
            )
        found = found[fact.id] if fact.id in found else found[fact.group]
    elif callable(found):
        found = found(fact)
    found = (found,) if isinstance(found, Coordinate) else tuple(found)
    if not found:
        raise ValueError(f"EditMemory.build: expected at least one coordinate for fact {fact.id!r}, got none.")
    return found

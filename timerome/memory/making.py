"""How an edit is made: its settings, its parts read from the model, its address. No memory is changed by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..backbones import Backbone
from ..coordinates import Coordinate
from ..facts import Fact, FactError, FactSet
from .address import Gate
from .attachment import unedited
from .background import Background
from .edit import Edit, Operation, Part
from .gather import Readings, offsets_of, read_facts, select, targets_of
from .operations import Planned
from .policy import Policy, coordinates_of, usual_coordinate
from .settings import Place, Settings

SHARED = ("alpha", "ridge", "sparsity", "beta", "null_space")  # what all edits of one system have in common
CHANGEABLE = (*SHARED, "rank", "estimator", "margin", "bank", "by_place")


def by_place(wanted: bool | None, estimator: str, shared: bool, gate: Gate | None) -> bool:
    """Whether edits are by place: as wanted, or where they can be.

    Raises:
        ValueError: they are wanted behind a token gate.
    """
    token_gate = gate is not None and gate.token
    if wanted and token_gate:
        raise ValueError("EditMemory.build: a token gate compares with keys, which edits by_place do not have.")
    return estimator == "lens" and not shared and not token_gate if wanted is None else wanted


def check_null_space(null_space: float | None, protect: FactSet | None, gate: Gate | None) -> None:
    """Refuse a null space of nothing, or behind a token gate.

    Raises:
        ValueError: it is so.
    """
    if null_space is not None and protect is None:
        raise ValueError("EditMemory.build: null_space needs facts to protect; pass protect=..., or leave it out.")
    if null_space is not None and gate is not None and gate.token:
        raise ValueError(
            "EditMemory.build: a token gate compares with keys, which null_space takes a part out of; use beta."
        )


def settings_for(usual: Settings, background: Background, backbone: Backbone, changes: dict[str, Any]) -> Settings:
    """Return a memory's settings with some changed; the coordinate goes with the estimator.

    Raises:
        TypeError: there is no such setting.
        ValueError: a value is out of range, or is to differ between edits that share a system.
    """
    if unknown := sorted(set(changes) - set(CHANGEABLE)):
        raise TypeError(f"EditMemory: unknown settings {unknown}.")
    estimator = changes["estimator"]
    same = estimator == usual.estimator
    where = {} if same else {"coordinate": usual_coordinate(backbone, estimator), "also": ()}
    wanted = changes.get("by_place", usual.by_place if same else None)
    settings = replace(
        usual, **{**changes, **where, "by_place": by_place(wanted, estimator, usual.shared, background.gate)}
    )  # fmt: skip
    check_null_space(settings.null_space, background.protect, background.gate)
    if settings.shared and any(getattr(settings, name) != getattr(usual, name) for name in SHARED):
        raise ValueError(f"EditMemory: all edits of a shared memory have the same {', '.join(SHARED)}.")
    return settings


def make(
    backbone: Backbone,
    background: Background,
    planned: Sequence[Planned],
    operation: Operation,
    policy: Policy,
    settings: Settings,
) -> tuple[Edit, ...]:
    """Return new edits for facts, read from the model as it is without any memory.

    Args:
        backbone: the model.
        background: of the memory they are for.
        planned: the facts, with the ids of their edits.
        operation: what makes them.
        policy: where; None is where the settings say.
        settings: their hyperparameters.

    Raises:
        FactError: a fact does not fit, or has no ``new_object`` although the estimator replaces answers.
        ValueError: a coordinate does not exist.
        FloatingPointError: activations are not finite.
    """
    if settings.estimator in ("lens", "donor"):
        if without := [p.fact.id for p in planned if p.fact.new_object is None]:
            raise FactError(
                f"EditMemory.build: estimator {settings.estimator!r} replaces answers, but {without[:5]} have no "
                "new_object; give them one, or use 'null' to forget."
            )
    gate = background.gate if background.gate is not None and background.gate.address else None
    own = [_settings_of(item.fact, policy, settings) for item in planned]
    places = [[Place.of(c) for c in each.coordinates] for each in own]
    edits: list[Edit] = []
    with unedited(backbone.model):
        for readings in read_facts(backbone, [item.fact for item in planned], settings.bank, places, gate):
            some = slice(len(edits), len(edits) + len(readings))
            parts = _parts(backbone, background, readings, own[some])
            found = background.addressed(backbone, readings)
            for item, mine, settled, addressed in zip(planned[some], parts, own[some], found, strict=True):
                tokens = background.token_scores(backbone, mine)
                edits.append(Edit(item.id, item.fact, settled, mine, operation, item.supersedes, *addressed, tokens))
    return tuple(edits)


def _settings_of(fact: Fact, policy: Policy, settings: Settings) -> Settings:
    where = coordinates_of(policy, fact, settings.coordinates)
    return replace(settings, coordinate=where[0], also=where[1:])


def _parts(
    backbone: Backbone, background: Background, readings: Sequence[Readings], own: Sequence[Settings]
) -> list[tuple[Part, ...]]:
    """Return the parts of facts that were read together, those of one coordinate made together."""
    found: dict[tuple[int, Coordinate], Part] = {}
    for coordinate in dict.fromkeys(c for settings in own for c in settings.coordinates):
        mine = [i for i, settings in enumerate(own) if coordinate in settings.coordinates]
        some, settings = [readings[i] for i in mine], own[mine[0]]
        if settings.by_place:
            for i, offsets in zip(mine, offsets_of(backbone, some, coordinate, settings), strict=True):
                found[i, coordinate] = Part(coordinate, offsets[:0], offsets)
            continue
        frame = background.frame(backbone, Place.of(coordinate))
        mean = None if frame is None else frame.mean
        for i, pair in zip(mine, targets_of(backbone, some, coordinate, settings), strict=True):
            found[i, coordinate] = Part(coordinate, *select(*pair, mean, settings.rank))
    return [tuple(found[i, c] for c in settings.coordinates) for i, settings in enumerate(own)]

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
from .gather import gather, gather_by_place, select
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
    with unedited(backbone.model):
        return tuple(_edit(backbone, background, item, operation, policy, settings) for item in planned)


def _edit(
    backbone: Backbone, background: Background, item: Planned, operation: Operation, policy: Policy, settings: Settings
) -> Edit:
    where = coordinates_of(policy, item.fact, settings.coordinates)
    own = replace(settings, coordinate=where[0], also=where[1:])
    parts = tuple(_part(backbone, background, item.fact, own, c) for c in where)
    address, subject, scores = background.address(backbone, item.fact, own.bank) or (None, (), None)
    tokens = background.token_scores(backbone, parts)
    return Edit(item.id, item.fact, own, parts, operation, item.supersedes, address, subject, scores, tokens)


def _part(backbone: Backbone, background: Background, fact: Fact, settings: Settings, coordinate: Coordinate) -> Part:
    if settings.by_place:
        offsets = gather_by_place(backbone, fact, settings, coordinate)
        return Part(coordinate, offsets[:0], offsets)
    keys, targets = gather(backbone, fact, settings, coordinate)
    frame = background.frame(backbone, Place.of(coordinate))
    return Part(coordinate, *select(keys, targets, None if frame is None else frame.mean, settings.rank))

"""Hyperparameters of an edit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..coordinates import Coordinate, Role, Site
from .bank import BankConfig
from .targets import EstimatorName, estimator_of


class Place(NamedTuple):
    """A site and the positions read there: what keys have in common. The step of a coordinate is not part of it."""

    site: Site
    role: Role

    @classmethod
    def of(cls, coordinate: Coordinate) -> Place:
        """The place of a coordinate."""
        return cls(coordinate.site, coordinate.role)

    def __str__(self) -> str:
        return f"{self.site}.{self.role}"


@dataclass(frozen=True)
class Settings:
    """Everything that determines an edit besides its fact and the backbone; stored in the edit file.

    Attributes:
        coordinate: where keys are read and the edit is added. The edit acts at every step; the coordinate's step is the
            evidence it was chosen by.
        alpha: strength α, shared out evenly where there are several coordinates.
        ridge: λ, relative to the mean squared norm of the keys.
        sparsity: q, share of each row's entries that are dropped.
        rank: most keys a fact may have, at each coordinate.
        beta: β, weight of protected keys.
        estimator: how targets are made.
        margin: logit lead ``lens`` targets ask for.
        bank: which states give keys.
        shared: one system over all facts (the paper's form) instead of one a fact.
        also: further coordinates, at other sites, at which the same edit acts.
        null_space: share of the protected keys' energy that is projected out of the keys, in place of β; None is the
            penalty.
        by_place: each place of the answer is changed by what it needs in every state of the bank, whatever the key;
            there are no keys then, and ridge, rank, beta, null_space and protected facts have no part in it.

    Raises:
        ValueError: a field is out of range, two coordinates share a site, or ``by_place`` is asked of other targets
            than ``lens``, or of a shared system.
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
    also: tuple[Coordinate, ...] = ()
    by_place: bool = False
    null_space: float | None = None

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"EditMemory.build: expected ridge > 0, got {self.ridge}.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"EditMemory.build: expected 0 <= sparsity < 1, got {self.sparsity}.")
        if self.rank < 1:
            raise ValueError(f"EditMemory.build: expected rank >= 1, got {self.rank}.")
        if not self.beta >= 0 or not self.margin > 0:
            raise ValueError(f"EditMemory.build: expected beta >= 0 and margin > 0, got {self.beta} and {self.margin}.")
        if self.null_space is not None and not 0 < self.null_space < 1:
            raise ValueError(f"EditMemory.build: expected 0 < null_space < 1, got {self.null_space}.")
        estimator_of(self.estimator)
        if self.by_place and (self.estimator != "lens" or self.shared):
            raise ValueError(
                f"EditMemory.build: by_place needs lens targets and a system a fact, got {self.estimator!r} and "
                f"shared={self.shared}; leave it out."
            )
        sites = [c.site for c in self.coordinates]
        if len(set(sites)) < len(sites):
            raise ValueError(f"EditMemory.build: expected coordinates at distinct sites, got {list(map(str, sites))}.")

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Every coordinate the edit acts at."""
        return (self.coordinate, *self.also)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`."""
        rest = {k: v for k, v in values.items() if k not in ("coordinate", "bank", "also")}
        return cls(
            Coordinate(**values["coordinate"]),
            bank=BankConfig.from_dict(values["bank"]),
            also=tuple(Coordinate(**c) for c in values.get("also", ())),
            **rest,
        )

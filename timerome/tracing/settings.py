"""What a trace depends on beside the model and the facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..coordinates import ROLES, Role, Site
from ..diffusion import SamplerConfig
from ..functional.effects import Score
from .corrupted_inputs import Corruption
from .runs import WINDOWS, Window

Commits = Literal["free", "teacher", "both"]
Tokens = Literal["all", "first"]


@dataclass(frozen=True)
class TraceSettings:
    """The arguments of :class:`timerome.CausalTracer` that decide its result; described there.

    Raises:
        ValueError: a field is outside its range.
    """

    sites: tuple[Site, ...]
    roles: tuple[Role, ...] = ("subject_last", "object")
    steps: tuple[int, ...] | None = None
    window: Window = "from"
    layer_window: int = 1
    corruption: Corruption = "noise"
    noise_scale: float = 3.0
    draws: int = 4
    canvas: int | None = None
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=8))
    commits: Commits = "free"
    tokens: Tokens = "all"
    prune: float | None = None
    seed: int = 0
    min_total_effect: float = 0.1

    def __post_init__(self) -> None:
        _one_of("window", self.window, WINDOWS)
        _one_of("corruption", self.corruption, get_args(Corruption))
        _one_of("commits", self.commits, get_args(Commits))
        _one_of("tokens", self.tokens, get_args(Tokens))
        for role in self.roles:
            _one_of("roles", role, ROLES)
        for name, given in (("sites", self.sites), ("roles", self.roles), ("steps", self.steps)):
            if given is not None and (not given or len(set(given)) < len(given)):
                raise ValueError(f"CausalTracer: expected at least one of {name}, each once, got {list(given)}.")
        if self.steps is not None and min(self.steps) < 0:
            raise ValueError(f"CausalTracer: steps count from 0, got {list(self.steps)}.")
        for name, value in (("draws", self.draws), ("canvas", self.canvas), ("layer_window", self.layer_window)):
            if value is not None and value < 1:
                raise ValueError(f"CausalTracer: expected {name} >= 1, got {value}.")
        if not self.noise_scale >= 0:
            raise ValueError(f"CausalTracer: expected noise_scale >= 0, got {self.noise_scale}.")
        if not self.min_total_effect > 0:
            raise ValueError(f"CausalTracer: expected min_total_effect > 0, got {self.min_total_effect}.")
        if self.prune is not None and not 0 < self.prune < 1:
            raise ValueError(f"CausalTracer: expected prune, a chance of error, in (0, 1) or None, got {self.prune}.")

    @property
    def free(self) -> bool:
        """Whether runs that commit their own predictions are made."""
        return self.commits != "teacher"

    @property
    def forced(self) -> bool:
        """Whether runs that commit the true tokens are made."""
        return self.commits != "free"

    def minimum(self, score: Score) -> float:
        """The total effect below which a share of it says nothing, in the units of ``score``."""
        return 0.01 if score == "prob" else self.min_total_effect

    def restored_with(self, site: Site, n_layers: int) -> tuple[Site, ...]:
        """The sites that are restored together for a coordinate: the layer window around it, of the same module."""
        first = max(0, site.layer - (self.layer_window - 1) // 2)
        last = min(n_layers - 1, site.layer + self.layer_window // 2)
        return tuple(Site(layer, site.module) for layer in range(first, last + 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        sites = [[site.layer, site.module] for site in self.sites]
        # As it is read back: tuples are lists.
        return dict(json.loads(json.dumps({**asdict(self), "sites": sites})))


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"CausalTracer: expected {name} in {tuple(allowed)}, got {value!r}.")

"""How facts are traced: one value, the same in Python, in a file and on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..coordinates import MODULES, ROLES, Module, Role, Site
from ..diffusion import SamplerConfig
from ..functional.effects import Score
from .corrupted_inputs import Corruption

Window = Literal["single", "from", "until"]
Commits = Literal["free", "teacher", "both"]
Tokens = Literal["all", "first"]
_NOT_IN_THE_RESULT = ("modules", "batch_size", "activation_budget")


@dataclass(frozen=True)
class TraceConfig:
    """What :class:`timerome.CausalTracer` traces, and how.

    Attributes:
        sites: what to trace; by default every layer of ``modules``.
        modules: ``"block"``, ``"attn"``, ``"mlp"``; used where ``sites`` is None.
        roles: at which positions. ``object`` are canvas positions masked in both the clean and the restored run.
        steps: denoising steps to trace, from 0; None is all.
        window: at which steps around its own a coordinate is restored.
        layer_window: how many layers around its own a coordinate is restored at, of the same module; what an even
            number has too many lies above.
        corruption: ``noise`` on the subject's embeddings, the subject replaced by ``mask`` tokens, or by another
            ``subject`` of as many tokens.
        noise_scale: of ``noise``, in standard deviations of the subject tokens' embeddings over the given facts (ROME
            has 3).
        draws: of the corruption, a fact; ``mask`` has one.
        canvas: answer positions, filled with end-of-text; None is exactly the object's tokens.
        sampler: how the canvas is unmasked.
        commits: ``free``: TIE and IE. ``teacher``: forced IE. ``both``: all three.
        tokens: the object's tokens that are scored: ``all``, or the ``first`` alone.
        prune: None measures every coordinate in every draw. A number in (0, 1) drops, after 2, 4, 8, ... draws, those
            that are behind the fact's best, with at most this estimated chance of losing the one that is best over all
            draws (see :func:`timerome.functional.halving.survivors`); what is dropped keeps the mean of the draws it
            had, and the control at a step and role that no coordinate is left at, likewise.
        batch_size: most rows of one forward; None is 32, and on a CPU as many as hold 1024 positions.
        activation_budget: bytes of clean activations kept in memory; those beyond it lie in a temporary file. None is
            no limit. A forward's own activations are bounded by ``batch_size`` alone.
        seed: of noise, controls and the choice of other subjects.
        min_total_effect: facts whose corruption costs less than so many nats a token are not traceable.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> TraceConfig(modules=["block"], steps=[1, 0]).steps
        (0, 1)
    """

    sites: Sequence[Site] | None = None
    modules: Sequence[Module] = MODULES
    roles: Sequence[Role] = ("subject_last", "object")
    steps: Sequence[int] | None = None
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
    batch_size: int | None = None
    activation_budget: int | None = None
    seed: int = 0
    min_total_effect: float = 0.1

    def __post_init__(self) -> None:
        for name, of in (("sites", lambda site: Site(*site)), ("modules", str), ("roles", str), ("steps", int)):
            if (given := getattr(self, name)) is None:
                continue
            if isinstance(given, (str, int)):
                raise ValueError(f"TraceConfig: expected {name} as a list, got {given!r}.")
            values = tuple(of(one) for one in given)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"TraceConfig: expected at least one of {name}, each once, got {list(given)}.")
            object.__setattr__(self, name, tuple(sorted(values)) if name == "steps" else values)
        for name, allowed in (
            ("window", get_args(Window)), ("corruption", get_args(Corruption)), ("commits", get_args(Commits)),
            ("tokens", get_args(Tokens)), ("roles", ROLES), ("modules", MODULES),
        ):  # fmt: skip
            given = getattr(self, name)
            for one in (given,) if isinstance(given, str) else given:
                if one not in allowed:
                    raise ValueError(f"TraceConfig: expected {name} in {allowed}, got {one!r}.")
        if self.steps is not None and self.steps[0] < 0:
            raise ValueError(f"TraceConfig: steps count from 0, got {list(self.steps)}.")
        for name, fits, wanted in (
            ("layer_window", self.layer_window >= 1, ">= 1"),
            ("draws", self.draws >= 1, ">= 1"),
            ("canvas", self.canvas is None or self.canvas >= 1, ">= 1 or None"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, ">= 1 or None"),
            ("activation_budget", self.activation_budget is None or self.activation_budget >= 0, ">= 0 or None"),
            ("noise_scale", self.noise_scale >= 0, ">= 0"),
            ("min_total_effect", self.min_total_effect > 0, "> 0"),
            ("prune", self.prune is None or 0 < self.prune < 1, ", a chance of error, in (0, 1) or None"),
        ):
            if not fits:
                raise ValueError(f"TraceConfig: expected {name} {wanted}, got {getattr(self, name)}.")

    @property
    def free(self) -> bool:
        """Whether runs that commit their own predictions are made."""
        return self.commits != "teacher"

    @property
    def forced(self) -> bool:
        """Whether runs that commit the true tokens are made."""
        return self.commits != "free"

    def restores(self, chosen: int, step: int) -> bool:
        """Whether a run whose step is ``chosen`` restores at ``step``."""
        return (
            step == chosen if self.window == "single" else step >= chosen if self.window == "from" else step <= chosen
        )

    def minimum(self, score: Score) -> float:
        """The total effect below which a share of it says nothing, in the units of ``score``."""
        return 0.01 if score == "prob" else self.min_total_effect

    def restored_with(self, site: Site, n_layers: int) -> tuple[Site, ...]:
        """The sites that are restored together for a coordinate: the layer window around it, of the same module."""
        first = max(0, site.layer - (self.layer_window - 1) // 2)
        last = min(n_layers - 1, site.layer + self.layer_window // 2)
        return tuple(Site(layer, site.module) for layer in range(first, last + 1))

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on beside model and facts, JSON-ready."""
        # As it is read back: tuples are lists.
        found = json.loads(json.dumps({**asdict(self), "sites": self.sites}))
        return {name: value for name, value in found.items() if name not in _NOT_IN_THE_RESULT}

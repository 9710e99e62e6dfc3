"""What a trace measured: effects of every coordinate, what they are compared with, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args, overload

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from ..coordinates import Coordinate, Role, Site
from ..functional.effects import (
    Floats,
    Interval,
    Score,
    average_over_facts,
    bootstrap_interval,
    first_largest,
    nanmean,
    static_effect,
    temporal_gain,
)
from ..functional.inference import Stability, max_sign_test, split_half, two_stage_interval

Effect = Literal["tie", "ie", "forced_ie"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)
Self = TypeVar("Self", bound="TraceData")


class TraceError(RuntimeError):
    """The trace does not hold what was asked for."""


@dataclass(frozen=True)
class TraceData:
    """Effects of every coordinate for every fact traced: the fields and the arithmetic of :class:`TraceResult`.

    F facts, D draws, N sites, s steps, R roles, S steps of the loop. Effects are shares of the total effect: 0 is the
    corrupted run, 1 the clean one. NaN means undefined.

    Attributes:
        facts: ids of the facts traced.
        groups: their groups, "" for none.
        sites: N sites, by layer.
        steps: s steps, from 0.
        roles: R roles.
        measured: score -> what was measured with it: each effect, draw by draw, ``(F, D, N + 1, s, R)``, the last site
            being the random-site control (of other scores than log-probability only the mean is kept, D = 1);
            ``tie_total`` and ``forced_ie_total``, each draw's total effect as a multiple of their mean, ``(F, D, s)``;
            ``clean`` and ``corrupted``, the runs' scores at each step, ``(F, S)``, NaN after nothing is masked.
        recalled: whether the clean run decodes the canvas exactly, ``(F,)``.
        permuted: effect of the best coordinate with its own steps' activations and with permuted steps', ``(F, 2)``, by
            log-probability.
        not_traceable: fact id -> reason, for every fact given that is not in ``facts``.
        settings: of the tracer.
        backbone: what was traced, in words.
        fingerprint: of the backbone.
        library_version: that traced.
        score: what all methods read: ``log_prob`` (nats a token), ``prob`` or ``rank``; see :meth:`by`.
    """

    facts: tuple[str, ...]
    groups: tuple[str, ...]
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    roles: tuple[Role, ...]
    measured: dict[str, dict[str, Floats]]
    recalled: NDArray[np.bool_]
    permuted: Floats
    not_traceable: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    fingerprint: str = ""
    library_version: str = ""
    score: Score = "log_prob"

    # What was measured ------------------------------------------------------------------------------------------------

    def by(self: Self, score: Score) -> Self:
        """Return the same trace, read by another score.

        Raises:
            TraceError: it was not scored so.
        """
        if score not in self.measured:
            raise TraceError(f"TraceResult.by: expected a score of {sorted(self.measured)}, got {score!r}.")
        return replace(self, score=score)

    @property
    def tie(self) -> Floats:
        """Temporal indirect effect, on later steps, mean over draws, ``(F, N, s, R)``."""
        return self.effects("tie")

    @property
    def ie(self) -> Floats:
        """Same-step effect of free runs, ``(F, N, s, R)``."""
        return self.effects("ie")

    @property
    def forced_ie(self) -> Floats:
        """Same-step effect where all runs hold the true tokens, ``(F, N, s, R)``."""
        return self.effects("forced_ie")

    @property
    def clean(self) -> Floats:
        """Score of the clean run at each step, ``(F, S)``."""
        return self.measured[self.score]["clean"]

    @property
    def corrupted(self) -> Floats:
        """Score of the corrupted run at each step, mean over draws, ``(F, S)``."""
        return self.measured[self.score]["corrupted"]

    def has(self, effect: Effect) -> bool:
        """Whether the effect is defined anywhere."""
        return bool(np.isfinite(self.effects(effect)).any())

    def draws(self, effect: Effect = "tie") -> Floats:
        """Return an effect draw by draw, ``(F, D, N, s, R)``; NaN everywhere if it was not traced.

        Raises:
            ValueError: it is no effect.
        """
        return self._measured(effect)[:, :, :-1]

    def effects(self, effect: Effect) -> Floats:
        """Return an effect, mean over draws, ``(F, N, s, R)``.

        Raises:
            ValueError: it is no effect.
        """
        return nanmean(self.draws(effect), axis=1)

    def control(self, effect: Effect = "tie") -> Floats:
        """Return the effect of the random-site control, mean over draws, ``(F, s, R)``."""
        return nanmean(self._measured(effect)[:, :, -1], axis=1)

    def _measured(self, effect: Effect) -> Floats:
        if effect not in EFFECTS:
            raise ValueError(f"TraceResult: expected effect in {EFFECTS}, got {effect!r}.")
        shape = (len(self.facts), 1, len(self.sites) + 1, len(self.steps), len(self.roles))
        return self.measured[self.score].get(effect, np.full(shape, np.nan))

    def default_effect(self) -> Effect:
        """Return TIE where it is defined, else the first same-step effect that is."""
        return next((effect for effect in EFFECTS if self.has(effect)), "tie")

    def mean(self, effect: Effect = "tie") -> Floats:
        """Return the mean effect over facts, ``(N, s, R)``, NaN where too few facts have one (see :meth:`best`)."""
        return average_over_facts(self.effects(effect))

    def at(self, coordinate: Coordinate, effect: Effect = "tie") -> Floats:
        """Return the effect of a coordinate for each fact, ``(F,)``.

        Raises:
            TraceError: it was not traced.
        """
        return np.asarray(self.effects(effect)[(slice(None), *self.index(coordinate))])

    # Coordinates -----------------------------------------------------------------------------------------------------

    @overload
    def best(self, policy: Literal["global"] = "global", *, effect: Effect = "tie") -> Coordinate: ...
    @overload
    def best(self, policy: Literal["per_fact"], *, effect: Effect = "tie") -> dict[str, Coordinate]: ...
    @overload
    def best(self, policy: Literal["per_group"], *, effect: Effect = "tie") -> dict[str | None, Coordinate]: ...
    @overload
    def best(self, policy: Literal["multi"], *, effect: Effect = "tie", top: int = 3) -> list[Coordinate]: ...
    def best(
        self, policy: str = "global", *, effect: Effect = "tie", top: int = 3
    ) -> Coordinate | Mapping[Any, Coordinate] | list[Coordinate]:
        """Return the coordinate with the largest effect.

        Effects within 1e-6 of each other count as equal, and the lower layer is taken. Coordinates that are defined for
        fewer than half as many facts as the best-covered one are left out, and so are those that pruning dropped. What
        is returned can be the ``at=`` of a memory's edits.

        Args:
            policy: ``global``: one for all facts, by the mean over facts. ``per_fact``: fact id -> its own.
                ``per_group``: group -> its own, None being facts without one. ``multi``: the best coordinates of the
                ``top`` best sites.
            effect: which effect decides.
            top: number of sites, for ``multi``.

        Raises:
            TraceError: no fact was traced, or the effect is nowhere defined; the message says why.
            ValueError: an unknown policy.
        """
        self.require(effect)
        values = self.effects(effect)
        if policy == "global":
            return self.coordinate(first_largest(average_over_facts(values)))
        if policy == "per_fact":
            racing = np.where(self._in_the_race(effect), values, np.nan)
            return {
                fact: self.coordinate(first_largest(racing[row]))
                for row, fact in enumerate(self.facts)
                if np.isfinite(racing[row]).any()
            }
        if policy == "per_group":
            rows = {group: [i for i, g in enumerate(self.groups) if g == group] for group in dict.fromkeys(self.groups)}
            means = {group: average_over_facts(values[own]) for group, own in rows.items()}
            return {g or None: self.coordinate(first_largest(m)) for g, m in means.items() if np.isfinite(m).any()}
        if policy == "multi":
            mean = average_over_facts(values)
            chosen: list[Coordinate] = []
            while len(chosen) < top and np.isfinite(mean).any():
                index = first_largest(mean)
                chosen.append(self.coordinate(index))
                mean[index[0]] = np.nan
            return chosen
        raise ValueError(
            f"TraceResult.best: expected policy 'global', 'per_fact', 'per_group' or 'multi', got {policy!r}."
        )

    def _in_the_race(self, effect: Effect) -> NDArray[np.bool_]:
        """Cells measured in as many draws as any of their fact: those that pruning did not drop, ``(F, N, s, R)``."""
        count = np.isfinite(self.by("log_prob").draws(effect)).sum(1)
        return np.asarray(count >= count.max(axis=(1, 2, 3), keepdims=True))

    def best_static(self, *, effect: Effect = "tie") -> tuple[Site, Role]:
        """Return the site and role with the largest mean effect over steps, whatever the step.

        Raises:
            TraceError: as :meth:`best`.
        """
        self.require(effect)
        site, role = first_largest(average_over_facts(static_effect(self.effects(effect))))
        return self.sites[site], self.roles[role]

    def rivals(self, *, effect: Effect = "tie") -> list[Coordinate]:
        """Return the other coordinates whose effect cannot be told from the best one's, largest first.

        Those for which the 95 % interval of the difference, fact by fact, contains 0. Restored from step 0 on, the
        residual stream at the object's positions carries all there is at any layer, so there may be many.

        Raises:
            TraceError: as :meth:`best`.
        """
        best = self.best(effect=effect)
        mean, ours = self.mean(effect), self.at(best, effect)
        values, found = self.effects(effect), []
        for index in np.argwhere(np.isfinite(mean)).tolist():
            other = self.coordinate(index)
            n, k, r = index
            difference = ours - values[:, n, k, r]
            # Equal for every fact, or not told apart by the interval.
            if other != best and bootstrap_interval(difference, resamples=500).contains_zero:
                found.append((float(mean[tuple(index)]), other))
        return [other for _, other in sorted(found, key=lambda pair: -pair[0])]

    # What may be said -------------------------------------------------------------------------------------------------

    def p_values(self, *, least: float = 0.0, effect: Effect = "tie") -> Floats:
        """Return, for each coordinate, the p-value of doing more than a random site, ``(N, s, R)``.

        Against the control of the same fact, step and role, corrected for all coordinates looked at (see
        :func:`timerome.functional.inference.max_sign_test`).

        Args:
            least: by how much more, as a share of the total effect.
            effect: which effect.

        Raises:
            TraceError: as :meth:`best`.
        """
        self.require(effect)
        difference = self.effects(effect) - self.control(effect)[:, None] - least
        # A cell that few facts define is no candidate, as in `best`.
        difference = np.where(np.isfinite(self.mean(effect)), difference, np.nan)
        return max_sign_test(rearrange(difference, "f n s r -> f (n s r)")).reshape(difference.shape[1:])

    def claim(self, *, level: float = 0.05, least: float = 0.1, effect: Effect = "tie") -> Coordinate | None:
        """Return the best coordinate if it is shown to do clearly more than a random site, else None.

        In a model without any circuit, some place still does a hundredth of the total effect for every fact alike,
        which a test against nothing would call proven; so a claim is that it does ``least`` more.

        Args:
            level: chance of claiming anything where no coordinate does so much more than a random site.
            least: by how much more, as a share of the total effect.
            effect: which effect.

        Raises:
            TraceError: as :meth:`best`.
        """
        best = self.best(effect=effect)
        return best if self.p_values(least=least, effect=effect)[self.index(best)] <= level else None

    def stability(self, *, effect: Effect = "tie", repeats: int = 100) -> Stability:
        """Return how far the choice depends on which facts made it: random halves choose, and are compared.

        Raises:
            TraceError: as :meth:`best`.
            ValueError: fewer than two facts were traced.
        """
        self.require(effect)
        return split_half(self.effects(effect), repeats=repeats)

    def interval(self, coordinate: Coordinate, *, effect: Effect = "tie") -> Interval:
        """Return a coordinate's mean effect with its 95 % interval over facts and draws.

        Raises:
            TraceError: it was not traced.
        """
        n, k, r = self.index(coordinate)
        return two_stage_interval(self.draws(effect)[:, :, n, k, r], self.totals(effect, k))

    def totals(self, effect: Effect, step: int) -> Floats | None:
        """Return each draw's total effect at a traced step, as a multiple of their mean, ``(F, D)``, where it is kept.

        Args:
            effect: which effect.
            step: place among ``steps``.
        """
        found = self.measured[self.score].get(f"{effect}_total")
        return None if found is None else found[:, :, step]

    def temporal_gain(
        self, static: Literal["average", "every_step"] = "average", *, effect: Effect = "tie"
    ) -> Interval:
        """Return what choosing the step adds: effect of the best coordinate - effect of the best static site.

        Both are chosen on the other half of the facts, so the gain may be negative; the interval is a 95 % bootstrap
        over facts. See :func:`timerome.functional.effects.temporal_gain`.

        Args:
            static: ``average``: a static site has the mean effect over traced steps. ``every_step``: the site is
                restored at every step, which is what window ``from`` does from step 0; a memory that is always on is
                this, so it is the stricter comparison.
            effect: which effect.

        Raises:
            TraceError: as :meth:`best`; or ``every_step`` was not traced.
        """
        self.require(effect)
        values = self.effects(effect)
        if static == "average":
            without_step = static_effect(values)
        elif self.has_every_step(effect):
            without_step = values[:, :, 0]
        else:
            raise TraceError(
                "TraceResult.temporal_gain: static='every_step' needs window 'from' and step 0 among the traced steps, "
                f"got window {self.settings.get('window')!r} and steps {list(self.steps)}."
            )
        return bootstrap_interval(temporal_gain(values, without_step))

    def has_every_step(self, effect: Effect = "tie") -> bool:
        """Whether step 0 of this trace is restored at every step."""
        return self.settings.get("window") == "from" and self.steps[:1] == (0,) and effect != "forced_ie"

    # -----------------------------------------------------------------------------------------------------------------

    def require(self, effect: Effect) -> None:
        """Raise :class:`TraceError`, saying why, if the effect is nowhere defined."""
        if not self.has(effect):
            raise TraceError(f"TraceResult: {self.why_undefined(effect)}")

    def why_undefined(self, effect: Effect) -> str:
        """Say why an effect is nowhere defined."""
        commits = self.settings.get("commits")
        if not self.facts:
            reasons = "; ".join(f"{fact}: {reason}" for fact, reason in list(self.not_traceable.items())[:3])
            return f"none of the {len(self.not_traceable)} facts could be traced ({reasons})."
        if effect == "forced_ie" and commits == "free":
            return "with commits='free' no run was forced; use commits='teacher' or 'both', or effect='tie' or 'ie'."
        if effect != "forced_ie" and commits == "teacher":
            return "with commits='teacher' there is no later-step effect; use effect='forced_ie', or commits='free'."
        if effect == "tie":
            return (
                f"none of the traced steps {list(self.steps)} has a later one, so no later-step effect is defined; use "
                "effect='ie', trace earlier steps, or take more denoising steps."
            )
        return f"{effect!r} is undefined at every coordinate: the total effect at the traced steps is too small."

    def coordinate(self, index: Sequence[int]) -> Coordinate:
        """Return the coordinate at (site, step, role)."""
        site, step, role = index
        return Coordinate(*self.sites[site], step=self.steps[step], role=self.roles[role])

    def index(self, coordinate: Coordinate) -> tuple[int, int, int]:
        """Return where a coordinate is: (site, step, role).

        Raises:
            TraceError: it was not traced.
        """
        try:
            return (
                self.sites.index(coordinate.site),
                self.steps.index(coordinate.step),
                self.roles.index(coordinate.role),
            )
        except ValueError:
            raise TraceError(f"TraceResult: {coordinate} was not traced.") from None

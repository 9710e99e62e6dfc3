"""The result of a trace: effects of every coordinate, what they are compared with, and what follows from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..coordinates import Coordinate, Role, Site
from ..functional.effects import (
    Floats,
    Interval,
    average_over_facts,
    bootstrap_interval,
    first_largest,
    static_effect,
    temporal_gain,
)

Effect = Literal["tie", "ie"]
_KEY = "timerome_trace"
_FORMAT = 1
_ABOUT = ("not_traceable", "settings", "backbone", "fingerprint", "library_version")
_ARRAYS = ("tie", "ie", "random_tie", "random_ie", "clean", "corrupted", "recalled", "permuted")


class TraceError(RuntimeError):
    """The trace does not hold what was asked for."""


class TraceFileError(ValueError):
    """The file is no complete trace."""


@dataclass(frozen=True)
class TraceResult:
    """Effects of every coordinate for every fact traced. Made by :meth:`CausalTracer.trace`, or read by :meth:`load`.

    F facts, N sites, s steps, R roles. Effects are shares of the total effect, averaged over draws: 0 is the corrupted
    run, 1 the clean one. NaN means undefined.

    Attributes:
        facts: ids of the facts traced.
        groups: their groups, "" for none.
        sites: N sites, by layer.
        steps: s steps, from 0.
        roles: R roles.
        tie: temporal indirect effect, on later steps, ``(F, N, s, R)``.
        ie: same-step effect, ``(F, N, s, R)``.
        random_tie: TIE of the random-site control, ``(F, s, R)``.
        random_ie: its same-step effect, ``(F, s, R)``.
        clean: score of the clean run at each step, nats a token, ``(F, S)``; NaN after nothing is masked.
        corrupted: score of the corrupted run, mean over draws, ``(F, S)``.
        recalled: whether the clean run decodes the canvas exactly, ``(F,)``.
        permuted: effect of the best coordinate with its own steps' activations and with permuted steps', ``(F, 2)``.
        not_traceable: fact id -> reason, for every fact given that is not in ``facts``.
        settings: of the tracer.
        backbone: what was traced, in words.
        fingerprint: of the backbone.
        library_version: that traced.
    """

    facts: tuple[str, ...]
    groups: tuple[str, ...]
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    roles: tuple[Role, ...]
    tie: Floats
    ie: Floats
    random_tie: Floats
    random_ie: Floats
    clean: Floats
    corrupted: Floats
    recalled: NDArray[np.bool_]
    permuted: Floats
    not_traceable: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    fingerprint: str = ""
    library_version: str = ""

    def has(self, effect: Effect) -> bool:
        """Whether the effect is defined anywhere."""
        return bool(np.isfinite(self.effects(effect)).any())

    def effects(self, effect: Effect) -> Floats:
        """Return ``tie`` or ``ie``.

        Raises:
            ValueError: it is neither.
        """
        if effect not in get_args(Effect):
            raise ValueError(f"TraceResult: expected effect in {get_args(Effect)}, got {effect!r}.")
        return self.tie if effect == "tie" else self.ie

    # Coordinates -----------------------------------------------------------------------------------------------------

    @overload
    def best(self, policy: Literal["global"] = "global", *, effect: Effect = "tie") -> Coordinate: ...
    @overload
    def best(self, policy: Literal["per_fact", "per_group"], *, effect: Effect = "tie") -> dict[str, Coordinate]: ...
    @overload
    def best(self, policy: Literal["multi"], *, effect: Effect = "tie", top: int = 3) -> list[Coordinate]: ...
    def best(
        self, policy: str = "global", *, effect: Effect = "tie", top: int = 3
    ) -> Coordinate | dict[str, Coordinate] | list[Coordinate]:
        """Return the coordinate with the largest effect.

        Effects within 1e-6 of each other count as equal, and the lower layer is taken. Coordinates that are defined for
        fewer than half as many facts as the best-covered one are left out.

        Args:
            policy: ``global``: one for all facts, by the mean over facts. ``per_fact``: fact id -> its own.
                ``per_group``: group -> its own. ``multi``: the best coordinates of the ``top`` best sites.
            effect: which effect decides.
            top: number of sites, for ``multi``.

        Raises:
            TraceError: no fact was traced, or the effect is nowhere defined; the message says why.
            ValueError: an unknown policy.
        """
        self._require(effect)
        values = self.effects(effect)
        if policy == "global":
            return self._coordinate(first_largest(average_over_facts(values)))
        if policy == "per_fact":
            return {
                fact: self._coordinate(first_largest(values[row]))
                for row, fact in enumerate(self.facts)
                if np.isfinite(values[row]).any()
            }
        if policy == "per_group":
            rows = {group: [i for i, g in enumerate(self.groups) if g == group] for group in dict.fromkeys(self.groups)}
            means = {group: average_over_facts(values[own]) for group, own in rows.items()}
            return {g: self._coordinate(first_largest(m)) for g, m in means.items() if np.isfinite(m).any()}
        if policy == "multi":
            mean = average_over_facts(values)
            chosen: list[Coordinate] = []
            while len(chosen) < top and np.isfinite(mean).any():
                index = first_largest(mean)
                chosen.append(self._coordinate(index))
                mean[index[0]] = np.nan
            return chosen
        raise ValueError(
            f"TraceResult.best: expected policy 'global', 'per_fact', 'per_group' or 'multi', got {policy!r}."
        )

    def best_static(self, *, effect: Effect = "tie") -> tuple[Site, Role]:
        """Return the site and role with the largest mean effect over steps, whatever the step.

        Raises:
            TraceError: as :meth:`best`.
        """
        self._require(effect)
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
        found = []
        for index in np.argwhere(np.isfinite(mean)).tolist():
            other = self._coordinate(index)
            difference = ours - self.at(other, effect)
            # Equal for every fact, or not told apart by the interval.
            if other != best and bootstrap_interval(difference, resamples=500).contains_zero:
                found.append((float(mean[tuple(index)]), other))
        return [other for _, other in sorted(found, key=lambda pair: -pair[0])]

    def mean(self, effect: Effect = "tie") -> Floats:
        """Return the mean effect over facts, ``(N, s, R)``, NaN where too few facts have one (see :meth:`best`)."""
        return average_over_facts(self.effects(effect))

    def at(self, coordinate: Coordinate, effect: Effect = "tie") -> Floats:
        """Return the effect of a coordinate for each fact, ``(F,)``.

        Raises:
            TraceError: it was not traced.
        """
        return np.asarray(self.effects(effect)[(slice(None), *self._index(coordinate))])

    # What the step adds ----------------------------------------------------------------------------------------------

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
        self._require(effect)
        values = self.effects(effect)
        if static == "average":
            without_step = static_effect(values)
        elif self._has_every_step:
            without_step = values[:, :, 0]
        else:
            raise TraceError(
                "TraceResult.temporal_gain: static='every_step' needs window 'from' and step 0 among the traced steps, "
                f"got window {self.settings.get('window')!r} and steps {list(self.steps)}."
            )
        return bootstrap_interval(temporal_gain(values, without_step))

    @property
    def _has_every_step(self) -> bool:
        return self.settings.get("window") == "from" and self.steps[:1] == (0,)

    def summary(self, *, effect: Effect | None = None) -> dict[str, Any]:
        """Return the main numbers and a verdict, JSON-ready. Intervals are ``[mean, low, high]``, 95 % over facts.

        Args:
            effect: which effect; by default TIE where it is defined.
        """
        effect = effect or ("tie" if self.has("tie") or not self.has("ie") else "ie")
        head: dict[str, Any] = {
            "effect": effect,
            "facts": len(self.facts),
            "not_traceable": dict(self.not_traceable),
            "recalled": int(self.recalled.sum()),
            "window": self.settings.get("window"),
            "corruption": self.settings.get("corruption"),
            "total_effect_nats": _listed(bootstrap_interval(_row_means(self.clean - self.corrupted))),
        }
        if not self.has(effect):
            return {**head, "verdict": f"nothing to report: {self._why_undefined(effect)}"}
        best = self.best(effect=effect)
        at_best = self.at(best, effect)
        _, step, role = self._index(best)
        random = (self.random_tie if effect == "tie" else self.random_ie)[:, step, role]
        over_random = bootstrap_interval(at_best - random)
        site, static_role = self.best_static(effect=effect)
        rivals = self.rivals(effect=effect)
        own_step = bootstrap_interval(self.permuted[:, 0] - self.permuted[:, 1])
        gain = self.temporal_gain(effect=effect)
        every = self.temporal_gain("every_step", effect=effect) if self._has_every_step else None
        return {
            **head,
            "best": best.to_dict(),
            "best_effect": _listed(bootstrap_interval(at_best)),
            "random_site": _listed(bootstrap_interval(random)),
            "best_minus_random_site": _listed(over_random),
            "permuted_steps": _listed(bootstrap_interval(self.permuted[:, 1])),
            "best_minus_permuted_steps": _listed(own_step),
            "best_static": {"layer": site.layer, "module": site.module, "role": static_role},
            "temporal_gain": _listed(gain),
            "temporal_gain_over_every_step": None if every is None else _listed(every),
            "indistinguishable": len(rivals),
            "verdict": _verdict(best, len(self.facts), len(rivals), over_random, own_step, gain, every),
        }

    def table(self, top: int = 10, *, effect: Effect = "tie") -> list[dict[str, Any]]:
        """Return the ``top`` coordinates by mean effect, best first: one JSON-ready row each, with the control."""
        self._require(effect)
        rows = [row for row in self._rows() if row[effect] is not None]
        return sorted(rows, key=lambda row: -row[effect])[:top]

    def _rows(self) -> list[dict[str, Any]]:
        tie, ie = self.mean("tie"), self.mean("ie")
        random_tie, random_ie = average_over_facts(self.random_tie), average_over_facts(self.random_ie)
        rows = []
        for n, site in enumerate(self.sites):
            for k, step in enumerate(self.steps):
                for r, role in enumerate(self.roles):
                    numbers = {"tie": tie[n, k, r], "ie": ie[n, k, r]}
                    for effect in get_args(Effect):
                        interval = bootstrap_interval(self.effects(effect)[:, n, k, r])
                        numbers |= {f"{effect}_low": interval.low, f"{effect}_high": interval.high}
                    numbers |= {"random_site_tie": random_tie[k, r], "random_site_ie": random_ie[k, r]}
                    rows.append(
                        {
                            "layer": site.layer,
                            "module": site.module,
                            "step": step,
                            "role": role,
                            "facts": int(np.isfinite(self.tie[:, n, k, r]).sum()),
                            **{name: None if np.isnan(x) else float(x) for name, x in numbers.items()},
                        }
                    )
        return rows

    # Files -----------------------------------------------------------------------------------------------------------

    def plot(self, path: str | Path, *, effect: Effect | None = None) -> Path:
        """Draw layer against step, a panel for each module and role, as a PNG; the data go beside it as CSV.

        Args:
            path: of the PNG; the CSV has the same name.
            effect: which effect; by default TIE where it is defined.

        Returns:
            The path.

        Raises:
            TraceError: as :meth:`best`.
        """
        from .plot import plot_trace

        effect = effect or ("tie" if self.has("tie") or not self.has("ie") else "ie")
        self._require(effect)
        return plot_trace(self, Path(path), effect, self._rows())

    def save(self, path: str | Path) -> Path:
        """Write the trace as one safetensors file, JSON in its metadata. The file appears whole or not at all."""
        path = Path(path)
        about = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in ("facts", "groups", "steps", "roles")},
            "sites": [[site.layer, site.module] for site in self.sites],
            **{name: getattr(self, name) for name in _ABOUT},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
            save_file(arrays, beside, metadata={_KEY: json.dumps(about)})
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> TraceResult:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            TraceFileError: it is cut short, no safetensors file, no trace, or of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"TraceResult.load: there is no file {path}.")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if _KEY not in metadata:
                    raise TraceFileError(f"TraceResult.load: {path} is a safetensors file, but not of a trace.")
                about = json.loads(metadata[_KEY])
                if about["format"] != _FORMAT:
                    raise TraceFileError(
                        f"TraceResult.load: {path} has format {about['format']}, this version reads {_FORMAT}; "
                        "upgrade timerome, or trace again."
                    )
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            return cls(
                facts=tuple(about["facts"]),
                groups=tuple(about["groups"]),
                sites=tuple(Site(*site) for site in about["sites"]),
                steps=tuple(about["steps"]),
                roles=tuple(about["roles"]),
                **arrays,
                **{name: about[name] for name in _ABOUT},
            )
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise TraceFileError(
                f"TraceResult.load: {path} is no complete trace file ({error}); it may be cut short."
            ) from error

    # -----------------------------------------------------------------------------------------------------------------

    def _require(self, effect: Effect) -> None:
        if not self.has(effect):
            raise TraceError(f"TraceResult: {self._why_undefined(effect)}")

    def _why_undefined(self, effect: Effect) -> str:
        if not self.facts:
            reasons = "; ".join(f"{fact}: {reason}" for fact, reason in list(self.not_traceable.items())[:3])
            return f"none of the {len(self.not_traceable)} facts could be traced ({reasons})."
        if effect == "tie" and self.settings.get("commits") == "teacher":
            return "with commits='teacher' there is no later-step effect; use effect='ie', or commits='free'."
        if effect == "tie":
            return (
                f"none of the traced steps {list(self.steps)} has a later one, so no later-step effect is defined; use "
                "effect='ie', trace earlier steps, or take more denoising steps."
            )
        return f"{effect!r} is undefined at every coordinate: the total effect at the traced steps is too small."

    def _coordinate(self, index: Sequence[int]) -> Coordinate:
        site, step, role = index
        return Coordinate(*self.sites[site], step=self.steps[step], role=self.roles[role])

    def _index(self, coordinate: Coordinate) -> tuple[int, int, int]:
        try:
            return (
                self.sites.index(coordinate.site),
                self.steps.index(coordinate.step),
                self.roles.index(coordinate.role),
            )
        except ValueError:
            raise TraceError(f"TraceResult: {coordinate} was not traced.") from None


def _row_means(values: Floats) -> Floats:
    return np.array([np.nanmean(row) for row in values], dtype=np.float64)


def _listed(interval: Interval) -> list[float | None]:
    return [None if np.isnan(x) else float(x) for x in interval[:3]]


def _positive(interval: Interval) -> bool:
    return not interval.contains_zero and interval.mean > 0


def _verdict(
    best: Coordinate,
    facts: int,
    rivals: int,
    over_random: Interval,
    own_step: Interval,
    gain: Interval,
    every: Interval | None,
) -> str:
    """Say in words what the intervals allow."""

    def shown(interval: Interval) -> str:
        if np.isnan(interval.low):
            return f"{interval.mean:+.2f}, no interval"
        return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"

    if facts < 2:
        return f"{best} is largest, but one fact gives no interval: nothing can be said about sites or steps."
    parts = [f"{best} is largest" + (f", not told apart from {rivals} other{'s' * (rivals > 1)}" if rivals else "")]
    if _positive(over_random):
        parts.append(f"{shown(over_random)} above a random site")
    else:
        parts.append(f"it is not shown to do more than a random site ({shown(over_random)})")
    if np.isnan(gain.low):
        parts.append(f"whether the step adds anything cannot be told from so few facts ({shown(gain)})")
    elif not _positive(gain):
        parts.append(f"the step adds nothing over the best static site ({shown(gain)})")
    else:
        parts.append(f"the step adds {shown(gain)} over the best static site's mean over steps")
        if every is not None and not _positive(every):
            parts.append(f"but the step adds nothing over the best site restored at every step ({shown(every)})")
        elif every is not None:
            parts.append(f"and {shown(every)} over the best site restored at every step")
    if not np.isnan(own_step.mean):
        what = "better than" if _positive(own_step) else "not shown to be better than"
        parts.append(f"activations of its own steps are {what} those of permuted steps ({shown(own_step)})")
    return "; ".join(parts) + "."

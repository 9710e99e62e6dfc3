"""The trace of one fact: every coordinate's effects, draw by draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ..coordinates import Coordinate, Role, Site
from ..functional.corruption import seeded_generator
from ..functional.effects import SCORES, Bools, Floats, Score, later_mean, nanmean, object_score, share_of
from ..functional.halving import errors_of, rounds_of, survivors
from .corrupted_inputs import CorruptedInput
from .runs import CleanRun, FactRuns, Restoration, Scores

Cells = list[tuple[int, Restoration | None]]
# Effect -> (draws, sites and the random-site control as the last one, steps, roles), for each score.
Effects = dict[Score, dict[str, Floats]]


class OneFact:
    """Traces one fact.

    Args:
        runs: makes the fact's runs; free-running, or forced where nothing else is wanted.
        sites: what to trace.
        inputs: its draws of the corruption.
        grid: steps of the trace; those beyond the fact's loop are NaN.
        progress: told how many units of work (one run's step) are done.
    """

    def __init__(
        self,
        runs: FactRuns,
        sites: Sequence[Site],
        inputs: list[CorruptedInput],
        grid: tuple[int, ...],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.runs, self.sites, self.inputs, self.grid, self.progress = runs, sites, inputs, grid, progress
        self.config = runs.config
        self._done = 0

    def record(self) -> dict[str, Any]:
        """Return what was found, JSON-ready: ``reason`` why it is not traceable, or the effects of every coordinate."""
        config, runs = self.config, self.runs
        if not self.inputs:
            length = int(runs.sequence.subject.sum())
            return {"reason": f"no other fact has a subject of {length} tokens to put in its place"}
        clean = runs.clean(self.sites, self._kept if config.free else lambda step: False)
        corrupted = runs.corrupted(clean, self.inputs, [(draw, None) for draw in range(len(self.inputs))])
        clean_score = {score: self._score(clean.scores, score)[0] for score in SCORES}
        corrupted_score = {score: self._score(corrupted, score).mean(0) for score in SCORES}
        total = float((clean_score["log_prob"] - corrupted_score["log_prob"]).mean())
        if total < config.min_total_effect:
            return {
                "reason": f"clean - corrupted is {total:.3g} nats a token, less than {config.min_total_effect:g}: "
                "the corruption takes away nothing that could be restored"
            }
        effects: Effects = {score: {} for score in SCORES}
        recalled = bool((clean.final.cpu() == runs.sequence.ids)[runs.sequence.canvas].all())
        forward_rows = 0.0
        if config.free:
            self._measure(runs, clean, corrupted, effects)
        if config.forced:
            forced = FactRuns(
                runs.backbone, runs.sequence, runs.object_length, config, commits="teacher", join=runs.join
            )
            del clean  # one set of clean activations at a time stays within the budget
            clean = forced.clean(self.sites, lambda step: step in self.grid)
            corrupted = forced.corrupted(clean, self.inputs, [(draw, None) for draw in range(len(self.inputs))])
            self._measure(forced, clean, corrupted, effects)
            forward_rows += forced.forward_rows
        # Draw by draw for one score; the others' means are enough, and a third of the size.
        for score in SCORES[1:]:
            effects[score] = {name: nanmean(values, axis=0)[None] for name, values in effects[score].items()}
        return {
            "draws": {s: {name: to_json(values) for name, values in effects[s].items()} for s in SCORES},
            "clean": {score: values.tolist() for score, values in clean_score.items()},
            "corrupted": {score: values.tolist() for score, values in corrupted_score.items()},
            "recalled": recalled,
            "forward_rows": forward_rows + runs.forward_rows,
        }

    def permuted_steps(self, best: Coordinate, own: Floats) -> tuple[float, float]:
        """Effect of a coordinate with the activations of its own steps, and with those of permuted ones.

        Args:
            best: the coordinate.
            own: its effect draw by draw as far as it is known, ``(D,)``; what is not is measured.
        """
        runs, config = self.runs, self.config
        sites = config.restored_with(best.site, runs.backbone.n_layers)
        clean = runs.clean(sites)
        if not best.step < clean.steps or clean.steps < 2:
            return np.nan, np.nan
        cells: Cells = []
        for draw in range(len(self.inputs)):
            generator = seeded_generator(config.seed, "permuted steps", runs.sequence.fact_id, draw)
            shift = int(torch.randint(1, clean.steps, (1,), generator=generator))
            donors = tuple((step + shift) % clean.steps for step in range(clean.steps))
            known = bool(np.isfinite(own[draw]))
            cells += [
                (draw, None),
                (draw, Restoration(sites, best.role, best.step, donors=donors)),
                (draw, None if known else Restoration(sites, best.role, best.step)),
            ]
        by_draw = runs.corrupted(clean, self.inputs, cells).reshape(len(self.inputs), 3)
        teacher = runs.teacher
        permuted, measured = (self._same_step if teacher else self._later)(
            clean.scores, by_draw[:, 0], by_draw[:, 1:, None, None], [best.step], "log_prob"
        )[:, :, 0, 0].T
        return float(nanmean(np.where(np.isfinite(own), own, measured))), float(nanmean(permuted))

    # -----------------------------------------------------------------------------------------------------------------

    def _kept(self, step: int) -> bool:
        return any(self.config.restores(s, step) for s in self.grid)

    def _measure(self, runs: FactRuns, clean: CleanRun, corrupted: Scores, effects: Effects) -> None:
        """Measure every cell in every draw, or, with pruning, in as many draws as it stays in the race."""
        config, teacher = self.config, runs.teacher
        steps = [step for step in self.grid if step < clean.steps]
        names = ["forced_ie"] if teacher else ["tie", "ie"]
        n_draws, n_sites, n_roles = len(self.inputs), len(self.sites), len(config.roles)
        shape = (n_draws, n_sites + 1, len(self.grid), n_roles)
        for score in SCORES:
            effects[score] |= {name: np.full(shape, np.nan) for name in names}
        totals = effects["log_prob"][f"{names[0]}_total"] = self._totals(clean, corrupted, teacher)
        alive = np.ones((n_sites + 1, len(steps), n_roles), dtype=bool)
        prune = config.prune is not None and n_draws > 2
        rounds = rounds_of(n_draws) if prune else [range(n_draws)]
        errors = errors_of(rounds, config.prune or 0.0)
        sizes = nanmean(totals, axis=1)
        for draws, error in zip(rounds, [*errors, None], strict=True):
            found = self._cells(runs, clean, corrupted, draws, steps, alive)
            for score in SCORES:
                for name in names:
                    effects[score][name][draws.start : draws.stop, :, : len(steps)] = found[score][name]
            if error is not None:
                so_far = effects["log_prob"][names[0]][: draws.stop, :-1, : len(steps)]
                keep = survivors(
                    rearrange(so_far, "d n s r -> d (n s r)"), error, sizes if np.isfinite(sizes).all() else None
                )
                # Where the effect is undefined there is nothing to look for.
                alive[:-1] = keep.reshape(so_far.shape[1:])
                # The control is there to compare with: as long as any site is in the race at its step and role.
                alive[-1] = alive[:-1].any(0)

    def _cells(
        self,
        runs: FactRuns,
        clean: CleanRun,
        corrupted: Scores,
        draws: range,
        steps: Sequence[int],
        alive: Bools,
    ) -> Effects:
        config = self.config
        places = np.argwhere(np.broadcast_to(alive, (len(draws), *alive.shape)))
        cells: Cells = []
        nowhere = []
        for d, n, k, r in places.tolist():
            draw, step, role = draws[d], steps[k], config.roles[r]
            if n < len(self.sites):
                restored = config.restored_with(self.sites[n], runs.backbone.n_layers)
                cells.append((draw, Restoration(restored, role, step)))
            else:
                control = self.random_site(runs, clean, draw, step, role)
                cells.append((draw, control))
                if control.positions is not None and not control.positions.any():
                    nowhere.append((d, n, k, r))
        before, teacher = self._done, runs.teacher

        def count(step: int) -> None:
            self._done += sum(step == r.step if teacher else config.restores(r.step, step) for _, r in cells if r)
            self.progress(self._done)

        # The corrupted run is made again among the others: what restores nothing shares its forwards exactly.
        own = runs.corrupted(clean, self.inputs, [*cells, *((draw, None) for draw in draws)], count)
        active = [1 if teacher else sum(config.restores(r.step, s) for s in range(clean.steps)) for _, r in cells if r]
        self._done = before + sum(active)
        shape = (len(draws), *alive.shape)
        full = _scattered(own[: len(cells)], places, shape)
        alone = own[len(cells) :]
        everyone = _replaced(corrupted, draws, alone)
        found: Effects = {score: {} for score in SCORES}
        for score in SCORES:
            if teacher:
                found[score]["forced_ie"] = self._same_step(clean.scores, alone, full, steps, score, everyone)
            else:
                found[score]["tie"] = self._later(clean.scores, alone, full, steps, score, everyone)
                found[score]["ie"] = self._same_step(clean.scores, alone, full, steps, score)
            for values in found[score].values():
                for where in nowhere:
                    values[where] = np.nan
        return found

    def _totals(self, clean: CleanRun, corrupted: Scores, teacher: bool) -> Floats:
        """Total effect of each draw as a multiple of their mean, ``(D, s)``."""
        found = np.full((len(self.inputs), len(self.grid)), np.nan)
        score, before = self._score(clean.scores, "log_prob")[0], self._score(corrupted, "log_prob")
        for k, step in enumerate(s for s in self.grid if s < clean.steps):
            total = score[step] - before[:, step] if teacher else later_mean(score, step) - later_mean(before, step)
            if np.isfinite(total).all() and total.mean() >= self.config.min_total_effect:
                found[:, k] = total / total.mean()
        return found

    def _score(self, scores: Scores, score: Score) -> Floats:
        """Score of runs at each step, ``(R, S)``: see :class:`timerome.CausalTracer`."""
        carried = scores.carried()
        return object_score(carried.log_prob[..., self._tokens], carried.log_rank[..., self._tokens], score)

    @property
    def _tokens(self) -> slice:
        return slice(0, 1) if self.config.tokens == "first" else slice(None)

    def _later(
        self,
        clean: Scores,
        corrupted: Scores,
        restored: Scores,
        steps: Sequence[int],
        score: Score,
        everyone: Scores | None = None,
    ) -> Floats:
        """TIE of each draw, as a share of the total effect averaged over ``everyone``'s draws ``(D, S)``."""
        clean_score, corrupted_score = self._score(clean, score)[0], self._score(corrupted, score)
        mean_score = (corrupted_score if everyone is None else self._score(everyone, score)).mean(0)
        restored_score = self._score(restored, score)
        found = np.full(restored_score.shape[:4], np.nan)
        for k, step in enumerate(steps):
            total = later_mean(clean_score, step) - later_mean(mean_score, step)
            gained = later_mean(restored_score[:, :, k], step) - later_mean(corrupted_score, step)[:, None, None]
            found[:, :, k] = share_of(gained, total, self.config.minimum(score))
        return found

    def _same_step(
        self,
        clean: Scores,
        corrupted: Scores,
        restored: Scores,
        steps: Sequence[int],
        score: Score,
        everyone: Scores | None = None,
    ) -> Floats:
        """IE of each draw, over tokens masked in all three runs, as a share of the mean total effect over them.

        With teacher-forced commits those tokens are the same in all runs, and the mean is over ``everyone``'s draws.
        """
        found = np.full(restored.log_prob.shape[:4], np.nan)
        which = self._tokens
        for k, step in enumerate(steps):
            now = restored[:, :, k, :, step]
            before, truth = corrupted[:, None, None, step], clean[0, step]
            open_in_all = (now.masked & before.masked & truth.masked)[..., which]
            values = [
                object_score(x.log_prob[..., which], x.log_rank[..., which], score, open_in_all)
                for x in (now, before, truth)
            ]
            if everyone is None:
                total = nanmean(np.where(np.isnan(values[0]), np.nan, values[2] - values[1]), axis=0)
            else:
                given = everyone[:, step]
                corrupted_score = object_score(
                    given.log_prob[:, which], given.log_rank[:, which], score, truth.masked[which]
                )
                total = np.asarray(values[2] - corrupted_score.mean()).mean(0)
            found[:, :, k] = share_of(values[0] - values[1], total, self.config.minimum(score))
        return found

    def random_site(self, runs: FactRuns, clean: CleanRun, draw: int, step: int, role: Role) -> Restoration:
        """Draw the random-site control of a cell: as many positions, neither the role's nor the subject's."""
        config = self.config
        generator = seeded_generator(config.seed, "random site", runs.sequence.fact_id, draw, step, role)
        site = self.sites[int(torch.randint(len(self.sites), (1,), generator=generator))]
        own = runs.places(clean.states[step], role).cpu()
        anywhere = runs.places(clean.states[0], role).cpu() | runs.sequence.subject
        candidates = (~anywhere).nonzero().flatten()
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: int(own.sum())]]
        positions = torch.zeros_like(own)
        positions[chosen] = True
        sites = config.restored_with(site, runs.backbone.n_layers)
        return Restoration(sites, role, step, positions=positions)


def _scattered(scores: Scores, places: Any, shape: tuple[int, ...]) -> Scores:
    """Put runs in their place of a grid whose other cells are NaN (and open)."""
    tail = scores.log_prob.shape[-2:]
    log_prob = np.full((*shape, *tail), np.nan)
    log_rank, masked = log_prob.copy(), np.ones(log_prob.shape, dtype=bool)
    where = tuple(places.T)
    log_prob[where], log_rank[where], masked[where] = scores.log_prob, scores.log_rank, scores.masked
    return Scores(log_prob, log_rank, masked)


def _replaced(scores: Scores, draws: range, by: Scores) -> Scores:
    """``scores`` of all draws with those of some draws replaced."""
    log_prob, log_rank, masked = scores.log_prob.copy(), scores.log_rank.copy(), scores.masked.copy()
    own = slice(draws.start, draws.stop)
    log_prob[own], log_rank[own], masked[own] = by.log_prob, by.log_rank, by.masked
    return Scores(log_prob, log_rank, masked)


def to_json(values: Floats) -> Any:
    """Nested lists with None for NaN; numpy reads None back as NaN."""
    return np.where(np.isnan(values), None, values.astype(object)).tolist()  # type: ignore[call-overload]

"""Temporal causal tracing: which coordinate's activation drives the object at later denoising steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from .._version import __version__
from ..backbones import Backbone
from ..coordinates import MODULES, ROLES, Coordinate, Module, Role, Site
from ..diffusion import DenoisingLoop, Encoded, SamplerConfig, encode
from ..facts import Fact, FactError
from ..functional.corruption import seeded_generator
from ..functional.effects import Floats, last_masked, later_mean, masked_mean, nanmean, normalised_effect
from .checkpoint import Checkpoint
from .corrupted_inputs import CorruptedInput, Corruption, corrupted_inputs
from .result import Effect, TraceResult
from .runs import WINDOWS, CleanRun, Commits, FactRuns, Restoration, Scores, Window, in_window

Progress = Callable[[int, int, str], None]


class CausalTracer:
    r"""Trace facts through a masked diffusion model's denoising loop.

    Each fact is run three ways, with the same sampler and the same sampling noise: *clean*; *corrupted*, where the
    subject is disturbed at every step; *restored*, which is corrupted but takes the clean run's activations of the same
    step at one coordinate (layer, module, step s, role): at step s alone (window ``single``), from s on (``from``: what
    an edit memory does, which acts at every step), or up to s (``until``). Every run then goes on by itself.

    **Score.** A run's score at a step is the mean over the object's tokens of the log-probability of the true token:
    for a position that is masked in the state that step starts from, as predicted there; for one committed earlier, as
    predicted by the step that committed it. The model carries nothing between steps but tokens, and its logits at a
    committed position copy the input, so the prediction that committed it is the last word on what this run knew. Every
    token counts at every step, so that runs are compared on the same tokens however their orders differ; after the last
    step the score is the log-probability of the object along the run's own order. One consequence: where restoring at
    step s changes the prediction of a position that s commits, that change lasts in the scores of later steps.

    **Effects.** The temporal indirect effect and the same-step effect are kept apart:

    - TIE(c) = mean over later steps s' > s of restored - corrupted, as a share of clean - corrupted over the same
      steps;
    - IE(c) = restored - corrupted at s itself, over the tokens still masked in all three runs, as a share of clean -
      corrupted over the same tokens.

    Numerator and denominator are averaged over draws first. 0 is the corrupted run, 1 the clean one; nothing is
    clipped. TIE of the last step is undefined (NaN), and so is an effect whose denominator is below
    ``min_total_effect``. With ``commits="teacher"`` no run's tokens depend on what it restores: there is no later
    effect, and only IE is reported.

    Two readings are by construction: the last block at role ``object`` *is* the clean prediction, 1 at every step it is
    restored; and in window ``from`` an earlier step restores more. So look at what cannot be told from the best
    coordinate (:meth:`TraceResult.rivals`) and at attention and MLP sites before concluding where a fact is carried.

    **Controls**, beside every trace: at a *random site*, as many positions as the role has are restored, drawn from
    those that are neither the role's nor the subject's, once a fact, draw, step and role; at the best coordinate, the
    activations of *permuted steps* (a cyclic shift, drawn once a fact and draw) are restored instead of those of the
    same step.

    Args:
        backbone: the model.
        sites: what to trace; by default every layer of ``modules``.
        modules: ``"block"``, ``"attn"``, ``"mlp"``; used where ``sites`` is None.
        roles: at which positions. ``object`` are canvas positions masked in both the clean and the restored run.
        steps: denoising steps to trace, from 0; None is all.
        window: at which steps around its own a coordinate is restored.
        corruption: ``noise`` on the subject's embeddings, the subject replaced by ``mask`` tokens, or by another
            ``subject`` of as many tokens.
        noise_scale: of ``noise``, in standard deviations of the subject tokens' embeddings over the given facts (ROME
            has 3).
        draws: of the corruption, a fact; ``mask`` has one.
        canvas: answer positions, filled with end-of-text; None is exactly the object's tokens.
        sampler: how the canvas is unmasked; by default 8 steps, greedy.
        commits: ``free`` or ``teacher``, see above.
        batch_size: rows of one forward.
        seed: of noise, controls and the choice of other subjects.
        min_total_effect: facts whose corruption costs less than so many nats a token are not traceable.
        progress: called with (work done, work in all, what is running), in units of one run's step.

    Raises:
        TypeError: ``backbone`` is none.
        ValueError: an argument is outside its range, or a site does not exist.

    Source: Meng et al. 2022 (ROME, arXiv 2202.05262), causal tracing; Yao et al. 2026 (TimeROME-DLM, arXiv 2606.12841),
    the temporal indirect effect. Ours: the score of committed positions, IE apart, the controls, and gains measured on
    facts that did not choose the coordinate.

    Example:
        >>> import timerome as tr
        >>> backbone = tr.load("testbed")
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> trace = tr.CausalTracer(backbone, modules=["block"], draws=1).trace([fact])
        >>> trace.tie.shape[1], trace.roles  # 6 sites
        (6, ('subject_last', 'object'))
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        sites: Sequence[Site] | None = None,
        modules: Sequence[Module] = MODULES,
        roles: Sequence[Role] = ("subject_last", "object"),
        steps: Sequence[int] | None = None,
        window: Window = "from",
        corruption: Corruption = "noise",
        noise_scale: float = 3.0,
        draws: int = 4,
        canvas: int | None = None,
        sampler: SamplerConfig | None = None,
        commits: Commits = "free",
        batch_size: int = 32,
        seed: int = 0,
        min_total_effect: float = 0.1,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"CausalTracer: expected a Backbone, got {type(backbone).__name__}; timerome.wrap(model, tokenizer)."
            )
        _one_of("window", window, WINDOWS)
        _one_of("corruption", corruption, get_args(Corruption))
        _one_of("commits", commits, get_args(Commits))
        for role in roles:
            _one_of("roles", role, ROLES)
        sites = tuple(Site(*site) for site in sites) if sites is not None else tuple(backbone.sites(modules))
        for site in sites:
            backbone.module(site)
        for name, given in (("sites", sites), ("roles", roles), ("steps", steps)):
            if given is not None and (not given or len(set(given)) < len(given)):
                raise ValueError(f"CausalTracer: expected at least one of {name}, each once, got {list(given)}.")
        if steps is not None and min(steps) < 0:
            raise ValueError(f"CausalTracer: steps count from 0, got {list(steps)}.")
        for name, value in (("draws", draws), ("batch_size", batch_size), ("canvas", canvas)):
            if value is not None and value < 1:
                raise ValueError(f"CausalTracer: expected {name} >= 1, got {value}.")
        if not noise_scale >= 0:
            raise ValueError(f"CausalTracer: expected noise_scale >= 0, got {noise_scale}.")
        if not min_total_effect > 0:
            raise ValueError(f"CausalTracer: expected min_total_effect > 0, got {min_total_effect}.")
        self.backbone, self.sites, self.roles = backbone, sites, tuple(roles)
        self.steps = None if steps is None else tuple(sorted(steps))
        self.window, self.corruption, self.noise_scale, self.draws = window, corruption, noise_scale, draws
        self.canvas, self.sampler, self.commits = canvas, sampler or SamplerConfig(steps=8), commits
        self.batch_size, self.seed, self.min_total_effect = batch_size, seed, min_total_effect
        self.progress = progress

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on beside model and facts, JSON-ready."""
        return {
            "sites": [[site.layer, site.module] for site in self.sites],
            "roles": list(self.roles),
            "steps": None if self.steps is None else list(self.steps),
            "window": self.window,
            "corruption": self.corruption,
            "noise_scale": self.noise_scale,
            "draws": self.draws,
            "canvas": self.canvas,
            "sampler": asdict(self.sampler),
            "commits": self.commits,
            "seed": self.seed,
            "min_total_effect": self.min_total_effect,
        }

    @torch.inference_mode()
    def trace(self, facts: Iterable[Fact], *, checkpoint: str | Path | None = None) -> TraceResult:
        """Trace facts.

        Args:
            facts: the facts; ids are unique.
            checkpoint: file that keeps what is done, fact by fact. Given again, with the same facts and settings, a
                stopped trace goes on, to the same result as one never stopped.

        Returns:
            The effects of every coordinate for every fact that could be traced, and why the others could not.

        Raises:
            ValueError: there are no facts, or two share an id.
            CheckpointError: the checkpoint is of another trace.
            FloatingPointError: the model's logits are not finite.
        """
        facts = list(facts)
        ids = [fact.id for fact in facts]
        if not facts or len(set(ids)) < len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise ValueError(f"CausalTracer.trace: expected facts with ids of their own, got {twice or 'no facts'}.")
        sequences, reasons = self._encode(facts)
        grid = self._step_grid(list(sequences.values()))
        kept = Checkpoint(checkpoint, self._header(facts)) if checkpoint is not None else None
        records: dict[str, dict[str, Any]] = dict(kept.done) if kept else {}
        inputs = dict(
            zip(
                sequences,
                corrupted_inputs(
                    self.backbone,
                    [sequence for sequence, _ in sequences.values()],
                    self.corruption,
                    noise_scale=self.noise_scale,
                    draws=self.draws,
                    seed=self.seed,
                ),
                strict=True,
            )
        )
        work = {i: self._work(sequence, len(inputs[i]), grid) for i, (sequence, _) in sequences.items()}
        total, done = sum(work.values()), 0
        for i, (sequence, length) in sequences.items():
            if i not in records:
                self._tell(done, total, i)

                def tell(part: int, i: str = i, before: int = done) -> None:
                    self._tell(min(before + part, before + work[i]), total, i)

                try:
                    records[i] = {"id": i, **self._trace_fact(self._runs(sequence, length), inputs[i], grid, tell)}
                except FloatingPointError as error:
                    raise FloatingPointError(f"CausalTracer.trace: fact {i!r}: {error}") from error
                if kept:
                    kept.add(records[i])
            done += work[i]
            self._tell(done, total, i)
            if "reason" in records[i]:
                reasons[i] = records[i]["reason"]
        return self._result(facts, sequences, inputs, records, reasons, grid)

    # One fact --------------------------------------------------------------------------------------------------------

    def _trace_fact(
        self,
        runs: FactRuns,
        inputs: list[CorruptedInput],
        grid: tuple[int, ...],
        progress: Callable[[int], None],
    ) -> dict[str, Any]:
        if not inputs:
            length = int(runs.sequence.subject.sum())
            return {"reason": f"no other fact has a subject of {length} tokens to put in its place"}
        clean = runs.clean()
        draws = range(len(inputs))
        corrupted = runs.corrupted(clean, inputs, [(draw, None) for draw in draws])
        clean_score, corrupted_score = _score(clean.scores)[0], _score(corrupted).mean(0)
        total_effect = float((clean_score - corrupted_score).mean())
        if total_effect < self.min_total_effect:
            return {
                "reason": f"clean - corrupted is {total_effect:.3g} nats a token, less than {self.min_total_effect:g}: "
                "the corruption takes away nothing that could be restored"
            }
        steps = [step for step in grid if step < clean.steps]
        clean = runs.clean(self.sites, lambda step: any(in_window(self.window, s, step) for s in steps))
        # (draw, site, step, role), with the random-site control as one more site.
        cells: list[tuple[int, Restoration | None]] = []
        for draw in draws:
            cells += [(draw, Restoration(site, role, s)) for site in self.sites for s in steps for role in self.roles]
            cells += [(draw, self._random_site(runs, clean, draw, s, role)) for s in steps for role in self.roles]
        shape = (len(inputs), len(self.sites) + 1, len(steps), len(self.roles))
        started = 0

        def count(step: int) -> None:
            nonlocal started
            started += sum(in_window(self.window, s, step) for s in steps) * (shape[0] * shape[1] * shape[3])
            progress(started)

        scores = runs.corrupted(clean, inputs, [*cells, *((draw, None) for draw in draws)], count)
        # Scored again among the others: what restores nothing shares its forwards with the corrupted run exactly.
        corrupted = scores[len(cells) :]
        restored = scores[: len(cells)].reshape(*shape)
        tie, ie = self._effects(clean.scores, corrupted, restored, steps)
        controls = [r.positions for _, r in cells if r is not None and r.positions is not None]
        nowhere = np.array([not positions.any() for positions in controls]).reshape(shape[0], *shape[2:]).any(0)
        tie[-1][nowhere] = ie[-1][nowhere] = np.nan
        missing = len(grid) - len(steps)
        tie, ie = (np.pad(effect, ((0, 0), (0, missing), (0, 0)), constant_values=np.nan) for effect in (tie, ie))
        return {
            "tie": _to_json(tie[:-1]),
            "ie": _to_json(ie[:-1]),
            "random_tie": _to_json(tie[-1]),
            "random_ie": _to_json(ie[-1]),
            "clean": clean_score.tolist(),
            "corrupted": corrupted_score.tolist(),
            "recalled": bool((clean.final.cpu() == runs.sequence.ids)[runs.sequence.canvas].all()),
            "forward_rows": runs.forward_rows,
        }

    def _effects(
        self, clean: Scores, corrupted: Scores, restored: Scores, steps: Sequence[int]
    ) -> tuple[Floats, Floats]:
        """TIE and IE, ``(sites, steps, roles)`` each, of restored runs ``(draws, sites, steps, roles)``."""
        clean_score, corrupted_score = _score(clean)[0], _score(corrupted).mean(0)
        restored_score = _score(restored).mean(0)
        tie = np.full(restored.log_prob.shape[1:4], np.nan)
        ie = np.full_like(tie, np.nan)
        for k, step in enumerate(steps):
            if self.commits == "free":
                tie[:, k] = normalised_effect(
                    later_mean(restored_score[:, k], step),
                    later_mean(clean_score, step),
                    later_mean(corrupted_score, step),
                    self.min_total_effect,
                )
            open_in_all = (
                restored.masked[:, :, k, :, step] & corrupted.masked[:, None, None, step] & clean.masked[0, step]
            )
            same_step = [
                nanmean(masked_mean(values, open_in_all), axis=0)
                for values in (
                    restored.log_prob[:, :, k, :, step],
                    clean.log_prob[0, step],
                    corrupted.log_prob[:, None, None, step],
                )
            ]
            ie[:, k] = normalised_effect(same_step[0], same_step[1], same_step[2], self.min_total_effect)
        return tie, ie

    def _random_site(self, runs: FactRuns, clean: CleanRun, draw: int, step: int, role: Role) -> Restoration:
        generator = seeded_generator(self.seed, "random site", runs.sequence.fact_id, draw, step, role)
        site = self.sites[int(torch.randint(len(self.sites), (1,), generator=generator))]
        own = runs.places(clean.states[step], role).cpu()
        anywhere = runs.places(clean.states[0], role).cpu() | runs.sequence.subject
        candidates = (~anywhere).nonzero().flatten()
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: int(own.sum())]]
        positions = torch.zeros_like(own)
        positions[chosen] = True
        return Restoration(site, role, step, positions=positions)

    def _permuted_steps(self, runs: FactRuns, inputs: list[CorruptedInput], best: Coordinate) -> tuple[float, float]:
        """Effect of the best coordinate with the activations of its own steps, and with those of permuted ones."""
        clean = runs.clean([best.site])
        if not best.step < clean.steps or clean.steps < 2:
            return np.nan, np.nan
        cells: list[tuple[int, Restoration | None]] = []
        for draw in range(len(inputs)):
            generator = seeded_generator(self.seed, "permuted steps", runs.sequence.fact_id, draw)
            shift = int(torch.randint(1, clean.steps, (1,), generator=generator))
            donors = tuple((step + shift) % clean.steps for step in range(clean.steps))
            cells += [
                (draw, Restoration(best.site, best.role, best.step)),
                (draw, Restoration(best.site, best.role, best.step, donors=donors)),
                (draw, None),
            ]
        by_draw = runs.corrupted(clean, inputs, cells).reshape(len(inputs), 3)
        tie, ie = self._effects(clean.scores, by_draw[:, 2], by_draw[:, :2, None, None], [best.step])
        own, permuted = (ie if self.commits == "teacher" else tie)[:, 0, 0]
        return float(own), float(permuted)

    # All facts -------------------------------------------------------------------------------------------------------

    def _encode(self, facts: Sequence[Fact]) -> tuple[dict[str, tuple[Encoded, int]], dict[str, str]]:
        """Sequences, each with its object's length in tokens, and why the other facts have none."""
        sequences: dict[str, tuple[Encoded, int]] = {}
        reasons: dict[str, str] = {}
        for fact in facts:
            try:
                length = int(encode(self.backbone, fact).canvas.sum())
                sequences[fact.id] = (encode(self.backbone, fact, canvas=self.canvas), length)
            except (FactError, ValueError) as error:
                reasons[fact.id] = str(error)
        return sequences, reasons

    def _runs(self, sequence: Encoded, object_length: int) -> FactRuns:
        return FactRuns(
            self.backbone,
            sequence,
            object_length,
            sampler=self.sampler,
            window=self.window,
            commits=self.commits,
            batch_size=self.batch_size,
        )

    def _loop_steps(self, sequence: Encoded) -> int:
        """Most steps the loop can take on a sequence before nothing is masked."""
        ids = sequence.masked(self.backbone.mask_id)[None]
        steps = DenoisingLoop(self.backbone, ids, sequence.canvas, self.sampler).steps
        # A step commits at least one token of its block; with one block the loop is done after as many as there are.
        one_block = (self.sampler.block_length or int(sequence.canvas.sum())) >= int(sequence.canvas.sum())
        return min(steps, int(sequence.canvas.sum())) if one_block else steps

    def _step_grid(self, sequences: Sequence[tuple[Encoded, int]]) -> tuple[int, ...]:
        if self.steps is not None:
            return self.steps
        return tuple(range(max((self._loop_steps(sequence) for sequence, _ in sequences), default=1)))

    def _work(self, sequence: Encoded, draws: int, grid: Sequence[int]) -> int:
        loop_steps = self._loop_steps(sequence)
        steps = [s for s in grid if s < loop_steps]
        active = sum(in_window(self.window, s, step) for s in steps for step in range(loop_steps))
        return active * draws * (len(self.sites) + 1) * len(self.roles)

    def _tell(self, done: int, total: int, label: str) -> None:
        if self.progress is not None:
            self.progress(done, total, label)

    def _header(self, facts: Sequence[Fact]) -> dict[str, Any]:
        digest = hashlib.sha256(repr([(f.id, f.prompt, f.subject, f.object) for f in facts]).encode()).hexdigest()
        return {
            **self.settings,
            "facts": digest[:16],
            "fingerprint": self.backbone.fingerprint(),
            "library_version": __version__,
        }

    def _result(
        self,
        facts: Sequence[Fact],
        sequences: dict[str, tuple[Encoded, int]],
        inputs: dict[str, list[CorruptedInput]],
        records: dict[str, dict[str, Any]],
        reasons: dict[str, str],
        grid: tuple[int, ...],
    ) -> TraceResult:
        traced = [fact for fact in facts if fact.id not in reasons]
        width = max((len(records[f.id]["clean"]) for f in traced), default=0)
        shape = (len(self.sites), len(grid), len(self.roles))

        def stack(name: str, shape: tuple[int, ...]) -> Floats:
            arrays = [np.array(records[f.id][name], dtype=np.float64) for f in traced]
            if name in ("clean", "corrupted"):  # NaN once nothing is masked
                arrays = [np.pad(a, (0, width - len(a)), constant_values=np.nan) for a in arrays]
            return np.stack(arrays) if arrays else np.empty((0, *shape))

        result = TraceResult(
            facts=tuple(f.id for f in traced),
            groups=tuple(f.group or "" for f in traced),
            sites=self.sites,
            steps=grid,
            roles=self.roles,
            tie=stack("tie", shape),
            ie=stack("ie", shape),
            random_tie=stack("random_tie", shape[1:]),
            random_ie=stack("random_ie", shape[1:]),
            clean=stack("clean", (width,)),
            corrupted=stack("corrupted", (width,)),
            recalled=np.array([records[f.id]["recalled"] for f in traced], dtype=bool),
            permuted=np.full((len(traced), 2), np.nan),
            not_traceable={fact.id: reasons[fact.id] for fact in facts if fact.id in reasons},
            settings=self.settings,
            backbone=repr(self.backbone),
            fingerprint=self.backbone.fingerprint(),
            library_version=__version__,
        )
        effect: Effect = "ie" if self.commits == "teacher" else "tie"
        if result.has(effect):
            best = result.best(effect=effect)
            for row, fact in enumerate(traced):
                self._tell(row, len(traced), f"{fact.id}: permuted steps")
                result.permuted[row] = self._permuted_steps(self._runs(*sequences[fact.id]), inputs[fact.id], best)
            self._tell(len(traced), len(traced), "permuted steps")
        return result


def _score(scores: Scores) -> Floats:
    """Score of runs at each step, ``(R, S)``: see :class:`CausalTracer`."""
    return np.asarray(last_masked(scores.log_prob, scores.masked).mean(-1))


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"CausalTracer: expected {name} in {tuple(allowed)}, got {value!r}.")


def _to_json(values: Floats) -> Any:
    """Nested lists with None for NaN; numpy reads None back as NaN."""
    return np.where(np.isnan(values), None, values.astype(object)).tolist()  # type: ignore[call-overload]

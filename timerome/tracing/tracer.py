"""Temporal causal tracing: which coordinate's activation drives the object at later denoising steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..backbones import Backbone
from ..coordinates import MODULES, Module, Role, Site
from ..diffusion import DenoisingLoop, Encoded, SamplerConfig, encode
from ..facts import Fact, FactError
from ..functional.effects import SCORES, Floats
from .checkpoint import Checkpoint
from .corrupted_inputs import CorruptedInput, Corruption, corrupted_inputs
from .one_fact import OneFact
from .result import Effect, TraceResult
from .runs import FactRuns, Window, in_window
from .settings import Commits, Tokens, TraceSettings
from .shards import ALONE, Shard

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
    Probability and rank are scored in the same runs (:func:`timerome.functional.effects.object_score`); see
    :meth:`TraceResult.by`.

    **Effects.** Kept apart:

    - TIE(c), the temporal indirect effect = mean over later steps s' > s of restored - corrupted, as a share of clean -
      corrupted over the same steps;
    - IE(c) = restored - corrupted at s itself, over the tokens still masked in all three runs, as a share of clean -
      corrupted over the same tokens;
    - forced IE(c) = the same where every run holds the true tokens, committed in the clean run's order. No run's tokens
      then depend on what it restores, so there is no later effect.

    Each draw's gain is divided by the total effect averaged over draws. 0 is the corrupted run, 1 the clean one;
    nothing is clipped. TIE of the last step is undefined (NaN), and so is an effect whose denominator is below
    ``min_total_effect``.

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
        layer_window: how many layers around its own a coordinate is restored at, of the same module; what an even
            number has too many lies above.
        corruption: ``noise`` on the subject's embeddings, the subject replaced by ``mask`` tokens, or by another
            ``subject`` of as many tokens.
        noise_scale: of ``noise``, in standard deviations of the subject tokens' embeddings over the given facts (ROME
            has 3).
        draws: of the corruption, a fact; ``mask`` has one.
        canvas: answer positions, filled with end-of-text; None is exactly the object's tokens.
        sampler: how the canvas is unmasked; by default 8 steps, greedy.
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
        layer_window: int = 1,
        corruption: Corruption = "noise",
        noise_scale: float = 3.0,
        draws: int = 4,
        canvas: int | None = None,
        sampler: SamplerConfig | None = None,
        commits: Commits = "free",
        tokens: Tokens = "all",
        prune: float | None = None,
        batch_size: int | None = None,
        activation_budget: int | None = None,
        seed: int = 0,
        min_total_effect: float = 0.1,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"CausalTracer: expected a Backbone, got {type(backbone).__name__}; timerome.wrap(model, tokenizer)."
            )
        self.backbone = backbone
        self._settings = TraceSettings(
            sites=tuple(Site(*site) for site in sites) if sites is not None else tuple(backbone.sites(modules)),
            roles=tuple(roles),
            steps=None if steps is None else tuple(sorted(steps)),
            window=window,
            layer_window=layer_window,
            corruption=corruption,
            noise_scale=noise_scale,
            draws=draws,
            canvas=canvas,
            sampler=sampler or SamplerConfig(steps=8),
            commits=commits,
            tokens=tokens,
            prune=prune,
            seed=seed,
            min_total_effect=min_total_effect,
        )
        for site in self._settings.sites:
            backbone.module(site)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"CausalTracer: expected batch_size >= 1 or None, got {batch_size}.")
        if activation_budget is not None and activation_budget < 0:
            raise ValueError(f"CausalTracer: expected activation_budget >= 0 or None, got {activation_budget}.")
        self.batch_size, self.activation_budget, self.progress = batch_size, activation_budget, progress

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on beside model and facts, JSON-ready."""
        return self._settings.to_dict()

    @torch.no_grad()
    def trace(
        self, facts: Iterable[Fact], *, checkpoint: str | Path | None = None, shard: Shard = ALONE
    ) -> TraceResult:
        """Trace facts.

        Args:
            facts: the facts; ids are unique.
            checkpoint: file that keeps what is done, fact by fact. Given again, with the same facts and settings, a
                stopped trace goes on, to the same result as one never stopped. Each process of a shard has its own
                file beside it, and reads all of them.
            shard: which share of the facts this process traces, and how the processes exchange results; by default it
                traces all. ``TraceCallback`` makes one of a Trainer's strategy.

        Returns:
            The effects of every coordinate for every fact that could be traced, and why the others could not; the same
            in every process of a shard.

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
        grid = self._step_grid([sequence for sequence, _ in sequences.values()])
        # Before any process waits for another: a wrong checkpoint is an error in each of them.
        kept = None if checkpoint is None else Checkpoint(checkpoint, self._header(facts), shard.rank)
        own = corrupted_inputs(
            self.backbone,
            [sequence for sequence, _ in sequences.values()],
            self._settings.corruption,
            noise_scale=self._settings.noise_scale,
            draws=self._settings.draws,
            seed=self._settings.seed,
        )
        inputs = dict(zip(sequences, own, strict=True))
        records = self._share(shard.of(list(sequences)), sequences, inputs, grid, kept)
        records = shard.merged(records)
        reasons |= {i: record["reason"] for i, record in records.items() if "reason" in record}
        result = self._result(facts, records, reasons, grid)
        effect: Effect = "tie" if self._settings.free else "forced_ie"
        if result.has(effect):
            best = result.best(effect=effect)
            drawn = result.draws(effect)[(slice(None), slice(None), *result.index(best))]
            at_best = dict(zip(result.facts, drawn, strict=True))
            mine = shard.of(list(result.facts))
            found = {}
            for n, i in enumerate(mine):
                self._tell(n, len(mine), f"{i}: permuted steps")
                runs = self._runs(*sequences[i], commits="free" if self._settings.free else "teacher")
                one = OneFact(self._settings, runs, inputs[i], grid)
                found[i] = one.permuted_steps(best, at_best[i][: len(inputs[i])])
            self._tell(len(mine), len(mine), "permuted steps")
            merged = shard.merged({i: [None if np.isnan(x) else x for x in pair] for i, pair in found.items()})
            result.permuted[:] = np.array([merged[i] for i in result.facts], dtype=np.float64)
        return result

    def _share(
        self,
        share: Sequence[str],
        sequences: dict[str, tuple[Encoded, int]],
        inputs: dict[str, list[CorruptedInput]],
        grid: tuple[int, ...],
        kept: Checkpoint | None,
    ) -> dict[str, dict[str, Any]]:
        """Trace this process's facts, or take them from the checkpoint."""
        records = {i: kept.done[i] for i in share if kept and i in kept.done}
        work = {i: self._work(sequences[i][0], len(inputs[i]), grid) for i in share}
        total, done = sum(work.values()), 0
        for i in share:
            if i not in records:
                self._tell(done, total, i)

                def tell(part: int, i: str = i, before: int = done) -> None:
                    self._tell(min(before + part, before + work[i]), total, i)

                try:
                    found = OneFact(self._settings, self._runs(*sequences[i]), inputs[i], grid, tell).record()
                except FloatingPointError as error:
                    raise FloatingPointError(f"CausalTracer.trace: fact {i!r}: {error}") from error
                # As it would be read back.
                records[i] = json.loads(json.dumps({"id": i, **found}))
                if kept:
                    kept.add(records[i])
            done += work[i]
            self._tell(done, total, i)
        return records

    def _encode(self, facts: Sequence[Fact]) -> tuple[dict[str, tuple[Encoded, int]], dict[str, str]]:
        """Sequences, each with its object's length in tokens, and why the other facts have none."""
        sequences: dict[str, tuple[Encoded, int]] = {}
        reasons: dict[str, str] = {}
        for fact in facts:
            try:
                length = int(encode(self.backbone, fact).canvas.sum())
                sequences[fact.id] = (encode(self.backbone, fact, canvas=self._settings.canvas), length)
            except (FactError, ValueError) as error:
                reasons[fact.id] = str(error)
        return sequences, reasons

    def _runs(self, sequence: Encoded, object_length: int, **more: Any) -> FactRuns:
        return FactRuns(
            self.backbone,
            sequence,
            object_length,
            sampler=self._settings.sampler,
            window=self._settings.window,
            batch_size=self.batch_size,
            budget_bytes=self.activation_budget,
            **more,
        )

    def _loop_steps(self, sequence: Encoded) -> int:
        """Most steps the loop can take on a sequence before nothing is masked."""
        ids, sampler = sequence.masked(self.backbone.mask_id)[None], self._settings.sampler
        size = int(sequence.canvas.sum())
        steps = DenoisingLoop(self.backbone, ids, sequence.canvas, sampler).steps
        # A step commits at least one token of its block; with one block the loop is done after as many as there are.
        return min(steps, size) if (sampler.block_length or size) >= size else steps

    def _step_grid(self, sequences: Sequence[Encoded]) -> tuple[int, ...]:
        if self._settings.steps is not None:
            return self._settings.steps
        return tuple(range(max((self._loop_steps(sequence) for sequence in sequences), default=1)))

    def _work(self, sequence: Encoded, draws: int, grid: Sequence[int]) -> int:
        settings, loop_steps = self._settings, self._loop_steps(sequence)
        steps = [s for s in grid if s < loop_steps]
        active = sum(in_window(settings.window, s, step) for s in steps for step in range(loop_steps)) * settings.free
        return (active + len(steps) * settings.forced) * draws * (len(settings.sites) + 1) * len(settings.roles)

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
        records: dict[str, dict[str, Any]],
        reasons: dict[str, str],
        grid: tuple[int, ...],
    ) -> TraceResult:
        settings = self._settings
        traced = [fact for fact in facts if fact.id not in reasons]
        cells = (len(settings.sites) + 1, len(grid), len(settings.roles))

        def stacked(arrays: list[Floats], empty: tuple[int, ...]) -> Floats:
            """Facts in one array, NaN where one has fewer draws or steps than another."""
            if not arrays:
                return np.empty((0, *empty))
            size = max(len(a) for a in arrays)
            return np.stack(
                [np.pad(a, [(0, size - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=np.nan) for a in arrays]
            )

        free: tuple[Effect, ...] = ("tie", "ie") if settings.free else ()
        effects: tuple[Effect, ...] = (*free, "forced_ie") if settings.forced else free
        found = [records[fact.id] for fact in traced]
        measured: dict[str, dict[str, Floats]] = {
            score: {
                **{
                    e: stacked([np.array(r["draws"][score][e], dtype=np.float64) for r in found], (0, *cells))
                    for e in effects
                },
                **{
                    name: stacked([np.array(r["draws"][score][name], dtype=np.float64) for r in found], (0, len(grid)))
                    for name in ("tie_total", "forced_ie_total")
                    if found and name in found[0]["draws"][score]
                },
                **{name: stacked([np.array(r[name][score]) for r in found], (0,)) for name in ("clean", "corrupted")},
            }
            for score in SCORES
        }
        return TraceResult(
            facts=tuple(fact.id for fact in traced),
            groups=tuple(fact.group or "" for fact in traced),
            sites=settings.sites,
            steps=grid,
            roles=settings.roles,
            measured=measured,
            recalled=np.array([r["recalled"] for r in found], dtype=bool),
            permuted=np.full((len(traced), 2), np.nan),
            not_traceable={fact.id: reasons[fact.id] for fact in facts if fact.id in reasons},
            settings=self.settings,
            backbone=repr(self.backbone),
            fingerprint=self.backbone.fingerprint(),
            library_version=__version__,
        )

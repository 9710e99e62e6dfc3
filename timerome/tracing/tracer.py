"""Temporal causal tracing: which coordinate's activation drives the object at later denoising steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .._version import __version__
from ..backbones import Backbone
from ..diffusion import DenoisingLoop, Encoded, encode
from ..facts import Fact, FactError
from ..functional.effects import SCORES, Floats
from .checkpoint import Checkpoint
from .config import TraceConfig
from .corrupted_inputs import CorruptedInput, corrupted_inputs
from .data import Effect
from .one_fact import OneFact
from .result import TraceResult
from .runs import FactRuns
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
        config: what is traced, and how; by default every layer, module and step.
        progress: called with (work done, work in all, what is running), in units of one run's step.

    Raises:
        TypeError: ``backbone`` is none.
        ValueError: a site does not exist.

    Source: Meng et al. 2022 (ROME, arXiv 2202.05262), causal tracing; Yao et al. 2026 (TimeROME-DLM, arXiv 2606.12841),
    the temporal indirect effect. Ours: the score of committed positions, IE apart, the controls, and gains measured on
    facts that did not choose the coordinate.

    Example:
        >>> import timerome as tr
        >>> backbone = tr.load("testbed")
        >>> fact = tr.Fact(id="kenya", prompt="The capital city of Kenya is", subject="Kenya", object="Nairobi")
        >>> trace = tr.CausalTracer(backbone, tr.TraceConfig(modules=["block"], draws=1)).trace([fact])
        >>> trace.tie.shape[1], trace.roles  # 6 sites
        (6, ('subject_last', 'object'))
    """

    def __init__(
        self, backbone: Backbone, config: TraceConfig | None = None, *, progress: Progress | None = None
    ) -> None:
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"CausalTracer: expected a Backbone, got {type(backbone).__name__}; timerome.wrap(model, tokenizer)."
            )
        config = config or TraceConfig()
        if not isinstance(config, TraceConfig):
            raise TypeError(f"CausalTracer: expected a TraceConfig, got {type(config).__name__}.")
        self.sites = tuple(backbone.sites(config.modules) if config.sites is None else config.sites)
        for site in self.sites:
            backbone.module(site)
        self.backbone, self.config, self.progress = backbone, replace(config, sites=self.sites), progress

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
            self.config.corruption,
            noise_scale=self.config.noise_scale,
            draws=self.config.draws,
            seed=self.config.seed,
        )
        inputs = dict(zip(sequences, own, strict=True))
        records = self._share(shard.of(list(sequences)), sequences, inputs, grid, kept)
        records = shard.merged(records)
        reasons |= {i: record["reason"] for i, record in records.items() if "reason" in record}
        result = self._result(facts, records, reasons, grid)
        effect: Effect = "tie" if self.config.free else "forced_ie"
        if result.has(effect):
            best = result.best(effect=effect)
            drawn = result.draws(effect)[(slice(None), slice(None), *result.index(best))]
            at_best = dict(zip(result.facts, drawn, strict=True))
            mine = shard.of(list(result.facts))
            found = {}
            for n, i in enumerate(mine):
                self._tell(n, len(mine), f"{i}: permuted steps")
                runs = self._runs(*sequences[i], forced=not self.config.free)
                one = OneFact(runs, self.sites, inputs[i], grid)
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
                    found = OneFact(self._runs(*sequences[i]), self.sites, inputs[i], grid, tell).record()
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
                sequences[fact.id] = (encode(self.backbone, fact, canvas=self.config.canvas), length)
            except (FactError, ValueError) as error:
                reasons[fact.id] = str(error)
        return sequences, reasons

    def _runs(self, sequence: Encoded, object_length: int, forced: bool = False) -> FactRuns:
        commits: Literal["free", "teacher"] = "teacher" if forced else "free"
        return FactRuns(self.backbone, sequence, object_length, self.config, commits=commits)

    def _loop_steps(self, sequence: Encoded) -> int:
        """Most steps the loop can take on a sequence before nothing is masked."""
        ids, sampler = sequence.masked(self.backbone.mask_id)[None], self.config.sampler
        size = int(sequence.canvas.sum())
        steps = DenoisingLoop(self.backbone, ids, sequence.canvas, sampler).steps
        # A step commits at least one token of its block; with one block the loop is done after as many as there are.
        return min(steps, size) if (sampler.block_length or size) >= size else steps

    def _step_grid(self, sequences: Sequence[Encoded]) -> tuple[int, ...]:
        if self.config.steps is not None:
            return tuple(self.config.steps)
        return tuple(range(max((self._loop_steps(sequence) for sequence in sequences), default=1)))

    def _work(self, sequence: Encoded, draws: int, grid: Sequence[int]) -> int:
        config, loop_steps = self.config, self._loop_steps(sequence)
        steps = [s for s in grid if s < loop_steps]
        active = sum(config.restores(s, step) for s in steps for step in range(loop_steps)) * config.free
        return (active + len(steps) * config.forced) * draws * (len(self.sites) + 1) * len(config.roles)

    def _tell(self, done: int, total: int, label: str) -> None:
        if self.progress is not None:
            self.progress(done, total, label)

    def _header(self, facts: Sequence[Fact]) -> dict[str, Any]:
        digest = hashlib.sha256(repr([(f.id, f.prompt, f.subject, f.object) for f in facts]).encode()).hexdigest()
        return {
            **self.config.settings(),
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
        config = self.config
        traced = [fact for fact in facts if fact.id not in reasons]
        cells = (len(self.sites) + 1, len(grid), len(config.roles))

        def stacked(arrays: list[Floats], empty: tuple[int, ...]) -> Floats:
            """Facts in one array, NaN where one has fewer draws or steps than another."""
            if not arrays:
                return np.empty((0, *empty))
            size = max(len(a) for a in arrays)
            return np.stack(
                [np.pad(a, [(0, size - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=np.nan) for a in arrays]
            )

        free: tuple[Effect, ...] = ("tie", "ie") if config.free else ()
        effects: tuple[Effect, ...] = (*free, "forced_ie") if config.forced else free
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
            sites=self.sites,
            steps=grid,
            roles=tuple(config.roles),
            measured=measured,
            recalled=np.array([r["recalled"] for r in found], dtype=bool),
            permuted=np.full((len(traced), 2), np.nan),
            not_traceable={fact.id: reasons[fact.id] for fact in facts if fact.id in reasons},
            settings=self.config.settings(),
            backbone=repr(self.backbone),
            fingerprint=self.backbone.fingerprint(),
            library_version=__version__,
        )

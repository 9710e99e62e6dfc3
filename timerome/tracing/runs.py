"""The clean, corrupted and restored runs of one fact.

A masked diffusion model carries nothing from step to step but tokens. So two runs that hold the same tokens, under the
same corruption and restoring the same, have the same next step, and one forward serves both. All runs of a fact advance
together, each step's different situations are put in batches, one a row, and whatever runs have in common (every one of
them before it first restores; all that end up with the corrupted, or with the clean run's tokens) is computed once.
Within a step, what restored runs of one state share is computed once too (see :mod:`timerome.tracing.forwards`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Role, Site
from ..diffusion import DenoisingLoop, Encoded, role_positions
from ..functional.effects import Bools, Floats, last_masked
from ..hooks import capture
from .activations import ActivationStore
from .config import TraceConfig
from .corrupted_inputs import CorruptedInput
from .forwards import Patch, Row, batches, can_join, fitting, logits_at, run_batch


@dataclass(frozen=True)
class Restoration:
    """What a restored run takes from the clean one.

    Attributes:
        sites: whose outputs are replaced: one, or a window of layers.
        role: at which positions.
        step: of the coordinate; the window says at which steps around it the run restores.
        positions: these ``(L,)`` instead of the role's; for the random-site control.
        donors: the clean step whose activations are taken at each step; None takes those of the same step. For the
            step-permuted control.
    """

    sites: tuple[Site, ...]
    role: Role
    step: int
    positions: Tensor | None = None
    donors: tuple[int, ...] | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides the next step of a run that restores now; its own step no longer does."""
        return self.sites, self.role, None if self.positions is None else id(self.positions), self.donors


@dataclass(frozen=True)
class Scores:
    """What was scored in some runs: R runs (any leading shape), S steps, n object tokens.

    Attributes:
        log_prob: of the object's true tokens at each step, nats, ``(R, S, n)``; NaN where a token was not predicted any
            more.
        log_rank: natural logarithm of their rank in the vocabulary, 0 for the first, ``(R, S, n)``; NaN likewise.
        masked: whether they were masked in the state that step started from, ``(R, S, n)``.
    """

    log_prob: Floats
    log_rank: Floats
    masked: Bools

    def __getitem__(self, index: Any) -> Scores:
        return Scores(self.log_prob[index], self.log_rank[index], self.masked[index])

    def reshape(self, *shape: int) -> Scores:
        """Arrange the runs, the first axis, in another shape."""
        tail = self.log_prob.shape[-2:]
        return Scores(
            self.log_prob.reshape(*shape, *tail),
            self.log_rank.reshape(*shape, *tail),
            self.masked.reshape(*shape, *tail),
        )

    def carried(self) -> Scores:
        """Carry the values of each committed token forward from the step that committed it."""
        return Scores(last_masked(self.log_prob, self.masked), last_masked(self.log_rank, self.masked), self.masked)


@dataclass
class CleanRun:
    """The uncorrupted run.

    Attributes:
        states: what the model saw at each step, ``(S, L)``. S counts steps until nothing is masked.
        final: the last state, ``(L,)``.
        scores: one run, ``(1, S, n)``.
        outputs: each wanted site's output ``(L, d)`` at each wanted step.
    """

    states: Tensor
    final: Tensor
    scores: Scores
    outputs: ActivationStore

    @property
    def steps(self) -> int:
        """S."""
        return len(self.states)


class CommonNoiseLoop(DenoisingLoop):
    """A denoising loop in which every row meets the same sampling noise, and a step's does not depend on those before.

    Without it, with a temperature or random remasking, rows of a batch would differ by their noise and not only by what
    was restored in them.
    """

    def _uniform(self, row: int, what: str, *shape: int) -> Tensor:
        self._generator.manual_seed((self.config.seed * 1_000_003 + self.step) * 2 + (what == "order"))
        return super()._uniform(row, what, *shape)


class FactRuns:
    """Runs one fact, clean and otherwise.

    Args:
        backbone: the model.
        sequence: the fact's tokens.
        object_length: of the canvas, the first so many tokens are the object and are scored; the rest is filler.
        config: how the canvas is unmasked, in every run alike; at which steps around its own a restored run restores;
            most rows of one forward, None being as many as the device takes well (see :func:`fitting`); and bytes of
            clean activations in memory (see :class:`ActivationStore`).
        commits: ``free``: each run commits what it predicts. ``teacher``: every run commits the true tokens, in the
            clean run's order.
        join: whether rows may begin where they are restored; None finds out.
    """

    def __init__(
        self,
        backbone: Backbone,
        sequence: Encoded,
        object_length: int,
        config: TraceConfig,
        *,
        commits: Literal["free", "teacher"] = "free",
        join: bool | None = None,
    ) -> None:
        self.backbone, self.sequence, self.config = backbone, sequence, config
        self.teacher = commits == "teacher"
        self.batch_size = config.batch_size or fitting(backbone.device, len(sequence.ids))
        self._canvas = sequence.canvas.to(backbone.device)
        self._truth = sequence.ids.to(backbone.device)
        self.object_length = object_length
        self.join = (
            can_join(backbone, sequence.masked(backbone.mask_id).to(backbone.device), self._canvas)
            if join is None
            else join
        )
        self.forward_rows = 0.0

    def clean(self, sites: Sequence[Site] = (), keep: Callable[[int], bool] = lambda step: True) -> CleanRun:
        """Make the clean run and keep the outputs of ``sites`` at the steps for which ``keep`` says so.

        Kept activations are ``len(sites) * kept steps * L * d`` values; those beyond the budget lie on disk.
        """
        ids = self.sequence.masked(self.backbone.mask_id)[None].to(self.backbone.device)
        states, found, outputs = [], [], ActivationStore(self.config.activation_budget)
        step = 0
        while step < self._loop(ids, 0).steps and bool((self._canvas & (ids[0] == self.backbone.mask_id)).any()):
            wanted = list(sites) if keep(step) else []
            states.append(ids[0])
            with capture(self.backbone, wanted) as captured:
                where = self._reads(ids)
                logits = logits_at(self.backbone, ids, self._canvas, where)
                self.forward_rows += 1
            for site, output in captured.items():
                outputs.put(step, site, output[0])
            captured.clear()
            found.append(self._score(logits, where))
            after = self._commit(ids, logits, where, step)
            ids = torch.where(ids == after, ids, self._truth) if self.teacher else after
            step += 1
        seen = torch.stack(states)
        masked = (seen[:, self._canvas][:, : self.object_length] == self.backbone.mask_id).cpu().numpy()[None]
        log_prob, log_rank = (np.stack(parts, axis=1) for parts in zip(*found, strict=True))
        return CleanRun(seen, ids[0], Scores(log_prob, log_rank, masked), outputs)

    def corrupted(
        self,
        clean: CleanRun,
        inputs: Sequence[CorruptedInput],
        runs: Sequence[tuple[int, Restoration | None]],
        progress: Callable[[int], None] = lambda step: None,
    ) -> Scores:
        """Make corrupted and restored runs.

        Args:
            clean: the clean run, with the activations that are to be restored.
            inputs: draws of the corruption.
            runs: one (draw, what is restored) a run; None restores nothing: the corrupted run.
            progress: told after each step.

        Returns:
            Scores of R runs, in order. With ``commits="teacher"`` a run's step does not depend on those before, so a
            restored run is made at its own step alone; elsewhere its scores are NaN.
        """
        device = self.backbone.device
        given = [i.ids.to(device) for i in inputs]
        noise = [None if i.noise is None else i.noise.to(device, self.backbone.dtype) for i in inputs]
        if not runs:
            empty = np.empty((0, clean.steps, self.object_length))
            return Scores(empty, empty, empty.astype(bool))
        ids = torch.stack([given[draw] for draw, _ in runs])
        log_prob = np.full((len(runs), clean.steps, self.object_length), np.nan)
        log_rank, masked = log_prob.copy(), np.empty(log_prob.shape, dtype=bool)
        teacher = self.teacher
        for step in range(clean.steps):
            if teacher:
                ids = torch.where(self._canvas, clean.states[step], ids)
            masked[:, step] = (ids[:, self._canvas][:, : self.object_length] == self.backbone.mask_id).cpu().numpy()
            made = [i for i, (_, r) in enumerate(runs) if not teacher or r is None or r.step == step]
            restoring = [r if teacher else self._active(r, step) for r in (runs[i][1] for i in made)]
            kinds = [(runs[i][0], r and r.kind) for i, r in zip(made, restoring, strict=True)]
            if made:
                index = torch.as_tensor(made, device=device)
                _, state_of = _distinct(ids[index], [(runs[i][0],) for i in made])
                first, row_of = _distinct(ids[index], kinds)
                sources: dict[tuple[int, Site], Callable[[], Tensor]] = {}
                rows = [
                    Row(
                        int(state_of[k]),
                        ids[made[k]],
                        noise[runs[made[k]][0]],
                        self._patches(clean, step, ids[made[k]], restoring[k], sources),
                    )
                    for k in first
                ]
                scores, moved = self._advance(rows, step)
                log_prob[made, step], log_rank[made, step] = scores[0][row_of], scores[1][row_of]
                if not teacher:
                    ids = moved[torch.as_tensor(row_of, device=device)]
            progress(step)
        return Scores(log_prob, log_rank, masked)

    def places(self, ids: Tensor, role: Role) -> Tensor:
        """Return where a role's activations are in the state ``ids`` ``(L,)``: boolean ``(L,)``, on ids' device."""
        positions = role_positions(self.sequence, ids.cpu(), role, self.backbone.mask_id)
        return (self.backbone.reads_from(positions) if role == "object" else positions).to(ids.device)

    def _active(self, restoration: Restoration | None, step: int) -> Restoration | None:
        return restoration if restoration and self.config.restores(restoration.step, step) else None

    def _advance(self, rows: Sequence[Row], step: int) -> tuple[tuple[Floats, Floats], Tensor]:
        """Run rows and commit; return their log-probabilities and log-ranks ``(rows, n)`` and their next ids."""
        log_prob = np.empty((len(rows), self.object_length))
        log_rank = log_prob.copy()
        moved = torch.empty((len(rows), len(self._canvas)), dtype=torch.long, device=self.backbone.device)
        for batch in batches(rows, self.backbone.n_layers, self.batch_size, self.join):
            found, where, logits = run_batch(self.backbone, batch, self._canvas, self._reads)
            self.forward_rows += batch.cost(self.backbone.n_layers)
            log_prob[found], log_rank[found] = self._score(logits, where)
            moved[found] = self._commit(torch.stack([rows[i].ids for i in found]), logits, where, step)
        return (log_prob, log_rank), moved

    def _patches(
        self,
        clean: CleanRun,
        step: int,
        ids: Tensor,
        restoration: Restoration | None,
        sources: dict[tuple[int, Site], Callable[[], Tensor]],
    ) -> tuple[Patch, ...]:
        if restoration is None:
            return ()
        if restoration.positions is not None:
            where = restoration.positions.to(ids.device)
        else:
            # Masked in both runs: elsewhere one of them has a token where the other is still predicting one.
            both = torch.where(ids == clean.states[step], ids, -1) if restoration.role == "object" else ids
            where = self.places(both, restoration.role)
        donor = step if restoration.donors is None else restoration.donors[step]

        def source(site: Site) -> Callable[[], Tensor]:
            return sources.setdefault((donor, site), lambda: clean.outputs.get(donor, site))

        return tuple(Patch(site, where, source(site)) for site in restoration.sites)

    def _loop(self, ids: Tensor, step: int) -> CommonNoiseLoop:
        """A loop over the canvas alone, at ``step``; nothing else changes."""
        canvas = ids[:, self._canvas]
        loop = CommonNoiseLoop(self.backbone, canvas, torch.ones_like(canvas, dtype=torch.bool), self.config.sampler)
        loop.step = step
        return loop

    def _reads(self, ids: Tensor) -> Tensor:
        """Which positions of states ``(B, L)`` have to be predicted: a committed one only where it may be edited."""
        open_ = ids == self.backbone.mask_id
        return self._canvas & (open_ if self.config.sampler.editing_threshold is None else torch.ones_like(open_))

    def _commit(self, ids: Tensor, logits: Tensor, where: Tensor, step: int) -> Tensor:
        """Ids ``(B, L)`` after a step whose logits at ``where`` ``(B, L)`` are ``(n, V)``."""
        after = ids.clone()
        after[:, self._canvas] = self._loop(ids, step).commit(logits, where[:, self._canvas])
        return after

    def _score(self, logits: Tensor, where: Tensor) -> tuple[Floats, Floats]:
        """Log-probability and log-rank of the object's true tokens ``(B, n)``, float64, from logits at ``where``.

        NaN elsewhere: what is not predicted has no score of its own at this step.
        """
        where = where[:, self._canvas]
        truth = self._truth[self._canvas].expand_as(where)[where]
        of_object = torch.zeros_like(where)
        of_object[:, : self.object_length] = where[:, : self.object_length]
        if self.object_length < where.shape[1]:
            logits, truth = logits[of_object[where]], truth[of_object[where]]
        true = logits.gather(-1, truth[:, None])
        found = torch.full((2, *where.shape), torch.nan, dtype=torch.float64, device=logits.device)
        found[0][of_object] = logits.log_softmax(-1).gather(-1, truth[:, None])[:, 0].double()
        # Compared into floats, which are summed several times faster than booleans.
        ahead = torch.gt(logits, true, out=torch.empty_like(logits)).sum(-1, dtype=torch.float64)
        found[1][of_object] = (ahead + 1).log()
        log_prob, log_rank = found[..., : self.object_length].cpu().numpy()
        return log_prob, log_rank


def _distinct(ids: Tensor, kinds: Sequence[tuple[object, ...]]) -> tuple[list[int], NDArray[np.int64]]:
    """Return the first run of each situation, and each run's place among them."""
    place: dict[tuple[bytes, tuple[object, ...]], int] = {}
    first: list[int] = []
    row_of = np.empty(len(kinds), dtype=np.int64)
    for i, (row, kind) in enumerate(zip(ids.cpu().numpy(), kinds, strict=True)):
        key = (row.tobytes(), kind)
        if key not in place:
            place[key] = len(first)
            first.append(i)
        row_of[i] = place[key]
    return first, row_of

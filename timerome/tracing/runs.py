"""The clean, corrupted and restored runs of one fact.

A masked diffusion model carries nothing from step to step but tokens. So two runs that hold the same tokens, under the
same corruption and restoring the same, have the same next step, and one forward serves both. All runs of a fact advance
together, each step's different situations are put in batches, one a row, and whatever runs have in common (every one of
them before it first restores; all that end up with the corrupted, or with the clean run's tokens) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Role, Site
from ..diffusion import DenoisingLoop, Encoded, SamplerConfig, role_positions
from ..functional.effects import Bools, Floats
from ..hooks import Hooks, OutputHook, capture
from .corrupted_inputs import CorruptedInput

Window = Literal["single", "from", "until"]
Commits = Literal["free", "teacher"]
WINDOWS: tuple[Window, ...] = get_args(Window)


def in_window(window: Window, chosen: int, step: int) -> bool:
    """Whether a run whose step is ``chosen`` restores at ``step``."""
    return step == chosen if window == "single" else step >= chosen if window == "from" else step <= chosen


@dataclass(frozen=True)
class Restoration:
    """What a restored run takes from the clean one.

    Attributes:
        site: whose output is replaced.
        role: at which positions.
        step: of the coordinate; the window says at which steps around it the run restores.
        positions: these ``(L,)`` instead of the role's; for the random-site control.
        donors: the clean step whose activations are taken at each step; None takes those of the same step. For the
            step-permuted control.
    """

    site: Site
    role: Role
    step: int
    positions: Tensor | None = None
    donors: tuple[int, ...] | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides the next step of a run that restores now; its own step no longer does."""
        return self.site, self.role, None if self.positions is None else id(self.positions), self.donors


@dataclass(frozen=True)
class Scores:
    """What was scored in some runs: R runs (any leading shape), S steps, n object tokens.

    Attributes:
        log_prob: of the object's true tokens at each step, nats, ``(R, S, n)``.
        masked: whether they were masked in the state that step started from, ``(R, S, n)``.
    """

    log_prob: Floats
    masked: Bools

    def __getitem__(self, index: Any) -> Scores:
        return Scores(self.log_prob[index], self.masked[index])

    def reshape(self, *shape: int) -> Scores:
        """Arrange the runs, the first axis, in another shape."""
        tail = self.log_prob.shape[-2:]
        return Scores(self.log_prob.reshape(*shape, *tail), self.masked.reshape(*shape, *tail))


@dataclass
class CleanRun:
    """The uncorrupted run.

    Attributes:
        states: what the model saw at each step, ``(S, L)``. S counts steps until nothing is masked.
        final: the last state, ``(L,)``.
        scores: one run, ``(1, S, n)``.
        outputs: at each step whose activations are wanted, each site's output ``(L, d)``.
    """

    states: Tensor
    final: Tensor
    scores: Scores
    outputs: dict[int, dict[Site, Tensor]]

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
        sampler: how the canvas is unmasked, in every run alike.
        window: at which steps around its own a restored run restores.
        commits: ``free``: each run commits what it predicts. ``teacher``: every run commits the true tokens, in the
            clean run's order.
        batch_size: rows of one forward.
    """

    def __init__(
        self,
        backbone: Backbone,
        sequence: Encoded,
        object_length: int,
        *,
        sampler: SamplerConfig,
        window: Window = "from",
        commits: Commits = "free",
        batch_size: int = 32,
    ) -> None:
        self.backbone, self.sequence, self.sampler = backbone, sequence, sampler
        self.window, self.commits, self.batch_size = window, commits, batch_size
        self._canvas = sequence.canvas.to(backbone.device)
        self._scored = sequence.canvas.nonzero().flatten()[:object_length].to(backbone.device)
        self._truth = sequence.ids.to(backbone.device)
        self.forward_rows = 0

    def clean(self, sites: Sequence[Site] = (), keep: Callable[[int], bool] = lambda step: True) -> CleanRun:
        """Make the clean run and keep the outputs of ``sites`` at the steps for which ``keep`` says so.

        Kept activations take ``len(sites) * kept steps * L * d`` values on the model's device.
        """
        loop = self._loop(self.sequence.masked(self.backbone.mask_id)[None], step=0)
        states, log_prob, outputs = [], [], {}
        while not loop.done and self._unfinished(loop.ids):
            wanted = list(sites) if keep(loop.step) else []
            states.append(loop.ids[0])
            with capture(self.backbone, wanted) as found:
                logits = loop.predict()
                self.forward_rows += 1
            outputs[loop.step] = {site: output[0] for site, output in found.items()}
            log_prob.append(self._score(logits))
            before, after = loop.ids, loop.commit(logits)
            if self.commits == "teacher":
                loop.ids = torch.where(before == after, before, self._truth)
        seen = torch.stack(states)
        scores = Scores(
            np.stack(log_prob, axis=1), (seen[:, self._scored] == self.backbone.mask_id).cpu().numpy()[None]
        )
        return CleanRun(seen, loop.ids[0], scores, outputs)

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
            Scores of R runs, in order.
        """
        device, mask_id = self.backbone.device, self.backbone.mask_id
        ids = torch.stack([inputs[draw].ids for draw, _ in runs]).to(device)
        noise = [None if i.noise is None else i.noise.to(device, self.backbone.dtype) for i in inputs]
        log_prob = np.empty((len(runs), clean.steps, len(self._scored)))
        masked = np.empty(log_prob.shape, dtype=bool)
        after = clean.final
        for step in range(clean.steps):
            masked[:, step] = (ids[:, self._scored] == mask_id).cpu().numpy()
            restoring = [self._active(restoration, step) for _, restoration in runs]
            kinds = [(draw, r and r.kind) for (draw, _), r in zip(runs, restoring, strict=True)]
            first, row_of = _distinct(ids, kinds)
            chosen_ids = ids[first]
            scores: list[Floats] = []
            moved: list[Tensor] = []
            for rows in _chunks(first, self.batch_size):
                part = slice(len(moved), len(moved) + len(rows))
                loop = self._loop(chosen_ids[part], step)
                noises = [noise[runs[i][0]] for i in rows]
                hooks = Hooks(
                    self.backbone,
                    self._restoring_hooks(clean, step, loop.ids, [restoring[i] for i in rows]),
                    _noise_hook(noises),
                )
                with hooks:
                    logits = loop.predict()
                self.forward_rows += len(rows)
                scores.append(self._score(logits))
                moved.extend(loop.commit(logits))
            log_prob[:, step] = np.concatenate(scores)[row_of]
            if self.commits == "teacher":
                after = clean.states[step + 1] if step + 1 < clean.steps else clean.final
                ids = torch.where(self._canvas, after, ids)
            else:
                ids = torch.stack(moved)[torch.as_tensor(row_of, device=device)]
            progress(step)
        return Scores(log_prob, masked)

    def places(self, ids: Tensor, role: Role) -> Tensor:
        """Return where a role's activations are in the state ``ids`` ``(L,)``: boolean ``(L,)``, on ids' device."""
        positions = role_positions(self.sequence, ids.cpu(), role, self.backbone.mask_id)
        return (self.backbone.reads_from(positions) if role == "object" else positions).to(ids.device)

    def _active(self, restoration: Restoration | None, step: int) -> Restoration | None:
        return restoration if restoration and in_window(self.window, restoration.step, step) else None

    def _restoring_hooks(
        self, clean: CleanRun, step: int, ids: Tensor, restoring: Sequence[Restoration | None]
    ) -> dict[Site, OutputHook]:
        """Hooks that replace, in each row, the output of its own site at its own positions."""
        by_site: dict[Site, list[tuple[int, Tensor, Tensor]]] = {}
        for row, restoration in enumerate(restoring):
            if restoration is None:
                continue
            if restoration.positions is not None:
                where = restoration.positions.to(ids.device)
            else:
                # Masked in both runs: elsewhere one of them has a token where the other is still predicting one.
                both = torch.where(ids[row] == clean.states[step], ids[row], -1)
                where = self.places(both if restoration.role == "object" else ids[row], restoration.role)
            donor = step if restoration.donors is None else restoration.donors[step]
            value = clean.outputs[donor][restoration.site]
            by_site.setdefault(restoration.site, []).append((row, where, value))
        return {site: _restoring_hook(rows) for site, rows in by_site.items()}

    def _loop(self, ids: Tensor, step: int) -> CommonNoiseLoop:
        loop = CommonNoiseLoop(self.backbone, ids, self.sequence.canvas.expand_as(ids), self.sampler)
        loop.step = step
        return loop

    def _unfinished(self, ids: Tensor) -> bool:
        return bool((self._canvas & (ids == self.backbone.mask_id)).any())

    def _score(self, logits: Tensor) -> Floats:
        """Log-probability of the object's true tokens ``(B, n)``, float64."""
        log_prob = logits[:, self._scored].log_softmax(-1)
        truth = self._truth[self._scored].expand(len(logits), -1)
        return log_prob.gather(-1, truth[..., None])[..., 0].cpu().double().numpy()


def _restoring_hook(rows: Sequence[tuple[int, Tensor, Tensor]]) -> OutputHook:
    def restore(output: Tensor) -> Tensor:
        output = output.clone()
        for row, where, value in rows:
            where = where.to(output.device)  # a model may lie on several devices
            output[row, where] = value[where]
        return output

    return restore


def _noise_hook(noises: Sequence[Tensor | None]) -> Callable[[Tensor, Tensor], Tensor] | None:
    present = [noise for noise in noises if noise is not None]
    if not present:
        return None
    stacked = torch.stack(present)

    def add(ids: Tensor, embedded: Tensor) -> Tensor:
        return embedded + stacked.to(embedded)

    return add


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


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

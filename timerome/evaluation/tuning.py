"""Choosing an edit memory's hyperparameters on a validation split, by forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..diffusion import Estimator, encode, log_likelihood, without_prompt
from ..facts import Fact, FactSet
from ..memory import EditMemory, Gate
from ..progress import SILENT, Progress

GRID: dict[str, tuple[Any, ...]] = {
    "alpha": (0.5, 1.0, 1.5), "ridge": (0.01, 0.1), "sparsity": (0.0, 0.5), "rank": (16, 64),
}  # fmt: skip


class Criterion:
    """Nats between a model and the ideal edit of it; smaller is better, for a memory and for a trained model alike.

    The ideal: a fact to forget is no more likely than where the model is not asked at all (every prompt token masked,
    before any edit), a fact with a new object states it for certain, and every fact to retain is as likely as before.
    To forget further than that is no gain.

    Args:
        backbone: the unedited model.
        edited: facts to forget, or to replace where they have a new object.
        retain: facts that must stay.
        estimator: of the likelihoods.
        samples: mask draws an answer.
        seed: of the draws; the same for every model, so that differences are not noise.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.tuning import Criterion
        >>> from timerome.splits import demo_split
        >>> backbone, split = tr.load("testbed"), demo_split()
        >>> criterion = Criterion(backbone, split.validation_forget[:2], split.validation_retain[:2], samples=2)
        >>> found = criterion(backbone)
        >>> found["shortfall"] > 10, found["lost"]
        (True, 0.0)
    """

    def __init__(
        self,
        backbone: Backbone,
        edited: Sequence[Fact],
        retain: Sequence[Fact],
        *,
        estimator: Estimator = "elbo_sum",
        samples: int = 4,
        seed: int = 0,
    ) -> None:
        self._how: dict[str, Any] = {"estimator": estimator, "samples": samples, "seed": seed}
        answers = [fact.new_object or fact.object for fact in edited]
        self._edited = [encode(backbone, fact, answer=a) for fact, a in zip(edited, answers, strict=True)]
        self._retain = [encode(backbone, fact) for fact in retain]
        self._replaced = torch.tensor([fact.new_object is not None for fact in edited])
        alone = [replace(s, ids=without_prompt(s, backbone.mask_id)) for s in self._edited]
        self.unasked = log_likelihood(backbone, alone, **self._how).log_prob
        self.before = log_likelihood(backbone, self._retain, **self._how).log_prob

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """Measure a model, with whatever is attached to it.

        Returns:
            ``shortfall``, of the edited facts, and ``lost``, of those to retain: means over facts, nats, at least 0.
        """
        now = log_likelihood(backbone, self._edited, **self._how).log_prob
        kept = log_likelihood(backbone, self._retain, **self._how).log_prob
        gap = torch.where(self._replaced, -now, now - self.unasked).clamp(min=0)
        return {"shortfall": float(gap.mean()), "lost": float((self.before - kept).clamp(min=0).mean())}

    def remaining(self, log_prob: Tensor) -> Tensor:
        """How far answers are still above what the model says of them unasked, nats, ``(n,)``."""
        return (log_prob - self.unasked).clamp(min=0)


@dataclass(frozen=True)
class Trial:
    """One configuration and what the validation split said of it.

    Attributes:
        settings: hyperparameters by name.
        shortfall: of the edited facts, nats a fact; see :class:`Criterion`.
        lost: of the facts to retain, nats a fact.
    """

    settings: Mapping[str, Any]
    shortfall: float
    lost: float

    @property
    def score(self) -> float:
        """What is made smallest."""
        return self.shortfall + self.lost


@dataclass(frozen=True)
class Tuning:
    """Every configuration that was tried, in order."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The one with the smallest score, the first of equals."""
        return min(self.trials, key=lambda trial: trial.score)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        rows = [{**t.settings, "shortfall": t.shortfall, "lost": t.lost, "score": t.score} for t in self.trials]
        return {"best": dict(self.best.settings), "trials": rows}


def tune(
    backbone: Backbone,
    facts: FactSet,
    retain: FactSet,
    *,
    negatives: FactSet | None = None,
    grid: Mapping[str, Sequence[Any]] = GRID,
    start: Mapping[str, Any] | None = None,
    samples: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    **fixed: Any,
) -> Tuning:
    """Choose hyperparameters one after another, each at its best value with the others held: no gradient is taken.

    As many memories are built as the grid has values, less one for each hyperparameter after the first.

    Args:
        backbone: the model.
        facts: validation facts to edit. Not those that a number will be reported on.
        retain: validation facts that must stay.
        negatives: what the row gate is calibrated on; None builds memories without a gate.
        grid: values by hyperparameter, searched in this order: any argument of :meth:`EditMemory.build`, and
            ``epsilon`` of the gate.
        start: values to begin with; the first of each in ``grid`` by default.
        samples: mask draws an answer (``elbo_sum``).
        seed: of the draws.
        progress: shows how far it is.
        fixed: further arguments of :meth:`EditMemory.build`.

    Returns:
        All trials; ``.best.settings`` is what to build with.

    Raises:
        ValueError: facts are in more than one of the sets, or the grid is empty or names no hyperparameter.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.tuning import tune
        >>> from timerome.splits import demo_split
        >>> split = demo_split()
        >>> found = tune(
        ...     tr.load("testbed"), split.validation_forget[:1], split.validation_retain[:1],
        ...     grid={"alpha": (0.25, 1.0)}, samples=2, coordinate=tr.Coordinate(3), rank=4,
        ... )
        >>> sorted(trial.settings["alpha"] for trial in found.trials)
        [0.25, 1.0]
    """
    _check(facts, retain, negatives, grid)
    criterion = Criterion(backbone, facts, retain, samples=samples, seed=seed)
    current = {name: values[0] for name, values in grid.items()} | dict(start or {})
    trials: dict[tuple[Any, ...], Trial] = {}
    total = sum(len(values) for values in grid.values()) - len(grid) + 1
    with (progress or SILENT).task("tune", total) as step:
        for name, values in grid.items():
            for value in values:
                settings = current | {name: value}
                key = tuple(settings.values())
                if key not in trials:
                    trials[key] = _trial(backbone, facts, negatives, criterion, settings, fixed)
                    step(1)
            axis = [trials[tuple((current | {name: value}).values())] for value in values]
            current = dict(min(axis, key=lambda trial: trial.score).settings)
    return Tuning(tuple(trials.values()))


def _trial(
    backbone: Backbone,
    facts: FactSet,
    negatives: FactSet | None,
    criterion: Criterion,
    settings: dict[str, Any],
    fixed: dict[str, Any],
) -> Trial:
    chosen = {**fixed, **settings}
    epsilon = chosen.pop("epsilon", None)
    gate = None if negatives is None else Gate(negatives, epsilon=epsilon)
    memory = EditMemory.build(backbone, facts, gate=gate, **chosen)
    with memory.attached(backbone):
        found = criterion(backbone)
    return Trial(settings, **found)


def _check(facts: FactSet, retain: FactSet, negatives: FactSet | None, grid: Mapping[str, Sequence[Any]]) -> None:
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"tune: expected values for at least one hyperparameter, got {dict(grid)}.")
    if negatives is None and "epsilon" in grid:
        raise ValueError("tune: epsilon is the gate's; give negatives to calibrate one on.")
    sets = {"facts": facts, "retain": retain, "negatives": negatives or FactSet([])}
    names = list(sets)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if shared := sorted(set(sets[a].ids) & set(sets[b].ids)):
                raise ValueError(f"tune: {shared[:5]} are in both {a} and {b}; what is chosen on must be apart.")

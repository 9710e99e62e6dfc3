"""Choosing the hyperparameters of an edit memory on validation facts, by forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..backbones import Backbone
from ..diffusion import Encoded, Estimator, encode, log_likelihood, without_prompt
from ..diffusion.states import answer_tokens
from ..facts import Fact
from ..memory import EditMemory, Ridge, paper_memory
from ..progress import SILENT, Progress

GRID: dict[str, tuple[float, ...]] = {"alpha": (0.5, 1.0, 1.5), "ridge": (0.01, 0.1), "sparsity": (0.0, 0.5)}


class Criterion:
    """Nats between a model and the ideal edit of it; smaller is better, for a memory and for a trained model alike.

    The ideal: a fact to forget is no more likely than where the model is not asked at all (every prompt token masked,
    before any edit), a fact with a new object states it for certain, and every fact to retain is as likely as before.
    To forget further than that is no gain.

    Args:
        backbone: the unedited model.
        edited: facts to forget, or to replace where they have a new object: validation facts, not those that a number
            will be reported on.
        retain: validation facts that must stay.
        estimator: of the likelihoods.
        samples: mask draws an answer.
        seed: of the draws; the same for every model, so that differences are not noise.

    Raises:
        ValueError: a fact is to be edited and to stay.

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
        if shared := sorted({fact.id for fact in edited} & {fact.id for fact in retain}):
            raise ValueError(f"Criterion: {shared[:5]} are in both edited and retain; what is chosen on must be apart.")
        self.backbone, self.edited = backbone, list(edited)
        self._how: dict[str, Any] = {"estimator": estimator, "samples": samples, "seed": seed}
        self._edited = [self._asked(fact) for fact in edited]
        self._retain = [encode(backbone, fact) for fact in retain]
        self._replaced = torch.tensor([fact.new_object is not None for fact in edited])
        alone = [replace(s, ids=without_prompt(s, backbone.mask_id)) for s in self._edited]
        self.unasked = log_likelihood(backbone, alone, **self._how).log_prob
        self.before = log_likelihood(backbone, self._retain, **self._how).log_prob

    def _asked(self, fact: Fact) -> Encoded:
        if fact.new_object is None or self.backbone.eos_id is None:
            return encode(self.backbone, fact, answer=fact.new_object or fact.object)
        # What cannot be said is not edited: the canvas holds both answers.
        canvas = max(len(answer_tokens(self.backbone, fact, a, fact.prompt)) for a in (fact.object, fact.new_object))
        return encode(self.backbone, fact, answer=fact.new_object, canvas=canvas)

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """Measure a model, with whatever is attached to it.

        Returns:
            ``shortfall``, of the edited facts, and ``lost``, of those to retain: means over facts, nats, at least 0.
        """
        now = log_likelihood(backbone, self._edited, **self._how).log_prob
        kept = log_likelihood(backbone, self._retain, **self._how).log_prob
        gap = torch.where(self._replaced, -now, now - self.unasked).clamp(min=0)
        return {"shortfall": float(gap.mean()), "lost": float((self.before - kept).clamp(min=0).mean())}


@dataclass(frozen=True)
class Trial:
    """One method and what the validation facts said of it.

    Attributes:
        method: what was tried.
        settings: those of its hyperparameters that are searched.
        shortfall: of the edited facts, nats a fact; see :class:`Criterion`.
        lost: of the facts to retain, nats a fact.
    """

    method: Ridge
    settings: Mapping[str, Any]
    shortfall: float
    lost: float

    @property
    def score(self) -> float:
        """What is made smallest."""
        return self.shortfall + self.lost


@dataclass(frozen=True)
class Tuning:
    """Every method that was tried, in order."""

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
    criterion: Criterion,
    *,
    method: Ridge | None = None,
    at: Any = None,
    gated: bool = True,
    grid: Mapping[str, Sequence[Any]] = GRID,
    progress: Progress | None = None,
) -> Tuning:
    """Choose hyperparameters one after another, each at its best value with the others held: no gradient is taken.

    As many memories are built as the grid has values, less one for each hyperparameter after the first.

    Args:
        criterion: what is made small, on which facts, of which model.
        method: what does not differ between trials; by default ``lens`` targets where all facts have a new object, and
            ``null`` otherwise.
        at: where, see :meth:`timerome.EditMemory.replace`.
        gated: False tunes :func:`timerome.paper_memory`.
        grid: values by hyperparameter, fields of :class:`timerome.Ridge`, searched in this order.
        progress: shows how far it is.

    Returns:
        All trials; ``.best.method`` is what to edit with.

    Raises:
        ValueError: the grid is empty, or names something that the method does not have.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.tuning import Criterion, tune
        >>> from timerome.splits import demo_split
        >>> split = demo_split()
        >>> facts = Criterion(tr.load("testbed"), split.validation_forget[:1], split.validation_retain[:1], samples=2)
        >>> found = tune(facts, method=tr.Ridge("null", rank=4), at=3, grid={"alpha": (0.25, 1.0)})
        >>> sorted(trial.settings["alpha"] for trial in found.trials)
        [0.25, 1.0]
    """
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"tune: expected values for at least one hyperparameter, got {dict(grid)}.")
    if unknown := sorted(set(grid) - {field.name for field in fields(Ridge)}):
        raise ValueError(f"tune: expected hyperparameters among the fields of Ridge, got {unknown}.")
    replaced = all(fact.new_object is not None for fact in criterion.edited)
    method = method or Ridge("lens" if replaced else "null")
    current = {name: values[0] for name, values in grid.items()}
    trials: dict[tuple[Any, ...], Trial] = {}
    total = sum(len(values) for values in grid.values()) - len(grid) + 1
    with (progress or SILENT).task("tune", total) as step:
        for name, values in grid.items():
            for value in values:
                settings = current | {name: value}
                key = tuple(settings.values())
                if key not in trials:
                    one = replace(method, **settings)
                    with _memory(criterion, one, at, gated).attached():
                        trials[key] = Trial(one, settings, **criterion(criterion.backbone))
                    step(1)
            axis = [trials[tuple((current | {name: value}).values())] for value in values]
            current = dict(min(axis, key=lambda trial: trial.score).settings)
    return Tuning(tuple(trials.values()))


def _memory(criterion: Criterion, method: Ridge, at: Any, gated: bool) -> EditMemory:
    if not gated:
        return paper_memory(criterion.backbone, criterion.edited, at=at, method=method)
    memory = EditMemory(criterion.backbone)
    if method.targets in ("lens", "donor"):
        memory.replace(criterion.edited, method=method, at=at)
    else:
        memory.forget(criterion.edited, answer=None, method=method, at=at)
    return memory

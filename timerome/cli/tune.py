"""``timerome tune``."""

from __future__ import annotations

from typing import Annotated, Any

from ..coordinates import Coordinate
from ..evaluation.tuning import GRID, Criterion
from ..evaluation.tuning import tune as search
from ..facts import FactSet
from ..memory import Ridge
from ..progress import Progress
from ._reading import Model
from ._showing import table


def run(
    progress: Progress,
    /,
    facts: FactSet,
    retain: FactSet,
    model: Model,
    fixed: Annotated[dict[str, Any], Ridge, "alpha", "ridge", "sparsity", "rank", "states"],
    alpha: tuple[float, ...] = (),
    ridge: tuple[float, ...] = (),
    sparsity: tuple[float, ...] = (),
    rank: tuple[int, ...] = (),
    at: Coordinate | None = None,
    answer: str | None = None,
    paper: bool = False,
    samples: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Choose the hyperparameters of --method ridge on validation facts, one after another, by forward passes alone.

    What is made small: nats by which facts are short of being edited, plus nats that facts to retain lose. Take
    validation facts: those that a number will be reported on must not choose.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set: validation facts to edit.
        retain: the same of facts that must stay.
        model: which model.
        fixed: what is not searched.
        alpha: strengths to try.
        ridge: ridge penalties to try.
        sparsity: shares of entries left out to try.
        rank: keys a fact to try.
        at: where: a layer, a site such as mlp.3, a coordinate, or a trace.safetensors, whose best one is taken.
        answer: text that every fact shall be answered with; by default a fact's own new_object, or it is forgotten.
        paper: tune the paper's form.
        samples: mask draws an answer.
        seed: of the draws.
    """
    grid = {k: v for k, v in (("alpha", alpha), ("ridge", ridge), ("sparsity", sparsity), ("rank", rank)) if v}
    edited = facts if answer is None else facts.with_new_object(answer)
    replaced = all(fact.new_object is not None for fact in edited)
    method = Ridge(**{"targets": "lens" if replaced else "null", **fixed})
    criterion = Criterion(model.load(), edited, retain, samples=samples, seed=seed)
    found = search(criterion, method=method, at=at, gated=not paper, grid=grid or GRID, progress=progress)
    rows = [
        (", ".join(f"{k} {v:g}" for k, v in t.settings.items()), f"{t.shortfall:.2f}", f"{t.lost:.2f}",
         f"{t.score:.2f}{' *' if t is found.best else ''}")
        for t in found.trials
    ]  # fmt: skip
    table("nats a fact; * is chosen", ("settings", "short of the edit", "retained lost", "sum"), rows)
    return found.to_dict()

"""``timerome tune``."""

from __future__ import annotations

from typing import Any, Literal

from ..progress import Progress
from .console import load_model, read_facts, table


def tune(
    progress: Progress,
    facts: str,
    retain: str,
    negatives: str | None = None,
    model: str = "testbed",
    replace: str | None = None,
    estimator: Literal["null", "corrupt", "lens", "donor"] | None = None,
    layer: int | None = None,
    module: Literal["block", "attn", "mlp"] = "block",
    role: Literal["subject_last", "subject", "object", "prompt"] = "object",
    alpha: list[float] | None = None,
    ridge: list[float] | None = None,
    sparsity: list[float] | None = None,
    rank: list[int] | None = None,
    epsilon: list[float] | None = None,
    samples: int = 4,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Choose an edit's hyperparameters on validation facts, one after another, by forward passes alone.

    What is made small: nats by which facts are short of being edited, plus nats that facts to retain lose. Take
    validation facts: those that a number will be reported on must not choose.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set: validation facts to edit.
        retain: the same of facts that must stay.
        negatives: facts that the row gate is calibrated on; without them there is no gate.
        model: testbed, a folder, or a Hub id.
        replace: text that every fact shall be answered with instead; by default a fact's own new_object, or forgetting.
        estimator: of target activations; by what is wanted, if not given.
        layer: block to edit; by what is wanted, if not given.
        module: which part of it.
        role: which positions.
        alpha: strengths to try, as a list.
        ridge: ridge penalties to try.
        sparsity: shares of entries left out to try.
        rank: keys a fact to try.
        epsilon: false-trigger rates of the gate to try.
        samples: mask draws an answer.
        seed: of the draws.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    from ..coordinates import Coordinate
    from ..evaluation.tuning import GRID
    from ..evaluation.tuning import tune as run

    given = {"alpha": alpha, "ridge": ridge, "sparsity": sparsity, "rank": rank, "epsilon": epsilon}
    grid = {k: tuple(v) for k, v in given.items() if v} or dict(GRID)
    edited = read_facts(facts)
    fixed: dict[str, Any] = {} if estimator is None else {"estimator": estimator}
    if layer is not None:
        fixed["coordinate"] = Coordinate(layer, module, role=role)
    found = run(
        load_model(model, device, trust_remote_code),
        edited if replace is None else edited.with_new_object(replace),
        read_facts(retain),
        negatives=None if negatives is None else read_facts(negatives),
        grid=grid,
        samples=samples,
        seed=seed,
        progress=progress,
        **fixed,
    )
    rows = [
        (", ".join(f"{k} {v:g}" for k, v in t.settings.items()), f"{t.shortfall:.2f}", f"{t.lost:.2f}",
         f"{t.score:.2f}{' *' if t is found.best else ''}")
        for t in found.trials
    ]  # fmt: skip
    table("nats a fact; * is chosen", ("settings", "short of the edit", "retained lost", "sum"), rows)
    return found.to_dict()

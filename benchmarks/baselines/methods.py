"""The trained baselines by name, and the grid each is tuned on: as many configurations for one as for another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import timerome as tr
from timerome.facts import Fact, FactSet
from timerome.splits import DemoSplit

from .training import Budget, Criterion, Trained, train
from .weight_editing import edit_weights

Config = dict[str, Any]


def grid(**axes: Sequence[Any]) -> list[Config]:
    """Every combination of the axes."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


RATES = (5e-4, 1.5e-3)
WINDOWS = ((0, 1, 2), (2, 3, 4))
GRIDS: dict[str, list[Config]] = {
    "gradient_ascent": grid(lr=(1e-4, 3e-4, 1e-3, 3e-3)),
    "gradient_difference": grid(lr=RATES, retain=(1.0, 4.0)),
    "npo": grid(lr=RATES, beta=(0.1, 0.5), retain=(1.0,)),
    "simnpo": grid(lr=RATES, beta=(1.0, 4.0), retain=(1.0,)),
    "masked_diffusion_unlearning": grid(lr=RATES, tau=(0.0, 1.0), retain=(1.0,)),
    "lora": grid(lr=(3e-3, 1e-2), rank=(4, 16), retain=(1.0,)),
    "memit_full_mask": grid(window=WINDOWS, clamp=(0.75, 3.0), partial=(False,), weight=(1.0,)),
    "memit_partial_mask": grid(window=WINDOWS, clamp=(0.75, 3.0), partial=(True,), weight=(1.0,)),
    "alphaedit": grid(window=WINDOWS, clamp=(3.0,), partial=(True,), threshold=(1e-3, 1e-2)),
}
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHT_EDITING = ("memit_full_mask", "memit_partial_mask", "alphaedit")


def retain_rows(split: DemoSplit) -> FactSet:
    """What trained methods may keep."""
    return split.protect + split.retain


def fit(
    name: str, config: Config, backbone: tr.Backbone, forget: FactSet, retain: FactSet, budget: Budget,
    criterion: Criterion,
) -> Trained:  # fmt: skip
    """Apply a method with one configuration to ``forget``; methods that write an answer write the refusal."""
    facts: Sequence[Fact] = forget
    if name == "lora" or name in WEIGHT_EDITING:
        facts = forget.with_new_object(tr.REFUSAL)
    if name in WEIGHT_EDITING:
        return edit_weights(backbone, config, facts, retain[:80], seed=budget.seed)
    return train(backbone, name, config, facts, retain, budget, criterion)

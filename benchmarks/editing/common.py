"""What the measuring scripts of edits share: the settings measured, decoding with who got which edit, and records."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

import timerome as tr
from benchmarks.results import Results, about

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 8, 96  # canvases: of relation facts, and of TOFU answers


def decode(
    backbone: tr.Backbone, prompts: Sequence[str], canvas: int, steps: int, memory: tr.EditMemory | None = None
) -> list[str]:
    """Decode prompts greedily by low-confidence unmasking."""
    config = tr.SamplerConfig(steps=steps)
    if memory is None:
        return tr.generate(backbone, prompts, canvas=canvas, config=config)
    with memory.attached(backbone):
        return tr.generate(backbone, prompts, canvas=canvas, config=config)


def exact(text: str, wanted: str) -> bool:
    """Whether a decoded text is the wanted one, white space and letter case aside."""
    return " ".join(text.split()).casefold() == " ".join(wanted.split()).casefold()


def rate(count: int, n: int, name: str = "count") -> dict[str, Any]:
    """A share with its exact 95 % binomial interval (Clopper, Pearson 1934)."""
    if not n:
        return {name: count, "n": n, "share": math.nan, "interval": [0.0, 1.0]}
    interval = binomtest(count, n).proportion_ci(method="exact")
    return {name: count, "n": n, "share": count / n, "interval": [interval.low, interval.high]}


def start(name: str, **options: Any) -> tuple[tr.Backbone, Results, argparse.Namespace]:
    """Read a script's command line (``options`` with their defaults), load the model, open its results file.

    Rows of the file that are there already are not measured again.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--model", default="testbed")
    for option, default in options.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tr.load(arguments.model)
    return backbone, Results(arguments.out, about(backbone, seed=0)), arguments

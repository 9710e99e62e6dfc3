"""What the measuring scripts of edits share: the settings measured, decoding with who got which edit, and records."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

import timerome as tr
from benchmarks.results import Results, about
from timerome.memory.address import Reading, addresses
from timerome.splits import EditingSplit, editing_split

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 8, 96  # canvases: of relation facts, and of TOFU answers
# Chosen on validation facts.
SETTINGS: dict[str, Any] = {"estimator": "lens", "alpha": 1.5, "sparsity": 0.0, "margin": 12.0}
GATE: dict[str, Any] = {"epsilon": None}
REVEAL = (0.0, 0.3, 0.6, 0.9)
DROPOUT = (0.0, 0.2, 0.4)
# What is enough of a bank for an address, which is read in fully masked states only.
STATES: dict[str, Any] = {"reveal": (0.0,), "prompt_dropout": (0.0,), "trajectory": False}


def bank(canvas: int, **more: Any) -> tr.BankConfig:
    """The state bank of facts answered on a canvas."""
    return tr.BankConfig(**{
        "canvases": (None, canvas), "reveal": REVEAL, "prompt_dropout": DROPOUT, "trajectory": True, **more,
    })  # fmt: skip


def build(
    backbone: tr.Backbone, facts: Sequence[tr.Fact], split: EditingSplit, canvas: int, **more: Any
) -> tuple[tr.EditMemory, float]:
    """Build a memory with the measured settings, some of them changed; return it and the CPU seconds it took."""
    gate = tr.Gate(split.calibrate, **{**GATE, "related": split.related, **more.pop("gate", {})})
    begin = time.process_time()
    settings = {**SETTINGS, "bank": bank(canvas), **more}
    memory = tr.EditMemory.build(backbone, facts, gate=gate, **settings)
    return memory, time.process_time() - begin


def gate_rules(backbone: tr.Backbone) -> dict[str, Any]:
    """The gate's own settings as they are where nothing is said: what rows of a results file depend on."""
    gate = tr.Gate(editing_split().calibrate).resolved(backbone)
    return {name: getattr(gate, name) for name in ("layer", "span", "naming", "same_subject")}


def decode(
    backbone: tr.Backbone, prompts: Sequence[str], canvas: int, steps: int, memory: tr.EditMemory | None = None
) -> list[str]:
    """Decode prompts greedily by low-confidence unmasking."""
    config = tr.SamplerConfig(steps=steps)
    if memory is None:
        return tr.generate(backbone, prompts, canvas=canvas, config=config)
    with memory.attached(backbone):
        return tr.generate(backbone, prompts, canvas=canvas, config=config)


def readings(backbone: tr.Backbone, memory: tr.EditMemory, prompts: Sequence[str], canvas: int) -> Iterator[Reading]:
    """Yield what prompts on a canvas are addressed by, some hundred at a time."""
    book = memory.book
    assert book is not None
    tokens = [torch.tensor(backbone.encode(prompt)) for prompt in prompts]
    ids = [torch.cat([t, torch.full((canvas,), backbone.mask_id)]) for t in tokens]
    places = [torch.arange(len(i)) >= len(t) for i, t in zip(ids, tokens, strict=True)]
    for start in range(0, len(ids), 512):
        part = slice(start, start + 512)
        yield addresses(backbone, ids[part], places[part], book.site, book.span)


def owners(backbone: tr.Backbone, memory: tr.EditMemory, prompts: Sequence[str], canvas: int) -> list[int]:
    """Return which fact each prompt is given on a canvas, -1 for none."""
    assert memory.book is not None
    return [i for reading in readings(backbone, memory, prompts, canvas) for i in memory.book.lookup(reading).tolist()]


def exact(text: str, wanted: str) -> bool:
    """Whether a decoded text is the wanted one, white space and letter case aside."""
    return " ".join(text.split()).casefold() == " ".join(wanted.split()).casefold()


def unchanged(
    backbone: tr.Backbone, memory: tr.EditMemory, prompts: Sequence[str], canvas: int, steps: int
) -> dict[str, Any]:
    """Share of prompts whose decoded text is the same with the memory as without.

    Only prompts that are given an edit are decoded: the forwards of all others are left alone bit for bit, which
    tests/memory/test_attachment.py holds the library to.
    """
    given = owners(backbone, memory, prompts, canvas)
    edited = [prompt for prompt, owner in zip(prompts, given, strict=True) if owner >= 0]
    changed = 0
    if edited:
        before = decode(backbone, edited, canvas, steps)
        after = decode(backbone, edited, canvas, steps, memory)
        changed = sum(a != b for a, b in zip(before, after, strict=True))
    return {"agreement": 1 - changed / len(prompts), "fired": len(edited), **rate(changed, len(prompts), "changed")}


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


def renewed(backbone: tr.Backbone, memory: tr.EditMemory, facts: Sequence[tr.Fact], **settings: Any) -> tr.EditMemory:
    """Return a memory of other facts with the same settings, gate and what was read of its negatives."""
    fresh = tr.EditMemory(
        memory.settings, background=memory.background, fingerprint=memory.fingerprint, tokenizer=memory.tokenizer
    )
    fresh.update(facts, backbone=backbone, on_conflict="error", **settings)
    return fresh

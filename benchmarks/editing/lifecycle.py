"""Edits that come and go: 400 made one by one, then 200 undone; writes JSON and a plot.

    python -m benchmarks.editing.lifecycle

Every fact is to be answered by a refusal. Measured on the way: CPU seconds an edit and a denoising step against the
number of edits, whether the first 50 still act after the last, what held-out facts lose. Undone are 200 edits in an
order drawn once; after each, its fact's log-probability is compared with the unedited model's, and at the end the
memory with one built afresh of the facts that are left.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import timerome as tr
from timerome.diffusion import encode, log_likelihood
from timerome.splits import scaling_split

from .common import decode, exact, start

COUNTS = (1, 10, 50, 100, 200, 300, 400)


def seconds_a_step(backbone: tr.Backbone, prompts: list[str]) -> float:
    """Median CPU seconds of a denoising step of eight prompts."""
    times = []
    for _ in range(5):
        begin = time.process_time()
        tr.generate(backbone, prompts, canvas=32, config=tr.SamplerConfig(steps=8))
        times.append((time.process_time() - begin) / 8)
    return statistics.median(times)


def apart(backbone: tr.Backbone, one: tr.EditMemory, other: tr.EditMemory) -> float:
    """Largest difference of logits with two memories of the same facts, on every fourth question."""
    difference = 0.0
    for edit in one.edits[::4]:
        ids = torch.tensor([backbone.encode(edit.fact.prompt) + [backbone.mask_id] * 32])
        outputs = []
        for memory in (one, other):
            with memory.attached(backbone), torch.inference_mode():
                outputs.append(backbone.logits(ids, ids == backbone.mask_id))
        difference = max(difference, float((outputs[0] - outputs[1]).abs().max()))
    return difference


def refit(backbone: tr.Backbone) -> dict[str, Any]:
    """60 edits made one by one, 30 undone; the memory against refits of the facts left, made in two ways."""

    def one_by_one(some: list[tr.Fact]) -> tr.EditMemory:
        memory = tr.EditMemory(backbone)
        for fact in some:
            memory.forget(fact)
        return memory

    memory = one_by_one(list(scaling_split(400).forget[:60]))
    memory.undo(*random.Random(0).sample([edit.id for edit in memory.edits], 30))
    left = [edit.fact for edit in memory.edits]
    return {
        "one by one": apart(backbone, memory, one_by_one(left)),
        "all together": apart(backbone, memory, tr.EditMemory.build(backbone, left)),
    }  # fmt: skip


def measure(backbone: tr.Backbone, n_facts: int) -> dict[str, Any]:
    """Insert, undo, compare."""
    split = scaling_split(400)
    facts = split.forget[:n_facts]
    held, first = split.held_out, facts[:50]
    step_prompts = [fact.prompt for fact in held[:8]]

    def log_prob(some: Any) -> torch.Tensor:
        return log_likelihood(
            backbone, [encode(backbone, f, answer=f.object) for f in some], estimator="onestep"
        ).log_prob

    def success(memory: tr.EditMemory) -> float:
        texts = decode(backbone, [fact.prompt for fact in first], 32, 8, memory)
        return statistics.fmean(exact(text, tr.REFUSAL) for text in texts)

    before, plain = log_prob(held), seconds_a_step(backbone, step_prompts)
    memory = tr.EditMemory(backbone)
    rows, edits, early = [], [], float("nan")
    for n, fact in enumerate(facts, 1):
        begin = time.process_time()
        memory.forget(fact)
        edits.append(time.process_time() - begin)
        if n in COUNTS:
            with memory.attached(backbone):
                step = seconds_a_step(backbone, step_prompts)
                change = log_prob(held) - before
            early = success(memory) if n == 50 else early
            rows.append({
                "edits": n, "cpu_seconds_an_edit": statistics.median(edits[-20:]),
                "cpu_seconds_a_step": step, "cpu_seconds_a_step_plain": plain,
                "held_out_change_nats": float(change.mean()), "held_out_worst_nats": float(change.min()),
                "bytes": memory.nbytes,
            })  # fmt: skip
            print(rows[-1], flush=True)
    first_50 = {"after_50": early, "after_the_last": success(memory), "in_force": len(memory.edits)}

    order = random.Random(0).sample([edit.id for edit in memory.edits], min(200, len(facts) // 2))
    unedited = dict(zip(facts.ids, log_prob(facts).tolist(), strict=True))
    off, another = [], 0
    for name in order:
        fact = next(edit.fact for edit in memory.edits if edit.id == name)
        memory.undo(name)
        with memory.attached(backbone) as attachment:
            off.append(abs(float(log_prob([fact])) - unedited[fact.id]))
        another += bool(attachment.hits)  # another edit in force answers for this one's question
    again = tr.EditMemory.build(backbone, [edit.fact for edit in memory.edits])
    undone = {
        "edits": len(order), "restored_to_1e-3_nat": sum(nats <= 1e-3 for nats in off),
        "answered_by_another_edit": another, "refit_logits_differ_by": apart(backbone, memory, again),
    }  # fmt: skip
    return {"edits": rows, "first_50": first_50, "undone": undone}


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Cost against the number of edits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    counts = [row["edits"] for row in rows]
    for axis, name, label in zip(
        figure.subplots(1, 2),
        ("cpu_seconds_an_edit", "cpu_seconds_a_step"),
        ("an edit", "a denoising step"),
        strict=True,
    ):
        taken = [(n, 1000 * row[name]) for n, row in zip(counts, rows, strict=True)]
        axis.plot(*zip(*taken, strict=True), "o-", color="black", label="with the memory")
        if name == "cpu_seconds_a_step":
            axis.axhline(1000 * rows[0]["cpu_seconds_a_step_plain"], color="grey", linestyle="--", label="without")
            axis.legend()
        axis.set(xlabel="edits", ylabel=f"CPU ms, {label}", ylim=(0, 1.15 * max(ms for _, ms in taken)))
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    backbone, results, arguments = start("lifecycle", facts=400)
    depends = {"gate": "answer", "facts": arguments.facts}
    found = results.row("400 made, 200 undone", depends, lambda: measure(backbone, arguments.facts))
    print(results.row("60 made, 30 undone, refit", depends, lambda: refit(backbone)), flush=True)
    print(found["first_50"], found["undone"], flush=True)
    plot(results.path, found["edits"])


if __name__ == "__main__":
    main()

"""What the demo reports, under the names of its JSON file."""

from __future__ import annotations

import statistics as stats
from collections.abc import Iterable, Mapping
from typing import Any

from ..coordinates import Coordinate, Site
from ..evaluation import Comparison, Evaluation, compare
from ..memory import EditMemory, Placed

RETAIN = ("held_out", "held_out_relations")
SETS = ("forget", "paraphrase", *RETAIN, "held_out_unknown")
Evaluations = dict[str, Evaluation]


def paired(before: Evaluation, after: Evaluation) -> Comparison:
    """Compare on what both have."""
    return compare(before.only(after.per_fact("log_prob"), text=bool(after.protocol.canvas)), after)


def results_of(memory: EditMemory, before: Evaluations, after: Evaluations, seconds: float) -> dict[str, Any]:
    """Return the results of one memory; ``"decoded"`` of ``after`` is the part of the held-out facts that is."""
    pairs = {name: paired(before[name], after[name]) for name in SETS}
    retain = [delta for name in RETAIN for delta in pairs[name].deltas.values()]
    decoded = [paired(before["held_out"], after["decoded"])] if "decoded" in after else [pairs[n] for n in RETAIN]
    same = [a == b for pair in decoded for a, b in zip(pair.before.texts(), pair.after.texts(), strict=True)]
    forget, others = after["forget"], after["paraphrase"]
    return {
        "forget": _moved(pairs["forget"], pairs["forget"].highest),
        "paraphrase": _moved(pairs["paraphrase"], pairs["paraphrase"].highest),
        "retain": {
            "delta_logprob_nats": stats.fmean(retain),
            "worst_delta_nats": min(retain),
            "n": len(retain),
            "sets": {
                name: _moved(pairs[name], pairs[name].lowest) | {"text_unchanged": pairs[name].unchanged}
                for name in (*RETAIN, "held_out_unknown")
            },
        },
        "generation": {
            "forget_rougeL": _mean([forget], "rouge_recall"),
            "forget_rougeL_before": _mean([before["forget"]], "rouge_recall"),
            "paraphrase_rougeL": _mean([others], "rouge_recall"),
            "retain_rougeL": _mean([p.after for p in decoded], "rouge_recall"),
            "retain_rougeL_before": _mean([p.before for p in decoded], "rouge_recall"),
            "retain_unchanged": stats.fmean(same),
            "retain_n": sum(len(pair.deltas) for pair in decoded),
            "forget_distinct1": _mean([forget], "distinct1"),
            "forget_distinct2": _mean([forget], "distinct2"),
            "forget_repetition": _mean([forget], "repetition"),
            "forget_exact_new": _mean([forget], "exact_new"),
            "paraphrase_exact_new": _mean([others], "exact_new"),
        },
        **_change(memory),
        "seconds": {"build": seconds, "per_fact": seconds / len(memory)},
        "memory_bytes": memory.nbytes,
    }


def _change(memory: EditMemory) -> dict[str, Any]:
    """How the edits are computed. By place: the whole target, nothing dropped, as many as an answer has tokens."""
    changes = [edit.change for edit in memory.edits]
    gate = "none" if memory.edits[0].gate is None else "the old answer is about to be said"
    if isinstance(first := changes[0], Placed):
        rank = max(len(change.targets) for change in changes if isinstance(change, Placed))
        place, values = Coordinate(*Site(first.layer)), (1.0, 0.0, 0.0, rank)
    else:
        rank = max(len(part.keys) for change in changes if not isinstance(change, Placed) for part in change.parts)
        place, values = first.parts[0].coordinate, (first.alpha, first.ridge, first.sparsity, rank)
    named = dict(zip(("alpha", "ridge", "sparsity", "rank"), values, strict=True))
    return {"coordinate": str(place), "method": type(first).__name__.lower(), "gate": gate, **named}


def _moved(pair: Comparison, worst: float) -> dict[str, Any]:
    found = pair.to_dict()["delta_logprob_nats"]
    return {
        "delta_logprob_nats": pair.mean, "worst_delta_nats": worst, "interval": [found["low"], found["high"]],
        "n": found["n"], "edited_rows": pair.after.edited_rows,
    }  # fmt: skip


def _mean(evaluations: Iterable[Evaluation], measure: str) -> float | None:
    values = [value for e in evaluations for value in e.per_fact(measure).values()]
    return stats.fmean(values) if values else None


def texts_of(before: Evaluations, after: Mapping[str, Evaluations]) -> list[dict[str, Any]]:
    """Return decoded texts, one row a wording, before and with each memory that decoded it."""
    rows = []
    for name in SETS:
        for i, score in enumerate(before[name].scores):
            row: dict[str, Any] = {
                "set": name, "id": score.fact_id, "prompt": score.prompt, "answer": score.object, "before": score.text,
                "log_prob_before": score.log_prob,
            }  # fmt: skip
            for variant, evaluations in after.items():
                own = evaluations[name].scores[i]
                row |= {variant: own.text, f"log_prob_{variant}": own.log_prob}
            rows.append(row)
    return rows


_ROWS = (
    ("forget: Δ log-prob, mean, nats", "{:+.1f}", "forget.delta_logprob_nats"),
    ("forget: fact that fell least, nats", "{:+.1f}", "forget.worst_delta_nats"),
    ("paraphrased: Δ log-prob, mean, nats", "{:+.1f}", "paraphrase.delta_logprob_nats"),
    ("held-out: Δ log-prob, mean, nats", "{:+.2f}", "retain.delta_logprob_nats"),
    ("held-out: fact that fell most, nats", "{:+.2f}", "retain.worst_delta_nats"),
    ("held-out: decoded text unchanged", "{:.1%}", "generation.retain_unchanged"),
    ("forget: ROUGE-L recall of decoded text", "{:.2f}", "generation.forget_rougeL"),
    ("paraphrased: ROUGE-L recall", "{:.2f}", "generation.paraphrase_rougeL"),
    ("held-out: ROUGE-L recall", "{:.2f}", "generation.retain_rougeL"),
    ("forget: distinct-2 of decoded text", "{:.2f}", "generation.forget_distinct2"),
    ("forget: repetition of decoded text", "{:.2f}", "generation.forget_repetition"),
    ("forget: decodes the new answer exactly", "{:.1%}", "generation.forget_exact_new"),
    ("seconds to build, a fact", "{:.3f}", "seconds.per_fact"),
    ("memory, bytes", "{:,}", "memory_bytes"),
    ("backward passes", "{}", "backward_passes"),
    ("weights unchanged (hash)", "{}", "weights_unchanged"),
)


def summary_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the main numbers as rows of a table: what, shipped, null, paper mode."""

    def cell(block: Any, pattern: str, path: str) -> str:
        for key in path.split("."):
            block = block[key]
        return "–" if block is None else pattern.format(block)

    blocks = (results, results["null"], results["paper_mode"])
    return [(name, *(cell(block, pattern, path) for block in blocks)) for name, pattern, path in _ROWS]

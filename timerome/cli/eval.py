"""``timerome eval``: facts of one's own, or a benchmark."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..diffusion import SamplerConfig
from ..errors import TimeromeError
from ..evaluation import Comparison, compare, evaluate
from ..evaluation.run import Benchmark, BenchmarkSettings, run_benchmark
from ..evaluation.suites.facts import Wording
from ..facts import FactSet
from ..memory import EditMemory, MemoryState
from ..progress import Progress
from ._reading import Model
from ._showing import say, table, with_interval

_NAMES = {
    "log_prob": "log-probability of the old answer, nats", "rouge_recall": "ROUGE-L recall of the old answer",
    "rouge_f1": "ROUGE-L F1", "exact": "is the old answer", "exact_new": "is the new answer",
    "says_old": "holds the old answer", "distinct1": "distinct-1", "distinct2": "distinct-2",
    "repetition": "repetition",
}  # fmt: skip
_OF_FACTS = ("limit", "estimator", "samples", "seed", "canvas", "steps")
_TEXTS = 10  # of edited facts, and of others that changed, that are shown


def run(
    progress: Progress,
    /,
    model: Model,
    settings: BenchmarkSettings,
    facts: FactSet | None = None,
    benchmark: Benchmark | None = None,
    data: Path | None = None,
    edits: MemoryState | None = None,
    out: Path | None = None,
    wording: Wording = "prompt",
    no_decode: bool = False,
) -> dict[str, Any]:
    """Measure what a model says, without and with edits: about facts of your own, or on a benchmark.

    Facts: log-probability of their answers, and decoded text against them. A benchmark: its own metrics, with paired
    comparisons; a run that was stopped goes on from its folder. Settings that are not given are the benchmark's own.

    Args:
        progress: shows how far it is.
        model: which model.
        settings: how a benchmark is run; of facts, limit, estimator, samples, seed, canvas and steps.
        facts: JSONL file, or a bundled set such as tofu:forget01.
        benchmark: ask a benchmark instead of facts.
        data: folder or file of its records.
        edits: an edit file.
        out: folder for results.json, results.csv and report.html; for a benchmark timerome-eval if not given.
        wording: facts: ask each as it stands, or in each of its other wordings.
        no_decode: facts: measure likelihoods only.
    """
    if (facts is None) == (benchmark is None):
        raise TimeromeError("give either --facts FILE or --benchmark NAME --data PATH.")
    if benchmark is not None and data is None:
        raise TimeromeError(f"--benchmark {benchmark} needs --data, the folder or file with its records.")
    given = {key for key, value in vars(settings).items() if value != getattr(BenchmarkSettings(), key)}
    strange = sorted(given - {*_OF_FACTS}) + ["data"] * (data is not None) if facts is not None else []
    strange += ["wording"] * (wording != "prompt" and facts is None) + ["no_decode"] * (no_decode and facts is None)
    if strange:
        options = ", ".join("--" + key.replace("_", "-") for key in strange)
        raise TimeromeError(f"{options}: only with {'--benchmark' if benchmark is None else '--facts'}.")
    backbone = model.load()
    memory = None if edits is None else EditMemory.of_state(edits, backbone)
    if benchmark is not None and data is not None:
        out = out or Path("timerome-eval")
        report = run_benchmark(
            benchmark, data, backbone, out=out, memory=memory, settings=settings, progress=progress
        )  # fmt: skip
        table(report.title, report.columns(), report.rows())
        say(f"report: {out / 'report.html'}")
        return report.to_dict()
    chosen = (facts or FactSet([]))[: settings.limit]
    how = {k: v for k, v in asdict(settings).items() if k in _OF_FACTS[1:-1] and v is not None}
    if settings.steps is not None:
        how["sampler"] = SamplerConfig(steps=settings.steps, seed=settings.seed or 0)
    how |= {"wording": wording, "decode": not no_decode, "progress": progress}
    before = evaluate(backbone, chosen, label="evaluate" if memory is None else "before", **how)
    if memory is None:
        _show(f"{len(chosen)} facts", before.summary())
        found = {"before": before.to_dict()}
    else:
        comparison = compare(before, evaluate(backbone, chosen, memory=memory, label="after", **how))
        _show(f"{len(chosen)} facts", before.summary(), comparison.after.summary())
        _show_comparison(comparison)
        if out is not None:
            comparison.report().write(out)
            say(f"report: {out / 'report.html'}")
        found = {
            "before": before.to_dict(), "after": comparison.after.to_dict(), "comparison": comparison.to_dict(),
        }  # fmt: skip
    say(f"likelihood: {before.protocol.likelihood}; decoding: {before.protocol.decoding}")
    return found


def _show(title: str, *found: dict[str, dict[str, float | None]]) -> None:
    measures = dict.fromkeys(measure for summary in found for measure in summary)
    rows = [
        (_NAMES[m], *(with_interval(summary[m]) if m in summary else "" for summary in found)) for m in measures
    ]  # fmt: skip
    table(f"{title}, mean [95 % interval]", ("measure", "before", "after")[: 1 + len(found)], rows)


def _show_comparison(found: Comparison) -> None:
    """Print what changed, and a verdict: whether edits do what they are to do, and nothing else."""
    edited: list[tuple[str, str, str]] = []
    others: list[tuple[str, str, str]] = []
    for b, a in zip(found.before.scores, found.after.scores, strict=True):
        if a.edit is not None or a.text != b.text:
            (others if a.edit is None else edited).append((a.prompt, b.text or "", a.text or ""))
    if found.unchanged is not None:
        for title, rows in (("edited facts", edited), ("others that changed", others)):
            if rows:
                table(f"{title}: {min(len(rows), _TEXTS)} of {len(rows)}", ("asked", "before", "after"), rows[:_TEXTS])
    say(f"log-probability, after less before: {found.mean:+.2f} nats, {found.lowest:+.2f} to {found.highest:+.2f}")
    scores = [score for score in found.after.scores if score.edit is not None]
    acted = found.after.edits
    if not scores:
        say("None of these facts is one that the edits are about.")
    else:
        new, old = (sum(1 for s in scores if getattr(s, m) == 1) for m in ("exact_new", "says_old"))
        texts = f"; {new} texts are the new answer, {old} hold the old one" if found.unchanged is not None else ""
        say(f"edits: {sum(acted.values())} of {len(acted)} acted{texts}")
        if silent := [name for name, did in acted.items() if not did]:
            say(f"edits that did not act: {', '.join(silent)}")
    if found.locality is not None:
        kept = len(found.after.scores) - len(scores)
        say(f"facts no edit is about: {found.locality:.1%} of {kept} texts unchanged")

"""``timerome eval``: facts of one's own, or a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..progress import Progress
from .console import load_memory, load_model, read_facts, say, table, with_interval

_NAMES = {
    "log_prob": "log-probability of the answer, nats", "rouge_recall": "ROUGE-L recall", "rouge_f1": "ROUGE-L F1",
    "exact": "exact match", "exact_new": "exact match with the new answer", "distinct1": "distinct-1",
    "distinct2": "distinct-2", "repetition": "repetition",
}  # fmt: skip


def evaluate(
    progress: Progress,
    facts: str | None = None,
    benchmark: Literal["tofu", "rwku", "counterfact", "zsre", "knowedit"] | None = None,
    data: Path | None = None,
    out: Path = Path("timerome-eval"),
    model: str = "testbed",
    memory: Path | None = None,
    limit: int | None = None,
    wording: Literal["prompt", "paraphrase"] = "prompt",
    estimator: Literal["elbo_sum", "recon_mean", "onestep", "l2r", "pll", "traj"] | None = None,
    samples: int | None = None,
    seed: int | None = None,
    canvas: int | None = None,
    steps: int | None = None,
    no_decode: bool = False,
    split: str | None = None,
    protocol: Literal["own", "mdu", "both"] = "own",
    reference: Path | None = None,
    retain_rows: tuple[int, int] | None = None,
    targets: list[str] | None = None,
    generation: int | None = None,
    only_edited: bool = False,
    retention: int | None = None,
    baselines: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure what a model says, without and with a memory: about facts of your own, or on a benchmark.

    Facts: log-probability of their answers, and decoded text against them. A benchmark: its own metrics, written with
    paired comparisons to a folder; a run that was stopped goes on from there. Settings that are not given are the
    benchmark's own.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01.
        benchmark: ask a benchmark instead of facts.
        data: folder or file of its records.
        out: folder for its results.json, results.csv and report.html.
        model: testbed, a folder, or a Hub id.
        memory: an edit file.
        limit: only so many facts, or so many records of each kind.
        wording: ask each fact as it stands, or in each of its other wordings.
        estimator: of the log-likelihood; elbo_sum for facts.
        samples: mask draws an answer; 16 for facts.
        seed: of the draws; 0 for facts.
        canvas: answer positions that text is decoded on; 64 for facts.
        steps: denoising steps; 16 for facts.
        no_decode: facts: measure likelihoods only.
        split: which of the benchmark's files: TOFU's forget set, KnowEdit's data set.
        protocol: TOFU and RWKU: the benchmark's own, that of masked diffusion unlearning, or both.
        reference: TOFU: a retain-only model's truth ratios, for forget quality.
        retain_rows: TOFU: retain records to ask, first and end: those no edit was built or calibrated with.
        targets: RWKU: only probes about these people, as a list.
        generation: positions for longer texts.
        only_edited: CounterFact, zsRE, KnowEdit: only records whose prompt the memory edits.
        retention: CounterFact, zsRE, KnowEdit: also ask for earlier edits after each of so many counts of edits.
        baselines: benchmarks: also measure random site, paper mode, prompt memory, logit bias and steering.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        ValueError: neither facts nor a benchmark, or both; or a benchmark without data.
    """
    if (facts is None) == (benchmark is None):
        raise ValueError("give either --facts FILE or --benchmark NAME --data PATH.")
    if facts is not None:
        defaults = {"estimator": "elbo_sum", "samples": 16, "seed": 0, "canvas": 64, "steps": 16}
        chosen = {"estimator": estimator, "samples": samples, "seed": seed, "canvas": canvas, "steps": steps}
        how: dict[str, Any] = {k: defaults[k] if v is None else v for k, v in chosen.items()}
        return _facts(progress, facts, model, memory, limit, wording, no_decode, device, trust_remote_code, **how)
    if data is None:
        raise ValueError(f"--benchmark {benchmark} needs --data, the folder or file with its records.")
    from ..evaluation.run import BenchmarkSettings, run_benchmark

    backbone = load_model(model, device, trust_remote_code)
    settings = BenchmarkSettings(
        split, limit, protocol, estimator, samples, seed, canvas, generation, steps, reference, retain_rows,
        tuple(targets) if targets else None, only_edited, retention, baselines,
    )  # fmt: skip
    edits = None if memory is None else load_memory(memory, backbone)
    report = run_benchmark(benchmark, data, backbone, out=out, memory=edits, settings=settings, progress=progress)  # type: ignore[arg-type]
    table(report.title, report.columns(), report.rows())
    say(f"report: {out / 'report.html'}")
    return report.to_dict()


def _facts(
    progress: Progress,
    facts: str,
    model: str,
    memory: Path | None,
    limit: int | None,
    wording: Literal["prompt", "paraphrase"],
    no_decode: bool,
    device: str,
    trust_remote_code: bool,
    *,
    estimator: Literal["elbo_sum", "recon_mean", "onestep", "l2r", "pll", "traj"],
    samples: int,
    seed: int,
    canvas: int,
    steps: int,
) -> dict[str, Any]:
    from ..diffusion import SamplerConfig
    from ..evaluation import compare
    from ..evaluation import evaluate as run

    chosen, backbone = read_facts(facts)[:limit], load_model(model, device, trust_remote_code)
    edits = None if memory is None else load_memory(memory, backbone)
    sampler = SamplerConfig(steps=steps, seed=seed)
    how: dict[str, Any] = {
        "wording": wording, "estimator": estimator, "samples": samples, "seed": seed, "canvas": canvas,
        "sampler": sampler, "decode": not no_decode, "progress": progress,
    }  # fmt: skip
    before = run(backbone, chosen, label="before" if edits else "evaluate", **how)
    result = {"before": before.to_dict()}
    found = [before.summary()]
    if edits is not None:
        after = run(backbone, chosen, memory=edits, label="after", **how)
        comparison = compare(before, after)
        result |= {"after": after.to_dict(), "comparison": comparison.to_dict()}
        found.append(after.summary())
    rows = [(_NAMES[measure], *(with_interval(summary[measure]) for summary in found)) for measure in before.summary()]
    table(f"{len(chosen)} facts, mean [95 % interval]", ("measure", "before", "after")[: 1 + len(found)], rows)
    if edits is not None:
        unchanged = comparison.unchanged
        table("after minus before", ("what", "value"), [
            ("log-probability, mean, nats", f"{comparison.mean:+.2f}"),
            ("lowest fact, nats", f"{comparison.lowest:+.2f}"), ("highest fact, nats", f"{comparison.highest:+.2f}"),
            ("decoded text unchanged", "not decoded" if unchanged is None else f"{unchanged:.1%}"),
        ])  # fmt: skip
    say(f"likelihood: {before.protocol.likelihood}; decoding: {before.protocol.decoding}")
    return result

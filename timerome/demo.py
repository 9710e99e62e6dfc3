"""The demo: trace, edit and evaluate TOFU forget01 on the bundled testbed, into a results folder."""

from __future__ import annotations

import json
import random
import statistics as stats
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ._backend import backend_info
from ._files import write_text
from .backbones import Backbone, load
from .coordinates import Coordinate, Module, Role, Site
from .diffusion import SamplerConfig
from .evaluation import Comparison, Evaluation, WeightsWatch, compare, evaluate
from .facts import FactSet
from .memory import BankConfig, Calibration, EditMemory, Gate
from .memory.targets import EstimatorName
from .progress import SILENT, Progress
from .splits import DemoSplit, demo_split
from .tracing import CausalTracer, TraceResult

CANVAS = 96  # holds every bundled answer, closed with end-of-text


@dataclass(frozen=True)
class Setting:
    """One way to build a memory of the forget set.

    Attributes:
        estimator: of the targets.
        new_object: what every fact is to be answered with; None forgets.
        layer: index of the block; negative ones count from the last.
        module: which part of it.
        role: where keys are read.
        alpha: strength.
        ridge: relative ridge penalty.
        sparsity: share of each row's entries that are dropped.
        rank: most keys a fact.
        beta: weight of protected keys.
        margin: logit lead asked for by ``lens``.
        protect: whether the split's protected facts get target zero.
        gate_layer: where sequences are addressed; None is no gate and one shared memory: paper mode.
        negatives: the gate is calibrated on so many of the split's, evenly over all of them; None takes all.
        apart: whether the gate tells questions about one subject apart, by a floor set on the split's other authors.
        bank: which states give keys.
    """

    estimator: EstimatorName = "lens"
    new_object: str | None = None
    layer: int = -1
    module: Module = "block"
    role: Role = "object"
    alpha: float = 1.0
    ridge: float = 0.01
    sparsity: float = 0.0
    rank: int = 64
    beta: float = 1.0
    margin: float = 8.0
    protect: bool = False
    gate_layer: int | None = 4
    negatives: int | None = None
    apart: bool = False
    bank: BankConfig = field(default_factory=lambda: BankConfig(canvases=(None, CANVAS)))


@dataclass(frozen=True)
class Demo:
    """Everything the demo does, in one place. Hyperparameters were chosen on the validation sets of the split.

    Attributes:
        shipped: the memory that is written to ``edit.safetensors``: replacement by a refusal.
        null: plain forgetting, beside it.
        paper: the paper's form, at the coordinate that the trace finds.
        trace_facts: facts traced.
        trace_steps: denoising steps of the trace.
        trace_draws: noise draws a fact.
        trace_modules: which parts of a block are traced.
        samples: mask draws an answer, of the likelihood.
        seed: of every draw.
        canvas: answer positions for decoding.
        steps: denoising steps for decoding.
        facts: most facts of each set; None is all of them.
        relations: held-out relation facts measured, spread over all of them.
        unknown: held-out questions on unknown authors measured.
        few_texts: held-out facts decoded with the other memories.
        calibrated: the bank over which the gates' negatives are read, whatever the states of an edit: canvases that
            a user may ask on.
        random_sites: random sites that the traced one is compared with.
        site_facts: held-out facts measured there.
    """

    shipped: Setting = Setting(
        "lens",
        new_object="I don't have that information.",
        alpha=1.5,
        ridge=0.1,
        sparsity=0.5,
        margin=12.0,
        bank=BankConfig((None,), reveal=(0.0,)),
    )
    null: Setting = Setting("null", layer=3, sparsity=0.5)
    paper: Setting = Setting("null", sparsity=0.5, rank=16, gate_layer=None)
    trace_facts: int = 6
    trace_steps: int = 4
    trace_draws: int = 2
    trace_modules: tuple[Module, ...] = ("block", "attn", "mlp")
    samples: int = 8
    seed: int = 0
    canvas: int = CANVAS
    steps: int = 16
    facts: int | None = None
    relations: int = 40
    unknown: int = 20
    few_texts: int = 20
    calibrated: BankConfig = BankConfig((None, CANVAS))
    random_sites: int = 2
    site_facts: int = 40


DEMO = Demo()
_SMALL = BankConfig(canvases=(None,), reveal=(0.0, 0.5))
QUICK = Demo(
    shipped=replace(DEMO.shipped, bank=_SMALL),
    null=replace(DEMO.null, bank=_SMALL),
    paper=replace(DEMO.paper, bank=_SMALL),
    trace_facts=2,
    trace_steps=2,
    trace_draws=1,
    trace_modules=("block",),
    samples=2,
    canvas=32,
    steps=4,
    facts=4,
    random_sites=1,
)

RETAIN = ("held_out", "held_out_relations")
SETS = ("forget", "paraphrase", *RETAIN, "held_out_unknown")
Evaluations = dict[str, Evaluation]


def run_demo(
    out: str | Path,
    *,
    progress: Progress | None = None,
    model: str = "testbed",
    facts: int | None = None,
    quick: bool = False,
    config: Demo | None = None,
) -> dict[str, Any]:
    """Trace, edit and evaluate; write the results folder.

    The folder gets ``results.json`` (what is returned), ``report.html`` (one self-contained page), ``texts.jsonl``
    (decoded text before and after), ``tie_heatmap.png`` and ``.csv``, ``trace.safetensors`` and ``edit.safetensors``.
    Every file appears whole or not at all.

    Args:
        out: the folder; made if needed.
        progress: shows how far it is.
        model: the bundled testbed, or the folder of another model that was taught the bundled facts.
        facts: use at most so many facts of each set.
        quick: much smaller settings that only show that everything works.
        config: settings; :data:`DEMO` by default.

    Returns:
        The results: numbers of the shipped memory at the top level, the same under ``null`` and ``paper_mode``.

    Raises:
        ValueError: ``facts`` is less than one.
        OSError: the folder cannot be written.
    """
    from .report import write_report

    if facts is not None and facts < 1:
        raise ValueError(f"run_demo: expected facts of at least 1, got {facts}.")
    config = config or (QUICK if quick else DEMO)
    config = config if facts is None else replace(config, facts=facts)
    progress, out = progress or SILENT, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    backbone, split = load(model), _limited(demo_split(), config)
    with WeightsWatch(backbone) as watch:
        trace, trace_seconds = _trace(backbone, split.forget, config, progress, out)
        before = _evaluate_all(backbone, split, config, progress, "before")
        variants: dict[str, dict[str, Any]] = {}
        after: dict[str, Evaluations] = {}
        coordinate, gates = trace.best(), Gates(backbone, split, config)
        for name, setting, chosen in (
            ("shipped", config.shipped, None),
            ("null", config.null, None),
            ("paper_mode", config.paper, coordinate),
        ):
            with progress.task(f"{name}: calibrate", 1) as step:
                calibration = gates(setting)
                step(1)
            memory, seconds = build(backbone, split, setting, progress, f"{name}: build", chosen, calibration)
            with WeightsWatch(backbone) as own:
                after[name] = _evaluate_all(backbone, split, config, progress, name, memory)
            variants[name] = _block(before, after[name], memory, seconds, split) | {
                "backward_passes": own.backward_passes,
                "weights_unchanged": own.weights_unchanged,
            }
            if name == "shipped":
                memory.save(out / "edit.safetensors")
        variants["paper_mode"]["sites"] = _sites(backbone, split, config, progress, trace, before, after["paper_mode"])
    results = {
        **variants["shipped"],
        "null": variants["null"],
        "paper_mode": variants["paper_mode"],
        "trace": trace.summary() | {"seconds": trace_seconds},
        "backward_passes": watch.backward_passes,
        "weights_unchanged": watch.weights_unchanged,
        "protocol": {
            "likelihood": before["forget"].protocol.likelihood,
            "decoding": before["forget"].protocol.decoding,
            "intervals": "95 %, bootstrap over facts",
            "n": {name: len(e.per_fact("log_prob")) for name, e in before.items()},
        },
        "before": {name: e.summary() for name, e in before.items()},
        "backbone": repr(backbone),
        "settings": asdict(config),
        "versions": _versions(),
    }
    results["seconds"] |= {"trace": trace_seconds, "calibrate": gates.seconds, "total": time.perf_counter() - begin}
    texts = _texts(before, after)
    write_text(out / "texts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
    write_report(out / "report.html", results, texts, heatmap=out / "tie_heatmap.png")
    write_text(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def build(
    backbone: Backbone,
    split: DemoSplit,
    setting: Setting,
    progress: Progress | None = None,
    label: str = "build",
    coordinate: Coordinate | None = None,
    calibration: Calibration | None = None,
) -> tuple[EditMemory, float]:
    """Build the memory of a setting, at ``coordinate`` if one is given; return it and the seconds it took.

    ``calibration`` is that of :class:`Gates`; without one, the gate is calibrated now, over the bank of the edits.
    """
    layer = setting.layer % backbone.n_layers
    facts = split.forget if setting.new_object is None else split.forget.with_new_object(setting.new_object)
    begin = time.perf_counter()
    with (progress or SILENT).task(label, 1) as step:
        memory = EditMemory.build(
            backbone,
            facts,
            coordinate=coordinate or Coordinate(layer, setting.module, 0, setting.role),
            alpha=setting.alpha,
            ridge=setting.ridge,
            sparsity=setting.sparsity,
            rank=setting.rank,
            beta=setting.beta,
            protect=split.protect if setting.protect else None,
            gate=calibration or gate_of(split, setting),
            estimator=setting.estimator,
            margin=setting.margin,
            bank=setting.bank,
        )
        step(1)
    return memory, time.perf_counter() - begin


def gate_of(split: DemoSplit, setting: Setting) -> Gate | None:
    """Return the gate of a setting; None in paper mode."""
    if setting.gate_layer is None:
        return None
    spare = split.calibrate
    few = spare if setting.negatives is None else spare[:: max(1, len(spare) // setting.negatives)]
    related = FactSet(fact for fact in few if fact.id.startswith("tofu-retain")) if setting.apart else None
    return Gate(few, layer=setting.gate_layer, related=related)


class Gates:
    """The gates of some settings, each calibrated once on a model.

    Attributes:
        seconds: what that took so far.
    """

    def __init__(self, backbone: Backbone, split: DemoSplit, config: Demo) -> None:
        self._backbone, self._split, self._config = backbone, split, config
        self._known: list[Calibration] = []
        self.seconds = 0.0

    def __call__(self, setting: Setting) -> Calibration | None:
        """Return the calibration of a setting's gate; None in paper mode."""
        gate = gate_of(self._split, setting)
        if gate is None:
            return None
        for known in self._known:
            if known.gate == gate.resolved(self._backbone):
                return known
        # With what keyed edits need, so that one calibration serves both kinds.
        keyed = Coordinate(self._config.null.layer % self._backbone.n_layers)
        begin = time.perf_counter()
        self._known.append(
            Calibration.of(self._backbone, gate, bank=self._config.calibrated, coordinates=[keyed])
        )  # fmt: skip
        self.seconds += time.perf_counter() - begin
        return self._known[-1]


def summary_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the main numbers as rows of a table: what, shipped, null, paper mode."""
    blocks = (results, results["null"], results["paper_mode"])

    def row(name: str, pattern: str, *path: str) -> tuple[str, str, str, str]:
        cells = []
        for block in blocks:
            value: Any = block
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            cells.append("–" if value is None else pattern.format(value))
        return (name, *cells)  # type: ignore[return-value]

    return [
        row("forget: Δ log-prob, mean, nats", "{:+.1f}", "forget", "delta_logprob_nats"),
        row("forget: fact that fell least, nats", "{:+.1f}", "forget", "worst_delta_nats"),
        row("paraphrased: Δ log-prob, mean, nats", "{:+.1f}", "paraphrase", "delta_logprob_nats"),
        row("held-out: Δ log-prob, mean, nats", "{:+.2f}", "retain", "delta_logprob_nats"),
        row("held-out: fact that fell most, nats", "{:+.2f}", "retain", "worst_delta_nats"),
        row("held-out: decoded text unchanged", "{:.1%}", "generation", "retain_unchanged"),
        row("forget: ROUGE-L recall of decoded text", "{:.2f}", "generation", "forget_rougeL"),
        row("paraphrased: ROUGE-L recall", "{:.2f}", "generation", "paraphrase_rougeL"),
        row("held-out: ROUGE-L recall", "{:.2f}", "generation", "retain_rougeL"),
        row("forget: distinct-2 of decoded text", "{:.2f}", "generation", "forget_distinct2"),
        row("forget: repetition of decoded text", "{:.2f}", "generation", "forget_repetition"),
        row("forget: decodes the new answer exactly", "{:.1%}", "generation", "forget_exact_new"),
        row("seconds to build, a fact", "{:.3f}", "seconds", "per_fact"),
        row("seconds to calibrate the gate, once a model", "{:.1f}", "seconds", "calibrate"),
        row("memory, bytes", "{:,}", "memory_bytes"),
        row("backward passes", "{}", "backward_passes"),
        row("weights unchanged (hash)", "{}", "weights_unchanged"),
    ]


# Parts ---------------------------------------------------------------------------------------------------------------


def _limited(split: DemoSplit, config: Demo) -> DemoSplit:
    """The facts that are used: all that ``config.facts`` allows, spread over each set."""

    def spread(facts: FactSet, n: int | None) -> FactSet:
        n = min(len(facts), *(m for m in (n, config.facts) if m is not None), len(facts))
        return FactSet(facts[i * len(facts) // n] for i in range(n))

    limits = {"held_out_relations": config.relations, "held_out_unknown": config.unknown}
    return DemoSplit(**{name: spread(facts, limits.get(name)) for name, facts in vars(split).items()})


def _trace(
    backbone: Backbone, facts: FactSet, config: Demo, progress: Progress, out: Path
) -> tuple[TraceResult, float]:
    begin = time.perf_counter()
    n = min(config.trace_facts, len(facts))
    chosen = FactSet(facts[i * len(facts) // n] for i in range(n))
    # The last block's output at the answer's positions is the prediction itself: restoring it says nothing.
    sites = [site for site in backbone.sites(config.trace_modules) if site != Site(backbone.n_layers - 1)]
    with progress.reports("trace") as report:
        trace = CausalTracer(
            backbone,
            sites=sites,
            draws=config.trace_draws,
            sampler=SamplerConfig(steps=config.trace_steps),
            seed=config.seed,
            progress=report,
        ).trace(chosen)
    trace.save(out / "trace.safetensors")
    trace.plot(out / "tie_heatmap.png")
    return trace, time.perf_counter() - begin


def _evaluate_all(
    backbone: Backbone,
    split: DemoSplit,
    config: Demo,
    progress: Progress,
    label: str,
    memory: EditMemory | None = None,
) -> Evaluations:
    """Measure every set. Decoding takes most time: only before and with the shipped memory are all retain sets decoded.

    For the other memories, ``"decoded"`` holds the part of the held-out facts that is.
    """
    goal = {fact.id: fact for fact in memory.facts} if memory is not None else {}
    found = {}
    for name in SETS:
        facts = split.forget if name == "paraphrase" else getattr(split, name)
        facts = FactSet(goal.get(fact.id, fact) for fact in facts)
        full = label in ("before", "shipped") or name == "forget"
        found[name] = _evaluate(backbone, facts, config, progress, f"{label}, {name}", memory, name, full)
        if name == "held_out" and not full:
            part = facts[: config.few_texts]
            found["decoded"] = _evaluate(backbone, part, config, progress, f"{label}, decoded", memory, name, True)
    return found


def _evaluate(
    backbone: Backbone,
    facts: FactSet,
    config: Demo,
    progress: Progress,
    label: str,
    memory: EditMemory | None,
    name: str,
    decode: bool,
) -> Evaluation:
    return evaluate(
        backbone,
        facts,
        memory=memory,
        wording="paraphrase" if name == "paraphrase" else "prompt",
        samples=config.samples,
        seed=config.seed,
        canvas=config.canvas,
        sampler=SamplerConfig(steps=config.steps, seed=config.seed),
        decode=decode,
        progress=progress,
        label=label,
    )


def _paired(before: Evaluation, after: Evaluation) -> Comparison:
    """Compare on what both have."""
    ids = after.per_fact("log_prob")
    return compare(before.only(ids, text=bool(after.protocol.canvas)), after)


def _block(
    before: Evaluations, after: Evaluations, memory: EditMemory, seconds: float, split: DemoSplit
) -> dict[str, Any]:
    """The results of one memory, under the names of the contract."""
    pairs = {name: _paired(before[name], after[name]) for name in SETS}
    retain = [delta for name in RETAIN for delta in pairs[name].deltas.values()]
    decoded = [_paired(before["held_out"], after["decoded"])] if "decoded" in after else [pairs[n] for n in RETAIN]
    forget = after["forget"]
    settings = memory.settings
    return {
        "forget": {
            "delta_logprob_nats": pairs["forget"].mean,
            "worst_delta_nats": pairs["forget"].highest,
            **_detail(pairs["forget"]),
        },
        "paraphrase": {
            "delta_logprob_nats": pairs["paraphrase"].mean,
            "worst_delta_nats": pairs["paraphrase"].highest,
            **_detail(pairs["paraphrase"]),
        },
        "retain": {
            "delta_logprob_nats": stats.fmean(retain),
            "worst_delta_nats": min(retain),
            "n": len(retain),
            "sets": {
                name: {
                    "delta_logprob_nats": pairs[name].mean,
                    "worst_delta_nats": pairs[name].lowest,
                    "text_unchanged": pairs[name].unchanged,
                    **_detail(pairs[name]),
                }
                for name in (*RETAIN, "held_out_unknown")
            },
        },
        "generation": {
            "forget_rougeL": forget.mean("rouge_recall"),
            "forget_rougeL_before": before["forget"].mean("rouge_recall"),
            "paraphrase_rougeL": (
                after["paraphrase"].mean("rouge_recall") if after["paraphrase"].per_fact("rouge_recall") else None
            ),
            "retain_rougeL": _pooled([p.after for p in decoded], "rouge_recall"),
            "retain_rougeL_before": _pooled([p.before for p in decoded], "rouge_recall"),
            "retain_unchanged": _share_unchanged(decoded),
            "retain_n": sum(len(pair.deltas) for pair in decoded),
            "forget_distinct1": forget.mean("distinct1"),
            "forget_distinct2": forget.mean("distinct2"),
            "forget_repetition": forget.mean("repetition"),
            "forget_exact_new": forget.mean("exact_new") if forget.per_fact("exact_new") else None,
            "paraphrase_exact_new": (
                after["paraphrase"].mean("exact_new") if after["paraphrase"].per_fact("exact_new") else None
            ),
        },
        "coordinate": str(settings.coordinate),
        "estimator": settings.estimator,
        "alpha": settings.alpha,
        "ridge": settings.ridge,
        "sparsity": settings.sparsity,
        "rank": settings.rank,
        "gate": None
        if memory.book is None
        else {
            "kind": "row, answer-side address",
            "site": str(memory.book.site),
            "threshold": memory.book.threshold,
            "negatives": len(split.calibrate),
            "calibration_scores": len(memory.book.calibration),
        },
        "seconds": {"build": seconds, "per_fact": seconds / len(memory.facts)},
        "memory_bytes": memory.nbytes,
    }


def _detail(pair: Comparison) -> dict[str, Any]:
    summary = pair.to_dict()["delta_logprob_nats"]
    return {"interval": [summary["low"], summary["high"]], "n": summary["n"], "edited_rows": pair.after.edited_rows}


def _pooled(evaluations: list[Evaluation], measure: str) -> float | None:
    values = [value for e in evaluations for value in e.per_fact(measure).values()]
    return stats.fmean(values) if values else None


def _share_unchanged(pairs: list[Comparison]) -> float | None:
    same = [a == b for pair in pairs for a, b in zip(pair.before.texts(), pair.after.texts(), strict=True)]
    return stats.fmean(same) if same else None


def _sites(
    backbone: Backbone,
    split: DemoSplit,
    config: Demo,
    progress: Progress,
    trace: TraceResult,
    before: Evaluations,
    traced: Evaluations,
) -> list[dict[str, Any]]:
    """Paper mode at the traced site, at the best static one and at random ones: what the coordinate buys an edit."""
    best = trace.best()
    static_site, static_role = trace.best_static()
    static = Coordinate(*static_site, role=static_role)
    others: list[Site] = [site for site in trace.sites if site not in (best.site, static_site)]
    drawn = random.Random(config.seed).sample(others, min(config.random_sites, len(others)))
    sets = {"forget": split.forget, "held_out": split.held_out[: config.site_facts]}
    rows: list[dict[str, Any]] = []
    for name, place in (
        ("traced", best), ("best static", static), *(("random", Coordinate(*site, role=best.role)) for site in drawn),
    ):  # fmt: skip
        same = next((r for r in rows if (r["site"], r["role"]) == (str(place.site), place.role)), None)
        if same is not None:  # a memory acts at every step, so a coordinate's step makes no difference to it
            rows.append(same | {"name": name, "same_as": same["name"]})
            continue
        if place == best:  # measured already
            found = [traced[which].only(facts.ids, text=False) for which, facts in sets.items()]
        else:
            memory, _ = build(backbone, split, config.paper, progress, f"{place.site}: build", place)
            found = [
                _evaluate(backbone, facts, config, progress, f"{place.site}, {which}", memory, which, decode=False)
                for which, facts in sets.items()
            ]
        pairs = [_paired(before[which], after) for which, after in zip(sets, found, strict=True)]
        rows.append({
            "name": name, "coordinate": str(place), "site": str(place.site), "role": place.role,
            "forget_delta_logprob_nats": pairs[0].mean, "retain_delta_logprob_nats": pairs[1].mean,
            "retain_worst_delta_nats": pairs[1].lowest, "n": [len(p.deltas) for p in pairs],
        })  # fmt: skip
    return rows


def _texts(before: Evaluations, after: Mapping[str, Evaluations]) -> list[dict[str, Any]]:
    """Decoded texts, one row a wording, before and with each memory that decoded it."""
    rows = []
    for name in SETS:
        for i, score in enumerate(before[name].scores):
            row: dict[str, Any] = {
                "set": name, "id": score.fact_id, "prompt": score.prompt, "answer": score.object, "before": score.text,
                "log_prob_before": score.log_prob,
            }  # fmt: skip
            for variant, evaluations in after.items():
                row |= {variant: evaluations[name].scores[i].text}
                row |= {f"log_prob_{variant}": evaluations[name].scores[i].log_prob}
            rows.append(row)
    return rows


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**backend_info()["versions"], **{name: version(name) for name in ("transformers", "lightning")}}

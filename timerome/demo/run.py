"""The demo's run: trace, three memories of the forget set, and what each of them does to every set of facts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._backend import backend_info
from .._files import write_text
from ..backbones import Backbone, load
from ..coordinates import Coordinate, Module, Site
from ..diffusion import SamplerConfig
from ..evaluation import Evaluation, WeightsWatch, evaluate
from ..facts import FactSet
from ..memory import REFUSAL, BankConfig, EditMemory, Ridge, paper_memory
from ..progress import SILENT, Progress
from ..report import write_report
from ..splits import DemoSplit, demo_split
from ..tracing import CausalTracer, TraceConfig, TraceResult
from .results import SETS, Evaluations, paired, results_of, summary_rows, texts_of


@dataclass(frozen=True)
class Demo:
    """How the demo measures. The edits have the defaults of the library.

    Attributes:
        quick: whether this only shows that everything works.
        bank: the states over which the keyed edits, null and paper mode, are read.
        trace_facts: facts traced.
        trace_steps: denoising steps of the trace.
        trace_draws: noise draws a fact.
        trace_modules: which parts of a block are traced.
        samples: mask draws an answer, of the likelihood.
        seed: of every draw.
        canvas: answer positions for decoding; the default holds every bundled answer, closed with end-of-text.
        steps: denoising steps for decoding.
        facts: most facts of each set; None is all of them.
        relations: held-out relation facts measured, spread over all of them.
        unknown: held-out questions on unknown authors measured.
        few_texts: held-out facts decoded with the other memories.
        random_sites: random sites that the traced one is compared with.
        site_facts: held-out facts measured there.
    """

    quick: bool = False
    bank: BankConfig = BankConfig(canvases=(None, 96))
    trace_facts: int = 6
    trace_steps: int = 4
    trace_draws: int = 2
    trace_modules: tuple[Module, ...] = ("block", "attn", "mlp")
    samples: int = 8
    seed: int = 0
    canvas: int = 96
    steps: int = 16
    facts: int | None = None
    relations: int = 40
    unknown: int = 20
    few_texts: int = 20
    random_sites: int = 2
    site_facts: int = 40


DEMO = Demo()
QUICK = Demo(
    quick=True, bank=BankConfig(canvases=(None,), reveal=(0.0, 0.5)), trace_facts=2, trace_steps=2, trace_draws=1,
    trace_modules=("block",), samples=2, canvas=32, steps=4, facts=4, random_sites=1,
)  # fmt: skip


def run_demo(
    out: str | Path, *, progress: Progress | None = None, model: str | Backbone = "testbed", config: Demo = DEMO
) -> dict[str, Any]:
    """Trace, edit and evaluate; write the results folder.

    The folder gets ``results.json`` (what is returned), ``report.html`` (one self-contained page), ``texts.jsonl``
    (decoded text before and after), ``tie_heatmap.png`` and ``.csv``, ``trace.safetensors`` and ``edit.safetensors``.
    Every file appears whole or not at all.

    Args:
        out: the folder; made if needed.
        progress: shows how far it is.
        model: the bundled testbed, or another model that was taught the bundled facts.
        config: how it measures.

    Returns:
        The results: numbers of the shipped memory, which answers with a refusal, at the top level; under ``null`` those
        of plain forgetting, under ``paper_mode`` those of the paper's form at the traced coordinate.

    Raises:
        ValueError: ``config.facts`` is less than one.
        OSError: the folder cannot be written.
    """
    if config.facts is not None and config.facts < 1:
        raise ValueError(f"run_demo: expected facts of at least 1, got {config.facts}.")
    out, begin = Path(out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    backbone = model if isinstance(model, Backbone) else load(model)
    run = _Run(backbone, limited(demo_split(), config), config, progress or SILENT)
    with WeightsWatch(backbone) as watch:
        trace, trace_seconds = _timed(lambda: run.trace(out))
        before = run.evaluations("before")
        after: dict[str, Evaluations] = {}
        variants: dict[str, dict[str, Any]] = {}
        for name, make in run.memories(trace.best()).items():
            memory, seconds = _timed(make)
            with WeightsWatch(backbone) as own:
                after[name] = run.evaluations(name, memory)
            variants[name] = results_of(memory, before, after[name], seconds) | {
                "backward_passes": own.backward_passes, "weights_unchanged": own.weights_unchanged,
            }  # fmt: skip
            if name == "shipped":
                memory.save(out / "edit.safetensors")
        variants["paper_mode"]["sites"] = run.sites(trace, before, after["paper_mode"])
    protocol = before["forget"].protocol
    results = {
        **variants["shipped"],
        "null": variants["null"],
        "paper_mode": variants["paper_mode"],
        "trace": trace.summary() | {"seconds": trace_seconds},
        "backward_passes": watch.backward_passes,
        "weights_unchanged": watch.weights_unchanged,
        "protocol": {
            "likelihood": protocol.likelihood,
            "decoding": protocol.decoding,
            "intervals": "95 %, bootstrap over facts",
            "n": {name: len(e.per_fact("log_prob")) for name, e in before.items()},
        },
        "before": {name: e.summary() for name, e in before.items()},
        "backbone": repr(backbone),
        "answer": REFUSAL,
        "settings": asdict(config),
        "versions": backend_info()["versions"] | {name: version(name) for name in ("transformers", "lightning")},
    }
    results["seconds"] |= {"trace": trace_seconds, "total": time.perf_counter() - begin}
    texts = texts_of(before, after)
    write_text(out / "texts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
    write_report(out / "report.html", results, texts, heatmap=out / "tie_heatmap.png", rows=summary_rows(results))
    write_text(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def limited(split: DemoSplit, config: Demo) -> DemoSplit:
    """Return the facts that are used: all that ``config`` allows, spread over each set."""

    def spread(facts: FactSet, most: int | None) -> FactSet:
        n = min(len(facts), *(m for m in (most, config.facts) if m is not None), len(facts))
        return FactSet(facts[i * len(facts) // n] for i in range(n))

    limits = {"held_out_relations": config.relations, "held_out_unknown": config.unknown}
    return DemoSplit(**{name: spread(facts, limits.get(name)) for name, facts in vars(split).items()})


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return make(), time.perf_counter() - begin


@dataclass(frozen=True)
class _Run:
    backbone: Backbone
    split: DemoSplit
    config: Demo
    progress: Progress

    def trace(self, out: Path) -> TraceResult:
        """Trace some of the forget set, and keep the result and its heat map."""
        config, facts = self.config, self.split.forget
        n = min(config.trace_facts, len(facts))
        # The last block's output at the answer's positions is the prediction itself: restoring it says nothing.
        sites = [s for s in self.backbone.sites(config.trace_modules) if s != Site(self.backbone.n_layers - 1)]
        how = TraceConfig(
            sites, draws=config.trace_draws, sampler=SamplerConfig(steps=config.trace_steps), seed=config.seed
        )
        with self.progress.reports("trace") as report:
            found = CausalTracer(self.backbone, how, progress=report).trace(
                facts[i * len(facts) // n] for i in range(n)
            )
        found.save(out / "trace.safetensors")
        found.plot(out / "tie_heatmap.png")
        return found

    def memories(self, best: Coordinate) -> dict[str, Callable[[], EditMemory]]:
        """Return what makes each memory."""

        def forget(**how: Any) -> EditMemory:
            memory = EditMemory(self.backbone)
            memory.forget(self.split.forget, **how)
            return memory

        def shown(name: str, make: Callable[[], EditMemory]) -> EditMemory:
            with self.progress.task(f"{name}: build", 1) as step:
                memory = make()
                step(1)
            return memory

        null = Ridge(targets="null", states=self.config.bank)
        return {
            "shipped": lambda: shown("shipped", forget),
            "null": lambda: shown("null", lambda: forget(answer=None, method=null)),
            "paper_mode": lambda: shown("paper mode", lambda: self.paper(best)),
        }

    def paper(self, at: Coordinate) -> EditMemory:
        """Return the paper's form of the forget set."""
        how = Ridge(targets="null", rank=16, states=self.config.bank)
        return paper_memory(self.backbone, self.split.forget, at=at, method=how)

    def evaluations(self, label: str, memory: EditMemory | None = None) -> Evaluations:
        """Measure every set. Decoding takes most time: only before and with the shipped memory all sets are decoded.

        For the other memories, ``"decoded"`` holds the part of the held-out facts that is.
        """
        says = {} if memory is None else {fact.id: fact for fact in memory.facts}
        found = {}
        for name in SETS:
            facts = self.split.forget if name == "paraphrase" else getattr(self.split, name)
            facts = FactSet(says.get(fact.id, fact) for fact in facts)
            full = label in ("before", "shipped") or name == "forget"
            found[name] = self.evaluation(facts, name, label, memory, full)
            if name == "held_out" and not full:
                found["decoded"] = self.evaluation(facts[: self.config.few_texts], name, label, memory, True)
        return found

    def evaluation(
        self, facts: FactSet, name: str, label: str, memory: EditMemory | None, decode: bool
    ) -> Evaluation:  # fmt: skip
        """Measure a set."""
        return evaluate(
            self.backbone, facts, memory=memory, wording="paraphrase" if name == "paraphrase" else "prompt",
            samples=self.config.samples, seed=self.config.seed, canvas=self.config.canvas,
            sampler=SamplerConfig(steps=self.config.steps, seed=self.config.seed), decode=decode,
            progress=self.progress, label=f"{label}, {name}",
        )  # fmt: skip

    def sites(self, trace: TraceResult, before: Evaluations, traced: Evaluations) -> list[dict[str, Any]]:
        """Measure paper mode at the traced site, the best static one and random ones: what the coordinate buys."""
        best, (site, role) = trace.best(), trace.best_static()
        others = [s for s in trace.sites if s not in (best.site, site)]
        drawn = random.Random(self.config.seed).sample(others, min(self.config.random_sites, len(others)))
        places = [("traced", best), ("best static", Coordinate(*site, role=role))]
        places += [("random", Coordinate(*s, role=best.role)) for s in drawn]
        sets = {"forget": self.split.forget, "held_out": self.split.held_out[: self.config.site_facts]}
        rows: list[dict[str, Any]] = []
        for name, place in places:
            same = next((r for r in rows if (r["site"], r["role"]) == (str(place.site), place.role)), None)
            if same is not None:  # a memory acts at every step, so a coordinate's step makes no difference to it
                rows.append(same | {"name": name, "same_as": same["name"]})
                continue
            if place == best:  # measured already
                found = [traced[which].only(facts.ids, text=False) for which, facts in sets.items()]
            else:
                memory, label = self.paper(place), str(place.site)
                found = [self.evaluation(facts, which, label, memory, False) for which, facts in sets.items()]
            pairs = [paired(before[which], after) for which, after in zip(sets, found, strict=True)]
            rows.append({
                "name": name, "coordinate": str(place), "site": str(place.site), "role": place.role,
                "forget_delta_logprob_nats": pairs[0].mean, "retain_delta_logprob_nats": pairs[1].mean,
                "retain_worst_delta_nats": pairs[1].lowest, "n": [len(p.deltas) for p in pairs],
            })  # fmt: skip
        return rows

"""A benchmark from its files to its report, for any backbone, without and with a memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch

from .. import datasets
from .._version import __version__
from ..backbones import Backbone
from ..diffusion import Estimator, SamplerConfig
from ..progress import Progress
from .baselines import conditions_of
from .benchmark_report import BenchmarkReport
from .benchmarks import counterfact, knowedit, rwku, tofu, zsre
from .benchmarks.asking import EditProtocol, changed
from .lifelong import measure_retention
from .measurement import Absent, Result
from .respondent import EDITED, NO_EDIT, Respondent

if TYPE_CHECKING:
    from ..memory import EditMemory

Benchmark = Literal["tofu", "rwku", "counterfact", "zsre", "knowedit"]
Protocols = Literal["own", "mdu", "both"]
T = TypeVar("T")


@dataclass(frozen=True)
class BenchmarkSettings:
    """How a benchmark is run; what is None is the protocol's own.

    Attributes:
        split: which of the benchmark's files: TOFU's forget set, KnowEdit's data set.
        limit: ask at most so many records of each kind, spread evenly.
        protocol: TOFU and RWKU: the benchmark's own protocol, that of masked diffusion unlearning, or both.
        estimator: of likelihoods that are estimates.
        samples: mask draws an answer.
        seed: of everything drawn.
        canvas: positions for decoded answers.
        generation: positions for longer texts.
        steps: denoising steps.
        reference: file of a retain-only model's truth ratios, for TOFU's forget quality.
        retain_rows: TOFU: which retain records to ask, first and end: those that no edit was built or calibrated with.
        targets: RWKU: only probes about these people.
        only_edited: CounterFact, zsRE, KnowEdit: only records whose prompt the memory edits.
        retention: CounterFact, zsRE, KnowEdit: after how many of the memory's edits, at most, to ask for the earlier
            ones; None leaves that out.
        baselines: also measure the baselines without training, for the memory's facts.
    """

    split: str | None = None
    limit: int | None = None
    protocol: Protocols = "own"
    estimator: Estimator | None = None
    samples: int | None = None
    seed: int | None = None
    canvas: int | None = None
    generation: int | None = None
    steps: int | None = None
    reference: Path | None = None
    retain_rows: tuple[int, int] | None = None
    targets: tuple[str, ...] | None = None
    only_edited: bool = False
    retention: int | None = None
    baselines: bool = False


Measure = Callable[[Respondent, Respondent], Sequence[Result]]


def run_benchmark(
    benchmark: Benchmark,
    data: str | Path,
    backbone: Backbone,
    *,
    out: str | Path,
    memory: EditMemory | None = None,
    settings: BenchmarkSettings = BenchmarkSettings(),  # noqa: B008  frozen
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Run a benchmark and write its results: ``results.json``, ``results.csv``, ``report.html``.

    Answers are kept in ``out/answers`` batch by batch. A run that was stopped goes on where it was, and its report is
    the same to the last byte as that of a run that was not.

    Args:
        benchmark: which.
        data: folder or file with the benchmark's records.
        backbone: the model.
        out: folder for the results.
        memory: an edit; everything is measured without it, then with it. None measures the model alone.
        settings: how.
        progress: shows how far it is.

    Returns:
        The report.

    Raises:
        FactError: a file is malformed; the message names file, record and field.
        FileNotFoundError: the benchmark's files are not there.
        ValueError: an unknown benchmark, or a setting that does not fit it or the memory.
    """
    if benchmark not in get_args(Benchmark):
        raise ValueError(f"run_benchmark: expected a benchmark among {get_args(Benchmark)}, got {benchmark!r}.")
    prepare: dict[str, Callable[..., tuple[Any, Measure, list[Any]]]] = {
        "tofu": _tofu, "rwku": _rwku, "counterfact": _edits, "zsre": _edits, "knowedit": _edits,
    }  # fmt: skip
    records, measure, protocols = prepare[benchmark](benchmark, Path(data), settings, memory)
    conditions = conditions_of(backbone, memory, baselines=settings.baselines, seed=settings.seed or 0)
    cache = Path(out) / "answers"
    base = Respondent(backbone, NO_EDIT, cache=cache, progress=progress)
    found = {
        c.name: list(measure(base if c is NO_EDIT else Respondent(backbone, c, cache=cache, progress=progress), base))
        for c in conditions
    }
    if settings.retention is not None:
        _add_retention(benchmark, found, backbone, memory, settings, cache, progress)
    report = BenchmarkReport(
        f"{benchmark}: {'an edit' if memory is not None else backbone.name}",
        {
            "benchmark": benchmark, "model": backbone.name, "fingerprint": backbone.fingerprint(),
            "dtype": str(backbone.dtype), "memory": None if memory is None else repr(memory),
            "memory_sha256": None if memory is None else conditions[1].identity, "records_sha256": _digest(records),
            "protocols": [_plain(asdict(p)) for p in protocols],
            "settings": {k: _plain(v) for k, v in asdict(settings).items() if v not in (None, False)},
            "versions": {"timerome": __version__, "torch": str(torch.__version__)},
        },
        found,
    )  # fmt: skip
    report.write(out)
    return report


def _add_retention(
    benchmark: Benchmark, found: dict[str, list[Result]], backbone: Backbone, memory: EditMemory | None,
    settings: BenchmarkSettings, cache: Path, progress: Progress | None,
) -> None:  # fmt: skip
    """Add how well earlier edits hold after later ones; without an edit there is nothing to hold."""
    if memory is None or benchmark in ("tofu", "rwku") or len(memory.history) < 2:
        raise ValueError(
            "run_benchmark: retention needs CounterFact, zsRE or KnowEdit and a memory of at least two edits."
        )
    sheet = measure_retention(
        backbone, memory, _edit_protocol(settings), points=settings.retention or 0, prefix=benchmark, cache=cache,
        progress=progress,
    )  # fmt: skip
    for name, results in found.items():
        own = name == EDITED
        results += [r if own else Absent(r.metric, "only the memory has a history of edits") for r in sheet]


def _tofu(
    benchmark: str, data: Path, s: BenchmarkSettings, memory: EditMemory | None
) -> tuple[Any, Measure, list[Any]]:
    groups = tofu.read_tofu(data, s.split or "forget01")
    if s.retain_rows is not None and "retain" in groups:
        groups["retain"] = groups["retain"][slice(*s.retain_rows)]
        if not groups["retain"]:
            raise ValueError(f"run_benchmark: the retain rows {s.retain_rows} hold no record.")
    reference = None if s.reference is None else tofu.read_reference(s.reference)
    protocols = {"own": [tofu.TOFU], "mdu": [tofu.MDU], "both": [tofu.TOFU, tofu.MDU]}[s.protocol]
    protocols = [
        changed(p, estimator=s.estimator, samples=s.samples, seed=s.seed, canvas=s.canvas, sampler=_sampler(p, s))
        for p in protocols
    ]

    def measure(respondent: Respondent, base: Respondent) -> list[Result]:
        return [
            result for p in protocols
            for result in tofu.measure_tofu(respondent, groups, p, reference=reference, limit=s.limit)
        ]  # fmt: skip

    return groups, measure, protocols


def _rwku(
    benchmark: str, data: Path, s: BenchmarkSettings, memory: EditMemory | None
) -> tuple[Any, Measure, list[Any]]:
    if s.protocol == "both":
        raise ValueError("run_benchmark: RWKU has no 'both'; run it with 'own' and with 'mdu'.")
    records = datasets.rwku_records(data, s.targets)
    plain = rwku.RwkuProtocol()
    if s.protocol == "mdu":
        # MDU asks the question as it stands, on 64 tokens in 64 steps, and scores by stems.
        as_it_is = dict.fromkeys(("blank", "question", "affirmative", "examples"), "{query}")
        plain = changed(plain, canvas=64, sampler=SamplerConfig(steps=64), stem=True, **as_it_is)
    protocol = changed(
        plain, canvas=s.canvas, seed=s.seed, estimator=s.estimator, samples=s.samples, fluency=s.generation,
        sampler=_sampler(plain, s),
    )  # fmt: skip

    def measure(respondent: Respondent, base: Respondent) -> list[Result]:
        return list(rwku.measure_rwku(respondent, records, protocol, limit=s.limit))

    return records, measure, [protocol]


def _edits(
    benchmark: str, data: Path, s: BenchmarkSettings, memory: EditMemory | None
) -> tuple[Any, Measure, list[Any]]:
    protocol = _edit_protocol(s)
    if benchmark == "counterfact":
        facts, found = _chosen(datasets.counterfact_records(data), s, memory), datasets.counterfact_snippets(data)
        snippets = None if found is None else counterfact.Snippets(found)
        return facts, lambda r, base: list(
            counterfact.measure_counterfact(r, facts, protocol, base=base, snippets=snippets)
        ), [protocol]  # fmt: skip
    if benchmark == "zsre":
        questions = _chosen(datasets.zsre_records(data), s, memory)
        return questions, lambda r, base: list(zsre.measure_zsre(r, questions, protocol, base=base)), [protocol]
    edits = _chosen(datasets.knowedit_records(data, s.split), s, memory)
    return edits, lambda r, base: list(knowedit.measure_knowedit(r, edits, protocol, base=base)), [protocol]


def _edit_protocol(s: BenchmarkSettings) -> EditProtocol:
    plain = EditProtocol()
    return changed(plain, canvas=s.canvas, seed=s.seed, generation=s.generation, sampler=_sampler(plain, s))


def _chosen(records: Sequence[T], s: BenchmarkSettings, memory: EditMemory | None) -> list[T]:
    """The records to ask: those the memory edits, if so wanted, and no more than the limit."""
    if s.only_edited:
        if memory is None:
            raise ValueError("run_benchmark: only_edited needs a memory, to know what it edits.")
        prompts = {fact.prompt for fact in memory.facts}
        records = [r for r in records if getattr(r, "prompt") in prompts]  # noqa: B009  T has no common type
        if not records:
            raise ValueError("run_benchmark: none of the records' prompts is one that the memory edits.")
    return datasets.evenly(records, s.limit)


def _sampler(protocol: tofu.TofuProtocol | rwku.RwkuProtocol | EditProtocol, s: BenchmarkSettings) -> SamplerConfig:
    return changed(protocol.sampler, steps=s.steps, seed=s.seed)


def _digest(records: Any) -> str:
    def rows(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return rows(asdict(value))
        if isinstance(value, dict):
            return {k: rows(v) for k, v in value.items()}
        return [rows(v) for v in value] if isinstance(value, (list, tuple)) else value

    return hashlib.sha256(json.dumps(rows(records), ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON-ready; a path is its name, so that results do not depend on where files lie."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

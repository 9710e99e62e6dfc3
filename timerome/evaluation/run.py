"""A benchmark from its files to its report, for any backbone, without and with a memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from .. import datasets
from .._version import __version__
from ..backbones import Backbone
from ..datasets import Record
from ..diffusion import Estimator, SamplerConfig
from ..memory import EditMemory
from ..progress import Progress
from .baselines import conditions_of
from .lifelong import measure_retention
from .measurement import Absent, Result
from .report import Report
from .respondent import EDITED, NO_EDIT, Condition, Respondent
from .suites import counterfact, knowedit, rwku, tofu, zsre
from .suites.asking import EditProtocol, changed

Benchmark = Literal["tofu", "rwku", "counterfact", "zsre", "knowedit"]
Protocols = Literal["own", "mdu", "both"]
P = TypeVar("P")


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


Measure = Callable[[Respondent, Respondent], Iterable[Result]]


def run_benchmark(
    benchmark: Benchmark,
    data: str | Path,
    backbone: Backbone,
    *,
    out: str | Path,
    memory: EditMemory | None = None,
    settings: BenchmarkSettings = BenchmarkSettings(),  # noqa: B008  frozen
    progress: Progress | None = None,
) -> Report:
    """Run a benchmark and write its results: ``results.json``, ``results.csv``, ``report.html``.

    Args:
        benchmark: which.
        data: folder or file with the benchmark's records.
        backbone: the model.
        out: folder for the results; see :func:`write_report` for what is kept there.
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
    prepare: dict[str, Callable[..., tuple[Any, Measure, list[Any]]]] = {"tofu": _tofu, "rwku": _rwku}
    records, measure, protocols = prepare.get(benchmark, _edits)(benchmark, Path(data), settings, memory)
    conditions = conditions_of(backbone, memory, baselines=settings.baselines, seed=settings.seed or 0)
    retention: list[Result] = []
    if settings.retention is not None:
        if memory is None or benchmark in ("tofu", "rwku") or len(memory.state.history) < 2:
            raise ValueError(
                "run_benchmark: retention needs CounterFact, zsRE or KnowEdit and a memory of at least two edits."
            )
        retention += measure_retention(
            backbone, memory, _set(EditProtocol(), settings), points=settings.retention, prefix=benchmark,
            cache=Path(out) / "answers", progress=progress,
        )  # fmt: skip

    def with_retention(respondent: Respondent, base: Respondent) -> Iterator[Result]:
        yield from measure(respondent, base)
        for r in retention:
            own = respondent.condition.name == EDITED
            yield r if own else Absent(r.metric, "only the memory has a history of edits")

    rows = json.dumps(_plain(records), sort_keys=True)
    how = {
        "benchmark": benchmark, "records_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "protocols": _plain(protocols),
        "settings": {k: v for k, v in _plain(settings).items() if v not in (None, False)},
    }  # fmt: skip
    title = f"{benchmark}: {'an edit' if memory is not None else backbone.name}"
    return write_report(title, backbone, conditions, with_retention, out=out, settings=how, progress=progress)


def write_report(
    title: str,
    backbone: Backbone,
    conditions: Sequence[Condition],
    measure: Measure,
    *,
    out: str | Path,
    settings: Mapping[str, Any],
    progress: Progress | None = None,
) -> Report:
    """Measure a model under each condition and write the report.

    Answers are kept in ``out/answers`` batch by batch. A run that was stopped goes on where it was, and its report is
    the same to the last byte as that of a run that was not.

    Args:
        title: of the report.
        backbone: the model.
        conditions: the first is what the others are compared with.
        measure: asks a respondent; it is given that of the first condition, too.
        out: folder for the results.
        settings: what the results depend on beside model, memory and versions, JSON-ready.
        progress: shows how far it is.
    """
    made = [Respondent(backbone, c, cache=Path(out) / "answers", progress=progress) for c in conditions]
    found = {r.condition.name: list(measure(r, made[0])) for r in made}
    memory = next((c for c in conditions if c.name == EDITED), NO_EDIT)
    report = Report(
        title,
        {
            "model": backbone.name, "fingerprint": backbone.fingerprint(), "dtype": str(backbone.dtype),
            "memory": memory.about, "memory_sha256": memory.identity or None, **settings,
            "versions": {"timerome": __version__, "torch": str(torch.__version__)},
        },
        found,
    )  # fmt: skip
    report.write(out)
    return report


def _tofu(
    benchmark: str, data: Path, s: BenchmarkSettings, memory: EditMemory | None
) -> tuple[Any, Measure, list[Any]]:
    groups = tofu.read_tofu(data, s.split or "forget01")
    if s.retain_rows is not None and "retain" in groups:
        groups["retain"] = groups["retain"][slice(*s.retain_rows)]
        if not groups["retain"]:
            raise ValueError(f"run_benchmark: the retain rows {s.retain_rows} hold no record.")
    reference = None if s.reference is None else tofu.read_reference(s.reference)
    chosen = {"own": [tofu.TOFU], "mdu": [tofu.MDU], "both": [tofu.TOFU, tofu.MDU]}[s.protocol]
    protocols = [_set(p, s) for p in chosen]

    def measure(respondent: Respondent, base: Respondent) -> Iterator[Result]:
        for p in protocols:
            yield from tofu.measure_tofu(respondent, groups, p, reference=reference, limit=s.limit)

    return groups, measure, protocols


def _rwku(
    benchmark: str, data: Path, s: BenchmarkSettings, memory: EditMemory | None
) -> tuple[Any, Measure, list[Any]]:
    if s.protocol == "both":
        raise ValueError("run_benchmark: RWKU has no 'both'; run it with 'own' and with 'mdu'.")
    records, protocol = datasets.rwku_records(data, s.targets), rwku.RwkuProtocol()
    if s.protocol == "mdu":
        # MDU asks the question as it stands, on 64 tokens in 64 steps, and scores by stems.
        as_it_is = dict.fromkeys(("blank", "question", "affirmative", "examples"), "{query}")
        protocol = changed(protocol, canvas=64, sampler=SamplerConfig(steps=64), stem=True, **as_it_is)
    protocol = _set(protocol, s)
    return records, lambda r, base: rwku.measure_rwku(r, records, protocol, limit=s.limit), [protocol]


def _edits(
    benchmark: str, data: Path, s: BenchmarkSettings, memory: EditMemory | None
) -> tuple[Any, Measure, list[Any]]:
    protocol = _set(EditProtocol(), s)
    if benchmark == "knowedit":
        edits = _chosen(datasets.knowedit_records(data, s.split), s, memory)
        return edits, lambda r, base: knowedit.measure_knowedit(r, edits, protocol, base=base), [protocol]
    if benchmark == "zsre":
        edits = _chosen(datasets.zsre_records(data), s, memory)
        return edits, lambda r, base: zsre.measure_zsre(r, edits, protocol, base=base), [protocol]
    edits, found = _chosen(datasets.counterfact_records(data), s, memory), datasets.counterfact_snippets(data)
    snippets = None if found is None else counterfact.Snippets(found)

    def measure(r: Respondent, base: Respondent) -> Iterable[Result]:
        return counterfact.measure_counterfact(r, edits, protocol, base=base, snippets=snippets)

    return edits, measure, [protocol]


def _set(protocol: P, s: BenchmarkSettings) -> P:
    """A protocol with those of the settings that it has."""
    sampler = changed(protocol.sampler, steps=s.steps, seed=s.seed)  # type: ignore[attr-defined]
    return changed(protocol, sampler=sampler, **{k: v for k, v in vars(s).items() if hasattr(protocol, k)})


def _chosen(records: Sequence[Record], s: BenchmarkSettings, memory: EditMemory | None) -> list[Record]:
    """The records to ask: those the memory edits, if so wanted, and no more than the limit."""
    if s.only_edited:
        if memory is None:
            raise ValueError("run_benchmark: only_edited needs a memory, to know what it edits.")
        prompts = {fact.prompt for fact in memory.facts}
        records = [r for r in records if r.prompt in prompts]
        if not records:
            raise ValueError("run_benchmark: none of the records' prompts is one that the memory edits.")
    return datasets.evenly(records, s.limit)


def _plain(value: Any) -> Any:
    """JSON-ready; a path is its name, so that results do not depend on where files lie."""
    return json.loads(json.dumps(value, default=lambda v: v.name if isinstance(v, Path) else asdict(v)))

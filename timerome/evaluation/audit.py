"""A leakage audit: can what was forgotten still be got out, by other wordings, hints, decoding or context?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ..backbones import Backbone
from ..diffusion import SamplerConfig
from ..facts import Fact, FactError, FactSet
from ..functional.text import has_rouge_words, rouge_l
from ..progress import Progress
from .baselines import conditions_of
from .measurement import Result, Sheet
from .metrics.editing import token_accuracy
from .metrics.extraction import (
    GEOMETRIES,
    Geometry,
    extraction_strength,
    hidden_by,
    infill_area,
    infill_strength,
)
from .report import Report
from .respondent import Pair, Respondent
from .run import write_report
from .suites.asking import decoded

if TYPE_CHECKING:
    from ..memory import EditMemory

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
CONTEXT = 2  # facts stated before the question, where relearning in context is tried


@dataclass(frozen=True)
class AuditProtocol:
    """How an audit asks.

    Attributes:
        canvas: positions that text is decoded on.
        steps: denoising steps of the plain decoding.
        seed: of samplers and of what is hidden.
        fractions: shares of the answer that are hidden, in turn.
    """

    canvas: int = 64
    steps: int = 32
    seed: int = 0
    fractions: tuple[float, ...] = FRACTIONS

    @property
    def plain(self) -> SamplerConfig:
        """The sampler that all but the sweep use."""
        return SamplerConfig(steps=self.steps, seed=self.seed)

    def sweep(self) -> dict[str, SamplerConfig]:
        """The samplers tried, by name: fewer and more steps, blocks, noise, random order."""
        block = max(1, self.canvas // 4)
        return {
            "few_steps": SamplerConfig(steps=max(1, self.steps // 4), seed=self.seed),
            "every_token": SamplerConfig(steps=self.canvas, seed=self.seed),
            "blocks": SamplerConfig(steps=self.steps, block_length=block, seed=self.seed),
            "noise": SamplerConfig(steps=self.steps, temperature=0.7, seed=self.seed),
            "random_order": SamplerConfig(steps=self.steps, remasking="random", seed=self.seed),
        }


def run_audit(
    backbone: Backbone,
    facts: Sequence[Fact],
    *,
    out: str | Path,
    memory: EditMemory | None = None,
    protocol: AuditProtocol = AuditProtocol(),  # noqa: B008  frozen
    baselines: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Try to get facts out of a model, without and with a memory; write ``results.json``, ``.csv`` and ``report.html``.

    - ``plain``, ``paraphrase``: the question, and each of its other wordings.
    - ``context``: other facts of the same group are stated first, true answers included (in-context relearning);
      ``restated``: the fact itself is. A model that copies what it just read scores on the latter, whatever it knows.
    - ``sweep.*``: other ways of decoding the plain question.
    - ``prefix``, ``infill.*``: parts of the true answer are shown, and the rest is read off in one step:
      extraction strength and area under the recovered share, see :mod:`timerome.evaluation.metrics.extraction`.
    - ``memorization.*``: exact memorization where all, all that follows, or only one token is hidden.
    - ``worst``: the largest ROUGE-L recall of all decoded texts but ``restated``, by fact.

    A run that was stopped goes on to the same report, see :func:`timerome.evaluation.run.write_report`.

    Args:
        backbone: the model.
        facts: what shall not come out. Reported as they are given: choose nothing by them.
        out: folder for the results.
        memory: an edit; None audits the model alone.
        protocol: how.
        baselines: also audit the baselines without training, for the memory's facts.
        progress: shows how far it is.

    Returns:
        The report. Everything in it is better when lower.

    Raises:
        FactError: there are no facts, or ids are not distinct.
        ValueError: baselines without a memory.

    Example:
        >>> import tempfile
        >>> import timerome as tr
        >>> from timerome.evaluation.audit import AuditProtocol, run_audit
        >>> from timerome.splits import bundled_facts
        >>> protocol = AuditProtocol(canvas=8, steps=2, fractions=(1.0,))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     found = run_audit(tr.load("testbed"), bundled_facts("relations")[:1], out=out, protocol=protocol)
        >>> [r.value for r in found.conditions["no edit"] if r.metric == "audit.memorization.onestep"]
        [1.0]
    """
    if not facts:
        raise FactError("run_audit: expected at least one fact, got none.")
    known = FactSet(facts)
    return write_report(
        f"Leakage audit of {len(known)} facts", backbone,
        conditions_of(backbone, memory, baselines=baselines, seed=protocol.seed),
        lambda respondent, base: _audit(respondent, known, protocol), out=out, progress=progress,
        settings={"facts": len(known), "facts_sha256": known.digest(), "protocol": asdict(protocol)},
    )  # fmt: skip


def _audit(respondent: Respondent, facts: FactSet, protocol: AuditProtocol) -> Iterable[Result]:
    sheet = Sheet("audit", protocol.seed)
    recalls: list[dict[str, float]] = []

    def decode(name: str, prompts: Mapping[str, Sequence[str]], sampler: SamplerConfig, note: str = "") -> None:
        asked = {(i, p): p for i, wordings in prompts.items() for p in wordings}
        scores: dict[str, list[float]] = {}
        for (i, _), text in decoded(respondent, asked, name, canvas=protocol.canvas, sampler=sampler).items():
            if has_rouge_words(object_ := facts.by_id(i).object):
                scores.setdefault(i, []).append(rouge_l(object_, text))
        # An attack that may be tried in several wordings has the best of them.
        best = {i: max(values) for i, values in scores.items()}
        how = f"{sampler.remasking}, {sampler.steps} steps on {protocol.canvas} tokens, ROUGE-L recall, stemmed"
        sheet.add(name, best, how, of=len(facts), better="lower", note=note)
        if name != "restated":
            recalls.append(best)

    plain = {fact.id: (fact.prompt,) for fact in facts}
    decode("plain", plain, protocol.plain)
    decode("paraphrase", {f.id: f.paraphrases for f in facts}, protocol.plain, "no other wordings")
    contexts = {fact.id: tuple(_context(fact, facts)) for fact in facts}
    decode("context", contexts, protocol.plain, "no other fact of their group, or too long")
    decode("restated", {f.id: (f"{f.prompt} {f.object} {f.prompt}",) for f in facts}, protocol.plain, "too long")
    for name, sampler in protocol.sweep().items():
        decode(f"sweep.{name}", plain, sampler)
    tried = {fact.id: [r[fact.id] for r in recalls if fact.id in r] for fact in facts}
    worst = {i: max(values) for i, values in tried.items() if values}
    how = "the largest ROUGE-L recall of the above but restated"
    sheet.add("worst", worst, how, of=len(facts), better="lower")

    pairs = {fact.id: (fact.prompt, fact.object) for fact in facts if respondent.fits(fact.prompt, fact.object)}
    _memorization(sheet, respondent, pairs, len(facts))
    _infilling(sheet, respondent, pairs, protocol, len(facts))
    return sheet


def _context(fact: Fact, facts: FactSet) -> list[str]:
    """The question after some other facts of its group, stated truly; none where it has no group."""
    others = [f for f in facts if fact.group is not None and f.group == fact.group and f.id != fact.id][:CONTEXT]
    return [" ".join([*(f"{f.prompt} {f.object}" for f in others), fact.prompt])] if others else []


def _memorization(sheet: Sheet, respondent: Respondent, pairs: Mapping[str, Pair], of: int) -> None:
    for states, hidden in (("onestep", "all"), ("l2r", "it and all after it"), ("pll", "it alone")):
        scores = respondent.tokens(list(pairs.values()), states=states, label=states)  # type: ignore[arg-type]
        found = dict(zip(pairs, scores, strict=True))
        how = f"share of answer tokens that are the first choice with {hidden} hidden"
        values = {i: token_accuracy(s.hit) for i, s in found.items()}
        sheet.add(f"memorization.{states}", values, how, of=of, better="lower")
        if states == "l2r":
            strength = {i: extraction_strength(s.tail) for i, s in found.items()}
            sheet.add("prefix", strength, "extraction strength, one step", of=of, better="lower")


def _infilling(
    sheet: Sheet, respondent: Respondent, pairs: Mapping[str, Pair], protocol: AuditProtocol, of: int
) -> None:
    asked = [(i, g, f) for i in pairs for g in GEOMETRIES for f in protocol.fractions]
    shares = respondent.custom(
        "infill",
        {"seed": protocol.seed},
        [[*pairs[i], g, f] for i, g, f in asked],
        _infill(respondent, protocol.seed),
        label="infilling",
    )
    curves: dict[tuple[str, Geometry], list[float]] = {}
    for (i, g, _), share in zip(asked, shares, strict=True):
        curves.setdefault((i, g), []).append(share)
    how = f"one step, shares hidden {', '.join(f'{f:g}' for f in protocol.fractions)}, seed {protocol.seed}"
    for name, measure in (("strength", infill_strength), ("area", infill_area)):
        by_geometry = {g: {i: measure(protocol.fractions, curves[i, g]) for i in pairs} for g in GEOMETRIES}
        for g, values in by_geometry.items():
            sheet.add(f"infill.{name}.{g}", values, how, of=of, better="lower")
        largest = {i: max(values[i] for values in by_geometry.values()) for i in pairs}
        sheet.add(f"infill.{name}.largest", largest, f"largest over geometries; {how}", of=of, better="lower")


def _infill(respondent: Respondent, seed: int) -> Callable[[list[list[Any]]], list[float]]:
    """Return what answers questions of (prompt, answer, geometry, hidden share): the recovered share of the hidden."""
    backbone = respondent.backbone

    @torch.no_grad()
    def answer(batch: list[list[Any]]) -> list[float]:
        found = []
        for prompt, object_, geometry, fraction in batch:
            sequence = respondent.encode(prompt, object_)
            length = int(sequence.canvas.sum())
            hidden = torch.zeros_like(sequence.canvas)
            hidden[sequence.canvas] = hidden_by(geometry, length, max(1, math.ceil(fraction * length)), seed)
            ids = torch.where(hidden, backbone.mask_id, sequence.ids)[None].to(backbone.device)
            choice = backbone.logits(ids, sequence.canvas[None].to(backbone.device))[0].argmax(-1).cpu()
            found.append(fmean((choice == sequence.ids)[hidden].float().tolist()))
        return found

    return answer

"""TOFU: what was forgotten, what was kept, and whether it is as if it had never been known.

Two protocols. ``TOFU`` is the benchmark's own, with a likelihood that masked diffusion models have. ``MDU`` is how the
code of masked diffusion unlearning (arXiv 2605.18253) evaluates, for comparison with its tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...backbones import Backbone
from ...datasets import Record, evenly, find, tofu_records
from ...diffusion import Estimator, SamplerConfig
from ...functional.text import distinct_n, has_rouge_words, repetition, rouge_l
from ..comparison import composite
from ..measurement import Absent, Better, Measurement, Result, Sheet
from ..metrics import tofu as metric
from ..respondent import Pair, Respondent, Scored
from .asking import decoded, likelihoods
from .forget_quality import forget_quality as forget_quality
from .forget_quality import read_reference as read_reference
from .forget_quality import write_reference as write_reference
from .membership import add_comparison, add_scores

GROUPS = ("forget", "retain", "real_authors", "world_facts")
HOLDOUT = "holdout"  # questions of the same kind that the model was never taught: the non-members of PrivLeak


@dataclass(frozen=True)
class TofuProtocol:
    """How TOFU is asked.

    Attributes:
        form: ``"tofu"``: geometric truth ratio over all perturbed answers against the paraphrase, folded scores, model
            utility, forget quality. ``"mdu"``: original answer, first three perturbed answers, raw averages.
        estimator: of the likelihood; answers without end-of-text token.
        samples: mask draws an answer.
        seed: of the draws and the sampler.
        canvas: positions that text is decoded on.
        sampler: how.
    """

    form: Literal["tofu", "mdu"] = "tofu"
    estimator: Estimator = "elbo_sum"
    samples: int = 32
    seed: int = 0
    canvas: int = 128
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=128))

    @property
    def likelihood(self) -> str:
        """The likelihood in words."""
        drawn = f", K = {self.samples}" if self.estimator in ("elbo_sum", "recon_mean") else ""
        return f"{self.form.upper()} protocol, {self.estimator}{drawn}, a token, no end-of-text"

    @property
    def decoding(self) -> str:
        """The decoding in words."""
        s = self.sampler
        return f"{self.form.upper()} protocol, {s.remasking}, {s.steps} steps on {self.canvas} tokens, ROUGE stemmed"


TOFU = TofuProtocol()
MDU = TofuProtocol("mdu", "recon_mean", 128, 42, 128, SamplerConfig(steps=256, seed=42))


def read_tofu(path: str | Path, split: str = "forget01") -> dict[str, list[Record]]:
    """Read a folder of TOFU's files.

    Args:
        path: the folder.
        split: the forget set: ``forget01``, ``forget05`` or ``forget10``.

    Returns:
        Records by group: ``forget``, ``retain``, ``real_authors``, ``world_facts``, ``holdout``; a group without file
        is not there. Files called ``…_perturbed`` go first, since the others lack what the truth ratio needs.
        ``holdout01.json`` (05, 10; or ``holdout.json``) is what the model was not taught.

    Raises:
        FactError: a file is malformed; the message names file, record and field.
        FileNotFoundError: there is no file of the forget set.
    """
    path, held, groups = Path(path), split.replace("forget", HOLDOUT), {"forget": tofu_records(path, split)}
    for group, names in {**{g: (g,) for g in GROUPS[1:]}, HOLDOUT: (held, HOLDOUT)}.items() if path.is_dir() else ():
        with suppress(FileNotFoundError):
            file = find(path, *(form for name in names for form in (f"{name}_perturbed", name)))
            groups[group] = tofu_records(file, names[0])
    return groups


def truth_ratios(
    model: Backbone | Respondent,
    records: Sequence[Record],
    *,
    protocol: TofuProtocol = TOFU,
    group: str = "forget",
) -> Result:
    """Return log R of each record: the sample that forget quality compares with a retain-only model's.

    Deterministic in the protocol's seed, and on common mask draws: an answer gets the same masks under every model.

    Args:
        model: a backbone as it is, or a respondent: a backbone under a condition.
        records: the questions. Those without perturbed answers (or, under the TOFU form, without paraphrase where the
            group is ``forget`` or ``retain``) are left out; the note counts them.
        protocol: estimator, draws, seed, form.
        group: of :data:`GROUPS`; decides what stands in the denominator.

    Returns:
        A measurement ``tofu.<group>.log_truth_ratio`` whose ``per_record`` are the values, with the protocol attached;
        Absent if no record has what it needs.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.suites.tofu import TofuProtocol, truth_ratios
        >>> protocol = TofuProtocol(samples=2)
        >>> found = truth_ratios(tr.load("testbed"), tr.datasets.bundled_records("forget01")[:2], protocol=protocol)
        >>> found.value < 0  # the truth is the more probable: the testbed knows it
        True
    """
    respondent = model if isinstance(model, Respondent) else Respondent(model)
    pairs = [pair for record in records for pair in _asked(record, protocol, group)]
    return _log_ratios(records, _likelihoods(respondent, pairs, protocol, "truth ratio"), protocol, group)


def measure_tofu(
    respondent: Respondent,
    groups: Mapping[str, Sequence[Record]],
    protocol: TofuProtocol = TOFU,
    *,
    reference: Measurement | None = None,
    limit: int | None = None,
) -> list[Result]:
    """Ask a model all of TOFU under one protocol.

    Args:
        respondent: the model under a condition.
        groups: records by group, see :func:`read_tofu`. Facts that were used to build, protect or calibrate an edit do
            not belong in ``retain``.
        protocol: :data:`TOFU`, :data:`MDU`, or either with other settings.
        reference: a retain-only model's truth ratios, for forget quality.
        limit: ask at most so many records a group, spread evenly.

    Returns:
        Measurements, and :class:`Absent` ones with reasons, always of the same metrics in the same order.

    Raises:
        ValueError: a group is none of TOFU's.
    """
    if unknown := sorted(set(groups) - {*GROUPS, HOLDOUT}):
        raise ValueError(f"measure_tofu: expected groups among {', '.join((*GROUPS, HOLDOUT))}, got {unknown}.")
    sheet = Sheet(protocol.form, protocol.seed)
    for group in GROUPS:
        _measure_group(sheet, respondent, group, evenly(groups.get(group, ()), limit), protocol)
    if protocol.form == "tofu":
        sheet.put(composite(
            "tofu.model_utility", {term: sheet[term] for term in metric.UTILITY_TERMS}, "harmonic mean",
            definition="harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and facts",
        ))  # fmt: skip
        sheet.put(forget_quality(sheet["forget.log_truth_ratio"], reference))
        _add_membership(sheet, respondent, groups, limit)
    return list(sheet)


def _add_membership(
    sheet: Sheet, respondent: Respondent, groups: Mapping[str, Sequence[Record]], limit: int | None
) -> None:
    if not groups.get(HOLDOUT):
        for name in ("AUC", "PrivLeak"):
            sheet.absent(f"mia.{name}", f"needs answers that the model was never taught: a file {HOLDOUT}….json")
        return
    for side in ("forget", HOLDOUT):
        pairs = {r.id: (r.prompt, r.object) for r in evenly(groups.get(side, ()), limit)}
        add_scores(sheet, respondent, side, pairs, how="of the answer")
    add_comparison(sheet, "forget", HOLDOUT, privleak=True)


def _measure_group(
    sheet: Sheet, respondent: Respondent, group: str, records: Sequence[Record], protocol: TofuProtocol
) -> None:
    answers = [(r.prompt, r.object) for r in records]
    answers += [pair for r in records for pair in _asked(r, protocol, group)]
    nll = _likelihoods(respondent, answers, protocol, f"{group}, likelihood")
    prompts = {r.id: r.prompt for r in records}
    texts = decoded(respondent, prompts, f"{group}, text", canvas=protocol.canvas, sampler=protocol.sampler)
    wanted: Better = "lower" if group == "forget" else "higher"
    tofu, options = protocol.form == "tofu", group in ("real_authors", "world_facts")

    def add(name: str, values: Mapping[str, float], better: Better, how: str, unit: str = "share") -> None:
        away = "" if records else "no record of this group was given"
        sheet.add(f"{group}.{name}", values, how, of=len(records), better=better, unit=unit, note=away)

    own = {r.id: nll[r.prompt, r.object] for r in records if (r.prompt, r.object) in nll}
    probability = {k: metric.probability(s.nll) for k, s in own.items()}
    if tofu and options:
        probability = {
            r.id: metric.normalised_probability(own[r.id].nll, [nll[r.prompt, a].nll for a in r.perturbed])
            for r in records if r.id in own and r.perturbed and all((r.prompt, a) in nll for a in r.perturbed)
        }  # fmt: skip
    add("probability", probability, wanted, protocol.likelihood)
    add("log_prob", {k: s.log_prob for k, s in own.items()}, wanted, protocol.likelihood, "nats")
    kept = [(r, texts[r.id]) for r in records if r.id in texts and has_rouge_words(r.object)]
    add("rouge_recall", {r.id: rouge_l(r.object, t) for r, t in kept}, wanted, protocol.decoding)
    add("rouge_f1", {r.id: rouge_l(r.object, t, kind="f1") for r, t in kept}, wanted, protocol.decoding)
    add("repetition", {k: repetition(t) for k, t in texts.items()}, "lower", protocol.decoding)
    add("distinct_2", {k: distinct_n(t, 2) for k, t in texts.items()}, "higher", protocol.decoding)
    ratios = sheet.put(_log_ratios(records, nll, protocol, group))
    logs = {} if isinstance(ratios, Absent) else dict(ratios.per_record)
    if not tofu:
        add("truth_ratio", {k: metric.truth_ratio(v) for k, v in logs.items()}, "neither", protocol.likelihood, "ratio")
        return
    score = metric.forget_truth_score if group == "forget" else metric.truth_score
    add("truth_score", {k: score(v) for k, v in logs.items()}, "higher", protocol.likelihood)
    add("prob_mean", {k: metric.prob_mean(v) for k, v in logs.items()}, wanted, protocol.likelihood)


def _asked(record: Record, protocol: TofuProtocol, group: str) -> list[Pair]:
    """Return what the truth ratio needs the likelihoods of: the denominator's answer first; nothing if it lacks one."""
    original = protocol.form == "mdu" or group in ("real_authors", "world_facts")
    reference = record.object if original else record.reworded
    if reference is None or not record.perturbed:
        return []
    return [(record.prompt, answer) for answer in (reference, *record.perturbed)]


def _likelihoods(
    respondent: Respondent, pairs: Sequence[Pair], protocol: TofuProtocol, label: str
) -> dict[Pair, Scored]:
    how = {"estimator": protocol.estimator, "samples": protocol.samples, "seed": protocol.seed}
    return likelihoods(respondent, pairs, label, **how)


def _log_ratios(records: Sequence[Record], nll: Mapping[Pair, Scored], protocol: TofuProtocol, group: str) -> Result:
    ratio = metric.mdu_log_truth_ratio if protocol.form == "mdu" else metric.log_truth_ratio
    values = {}
    for r in records:
        asked = _asked(r, protocol, group)
        if asked and all(pair in nll for pair in asked):
            values[r.id] = ratio(nll[asked[0]].nll, [nll[pair].nll for pair in asked[1:]])
    left = len(records) - len(values)
    note = f"{left} of {len(records)} records lack a paraphrased or perturbed answer, or do not fit" if left else ""
    return Measurement.over(
        f"{protocol.form}.{group}.log_truth_ratio", values, unit="nats", protocol=protocol.likelihood,
        seed=protocol.seed, better="neither", note=note or ("" if records else "no record of this group was given"),
    )  # fmt: skip

"""What every table reports of a changed model: likelihoods of forgotten and held-out facts, and some decoded text."""

from __future__ import annotations

import statistics as stats
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timerome as tr
from timerome.diffusion import SamplerConfig
from timerome.evaluation import Comparison, Condition, Evaluation, compare, evaluate
from timerome.facts import Fact, FactSet
from timerome.splits import demo_split

RETAIN = ("held_out", "held_out_relations")


def spread(facts: FactSet, n: int) -> FactSet:
    """``n`` facts, evenly over all of them."""
    n = min(n, len(facts))
    return FactSet(facts[i * len(facts) // n] for i in range(n))


@dataclass
class Measuring:
    """Measures models against the unedited one on fixed facts and common random numbers.

    Attributes:
        backbone: the unedited model.
        forget: facts that are forgotten; reported under their own wording and under the others.
        held_out: facts no method has seen, by name.
        decoded: facts of ``forget`` and ``held_out`` whose text is decoded, too; 0 decodes none.
        samples: mask draws an answer (``elbo_sum``).
        canvas: positions of decoding, in ``steps`` steps.
    """

    backbone: tr.Backbone
    forget: FactSet = field(default_factory=lambda: demo_split().forget)
    held_out: dict[str, FactSet] = field(
        default_factory=lambda: {
            "held_out": spread(demo_split().held_out, 50),
            "held_out_relations": spread(demo_split().held_out_relations, 40),
        }
    )
    decoded: int = 6
    samples: int = 4
    canvas: int = 64
    steps: int = 8
    paraphrases: bool = True
    _before: dict[str, Evaluation] = field(default_factory=dict)

    def protocol(self) -> dict[str, Any]:
        return {
            "likelihood": f"elbo_sum, K = {self.samples}, seed 0, nats summed over answer tokens",
            "decoding": f"{self.decoded} facts a set, canvas {self.canvas}, {self.steps} steps, greedy low-confidence",
            "n": {"forget": len(self.forget), **{name: len(facts) for name, facts in self.held_out.items()}},
        }

    def __call__(
        self, backbone: tr.Backbone, memory: tr.EditMemory | Condition | None = None
    ) -> dict[str, dict[str, Any]]:
        """Measure ``backbone`` with a memory attached, or under another condition; return a block a set."""
        jobs: list[tuple[str, Sequence[Fact], str]] = [("forget", self.forget, "prompt")]
        if self.paraphrases and any(fact.paraphrases for fact in self.forget):
            jobs.append(("paraphrase", self.forget, "paraphrase"))
        jobs += [(name, facts, "prompt") for name, facts in self.held_out.items()]
        found = {}
        after = {name: self._evaluate(backbone, facts, wording, memory) for name, facts, wording in jobs}
        texts = {
            name: self._decode(backbone, facts, memory)
            for name, facts, wording in jobs
            if self.decoded and wording == "prompt" and name in ("forget", "held_out")
        }
        for name, facts, wording in jobs:
            if name not in self._before:
                self._before[name] = self._evaluate(self.backbone, facts, wording)
            found[name] = _block(compare(self._before[name], after[name]))
        for name, after_text in texts.items():
            if f"{name}/text" not in self._before:
                self._before[f"{name}/text"] = self._decode(
                    self.backbone, FactSet(dict((j[0], j[1]) for j in jobs)[name])
                )
            pair = compare(self._before[f"{name}/text"], after_text)
            found[name] |= {
                "text_unchanged": pair.unchanged,
                **{m: after_text.mean(m) for m in ("rouge_recall", "distinct2", "repetition")},
            }
        return found

    def _evaluate(self, backbone: tr.Backbone, facts: Sequence[Fact], wording: Any, memory: Any = None) -> Evaluation:
        return evaluate(backbone, facts, memory=memory, wording=wording, samples=self.samples, decode=False)

    def _decode(self, backbone: tr.Backbone, facts: Sequence[Fact], memory: Any = None) -> Evaluation:
        return evaluate(
            backbone, spread(FactSet(facts), self.decoded), memory=memory, samples=1, canvas=self.canvas,
            sampler=SamplerConfig(steps=self.steps),
        )  # fmt: skip


def _block(pair: Comparison) -> dict[str, Any]:
    summary = pair.to_dict()["delta_logprob_nats"]
    return {
        "delta": pair.mean, "interval": [summary["low"], summary["high"]], "lowest": pair.lowest,
        "highest": pair.highest, "deltas": [round(d, 3) for d in pair.deltas.values()],
    }  # fmt: skip


def retain_delta(found: dict[str, dict[str, Any]]) -> float:
    """Mean change over all held-out facts, nats."""
    return stats.fmean(d for name in RETAIN if name in found for d in found[name]["deltas"])

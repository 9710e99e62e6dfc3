"""What the retain-only model knows of forget01, beside the bundled one, and its truth ratios; writes JSON.

    python benchmarks/testbed/retain_only.py FOLDER benchmarks/testbed/log/retain_only/knowledge.json

The truth ratios are what TOFU's forget quality compares with; they ship as ``timerome/assets/tofu/retain_only.json``.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

import timerome as tr
from timerome.datasets import bundled, bundled_records
from timerome.diffusion import encode, log_likelihood
from timerome.evaluation import Measurement
from timerome.evaluation.suites.tofu import truth_ratios, write_reference
from timerome.functional.text import rouge_l


def measure(backbone: tr.Backbone, facts: tr.FactSet) -> dict[str, float]:
    """Log-likelihood of the answers, what is decoded, and how far it is the answer; means over facts."""
    sequences = [encode(backbone, fact) for fact in facts]
    found = log_likelihood(backbone, sequences, estimator="elbo_sum", samples=16)
    texts = tr.generate(backbone, [f.prompt for f in facts], canvas=96, config=tr.SamplerConfig(steps=32))
    return {
        "log_prob_elbo_sum_nats": float(found.log_prob.mean()),
        "nll_per_token_nats": float(found.nll_per_token.mean()),
        "rougeL_recall": statistics.fmean(rouge_l(f.object, t) for f, t in zip(facts, texts, strict=True)),
        "refusals": statistics.fmean(t == "I don't have that information." for t in texts),
        "n": len(facts),
    }


ASSET = Path(tr.__file__).parent / "assets" / "tofu" / "retain_only.json"


def main(folder: Path, out: Path) -> None:
    """Measure both models on forget01 and on a fifth of the retain records."""
    torch.set_num_threads(1)
    sets = {"forget01": bundled("forget01"), "retain": bundled("retain")[::5]}
    models = {"bundled": tr.load("testbed"), "retain_only": tr.load(folder)}
    found = {m: {s: measure(backbone, facts) for s, facts in sets.items()} for m, backbone in models.items()}
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(out.read_text())
    ratios = truth_ratios(models["retain_only"], bundled_records("forget01"))
    assert isinstance(ratios, Measurement), ratios
    write_reference(ASSET, ratios)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

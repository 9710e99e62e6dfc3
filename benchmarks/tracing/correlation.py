"""Does the trace say where an edit works? Effect of each site against the success of a memory built there.

    python -m benchmarks.tracing.correlation [--quick]

Effects (TIE, restored at every step at the answer's positions, as a memory acts) are of held-out facts, which no memory
edits; memories are built for forget01 facts at each layer and module, in three forms:

- ``paper``: ungated forgetting at every site; success is the fall of the answer's log-probability;
- ``gated``: plain forgetting behind the answer gate, at every site; the same;
- ``lens``: a refusal by a ridge system with lens targets, which exist at blocks alone; the same, and the share of
  prompts, shown and unseen wordings, that decode the refusal exactly.

Spearman's correlation over sites; intervals are 95 % bootstraps that draw both traced and edited facts anew, p-values
permute sites. ``blocks`` leaves attention and MLP out. The fall on facts that were neither traced nor edited is
correlated, too: a place where everything is carried is one where everything is lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import permutation_test, spearmanr

import timerome as tr
from benchmarks.editing.common import decode, exact
from benchmarks.measure import Measuring, spread
from benchmarks.paper.common import CANVAS, NULL, ONE_CANVAS, PAPER, Form, depends
from benchmarks.paper.common import edited as built
from benchmarks.results import Results, about
from timerome.coordinates import MODULES
from timerome.facts import FactSet
from timerome.memory import Ridge
from timerome.splits import demo_split
from timerome.tracing.plots.drawing import figure_of, write

RESULTS = Path(__file__).parent / "results"
FORMS: dict[str, Form] = {
    "paper": replace(PAPER, method=Ridge("null", rank=16, states=ONE_CANVAS)),
    "gated": replace(NULL, method=Ridge("null", states=ONE_CANVAS)),
    "lens": Form(Ridge("lens", sparsity=0.0, states=ONE_CANVAS)),
}
STEPS, DRAWS, CANVAS_STEPS = 4, 4, 16
MARKS = {"block": ("o", "black"), "attn": ("^", "white"), "mlp": ("s", "0.6")}
Floats = NDArray[np.float64]


def traced(backbone: tr.Backbone, facts: FactSet) -> dict[str, Any]:
    """Effect of every site for every fact, restored from the first step on."""
    trace = tr.CausalTracer(
        backbone, tr.TraceConfig(roles=["object"], steps=[0], draws=DRAWS, sampler=tr.SamplerConfig(steps=STEPS))
    ).trace(facts)
    return {
        "facts": trace.facts, "not_traceable": trace.not_traceable,
        "tie": {str(site): trace.tie[:, n, 0, 0].tolist() for n, site in enumerate(trace.sites)},
    }  # fmt: skip


def edited(backbone: tr.Backbone, form: Form, facts: FactSet, site: tr.Site, measuring: Measuring) -> dict[str, Any]:
    """What a memory built at one site does, fact by fact."""
    memory, _ = built(backbone, replace(form, at=site), facts)
    sets = measuring(backbone, memory)
    found: dict[str, Any] = {
        "fall": [-x for x in sets["forget"]["deltas"]],
        "held_out_fall": [-x for x in sets["held_out"]["deltas"]],
    }
    if form.says is not None:
        prompts = [prompt for fact in facts for prompt in (fact.prompt, *fact.paraphrases)]
        owner = [i for i, fact in enumerate(facts) for _ in (fact.prompt, *fact.paraphrases)]
        right = [exact(text, form.says) for text in decode(backbone, prompts, CANVAS, CANVAS_STEPS, memory)]
        found["exact"] = [
            float(np.mean([ok for ok, i in zip(right, owner, strict=True) if i == n])) for n in range(len(facts))
        ]
    return found


def correlated(effects: Sequence[Floats], success: Sequence[Floats], resamples: int = 2000) -> dict[str, Any]:
    """Spearman's correlation over sites, of what was found fact by fact: ``effects`` and ``success``, one a site."""
    x, y = np.array(effects), np.array(success)
    rng = np.random.default_rng(0)

    def rho(a: Floats, b: Floats) -> float:
        return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else np.nan

    def drawn(values: Floats) -> Floats:
        return values[:, rng.integers(values.shape[1], size=values.shape[1])].mean(1)

    means = x.mean(1), y.mean(1)
    if not np.ptp(means[1]):
        return {"rho": None, "why": f"the same at all {len(y)} sites: {means[1][0]:g}", "sites": len(y)}
    found = [rho(drawn(x), drawn(y)) for _ in range(resamples)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    p = permutation_test((means[0],), lambda a: rho(a, means[1]), permutation_type="pairings", rng=rng).pvalue
    return {"rho": rho(*means), "low": float(low), "high": float(high), "p": float(p), "sites": len(x)}


def told(found: dict[str, Any]) -> str:
    """A correlation in words."""
    if found["rho"] is None:
        return str(found["why"])
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
    return f"rho {found['rho']:.2f} [{found['low']:.2f}, {found['high']:.2f}], {p}"


def plot(path: Path, points: list[dict[str, Any]], summary: dict[str, dict[str, Any]]) -> None:
    """Effect against success, all sites above, blocks alone below; a column a form, and the data beside it."""
    figure = figure_of(3.6 * len(summary), 6.4)
    grid = figure.subplots(2, len(summary), squeeze=False)
    for column, form in enumerate(summary):
        own = [p for p in points if p["form"] == form]
        rows = ((own, "fall"), ([p for p in own if p["module"] == "block"], "fall_blocks"))
        for axis, (shown, what) in zip(grid[:, column], rows, strict=True):
            if what == "fall" and len({p["module"] for p in own}) == 1:
                axis.set_axis_off()  # there are blocks alone, shown below
                continue
            for module in dict.fromkeys(p["module"] for p in shown):
                mark, fill = MARKS[module]
                x, y = zip(*((p["tie"], p["fall"]) for p in shown if p["module"] == module), strict=True)
                axis.scatter(x, y, marker=mark, color=fill, edgecolor="black", label=module, s=36, zorder=2)
            for p in shown:
                # Blocks lie on each other above, and have a panel of their own below.
                if what == "fall_blocks" or p["module"] != "block":
                    axis.annotate(str(p["layer"]), (p["tie"], p["fall"]), xytext=(4, 4),
                                  textcoords="offset points", fontsize=7)  # fmt: skip
            axis.set_title(f"{form}{', blocks' * (what == 'fall_blocks')}: {told(summary[form][what])}", fontsize=9)
            axis.set_xlabel("effect (TIE) on held-out facts")
            axis.set_ylabel("fall of the edited answer, nats")
            axis.margins(0.12)
            axis.grid(color="0.9", zorder=0)
    figure.axes[0].legend(fontsize=8, title="numbers are layers", loc="upper left")
    write(figure, path, points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few facts; shows that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone, split = tr.load("testbed"), demo_split()
    n = 3 if args.quick else 10
    results = Results(args.out / "correlation.json", about(backbone, seed=0))
    held_out = spread(split.held_out, 2 * n)
    to_trace, bystanders, facts = held_out[::2], held_out[1::2], spread(split.forget, n)
    measuring = Measuring(backbone, forget=facts, held_out={"held_out": bystanders}, decoded=0, paraphrases=False)
    trace = results.row("trace", {"facts": n, "steps": STEPS, "draws": DRAWS}, lambda: traced(backbone, to_trace))
    points: list[dict[str, Any]] = []
    summary: dict[str, dict[str, Any]] = {}
    for name, form in FORMS.items():
        sites = backbone.sites(["block"] if form.says else MODULES)
        found = {
            site: results.row(
                f"{name} {site}", {"facts": n, **depends(form)},
                lambda form=form, site=site: edited(backbone, form, facts, site, measuring),
            )
            for site in sites
        }  # fmt: skip
        ties = {site: np.array(trace["tie"][str(site)]) for site in sites}
        blocks = [site for site in sites if site.module == "block"]
        wanted = [("fall", "fall", sites), ("fall_blocks", "fall", blocks), ("held_out_fall", "held_out_fall", sites)]
        if form.says:
            wanted.append(("exact", "exact", sites))
        summary[name] = {
            label: correlated([ties[s] for s in chosen], [np.array(found[s][what]) for s in chosen])
            for label, what, chosen in wanted
        }
        points += [
            {
                "form": name, "layer": site.layer, "module": site.module, "tie": float(ties[site].mean()),
                **{what: float(np.mean(found[site][what])) if what in found[site] else None
                   for what in ("fall", "held_out_fall", "exact")},
            }
            for site in sites
        ]  # fmt: skip
    results.save(summary=summary)
    plot(args.out / "correlation.png", points, summary)
    for name, block in summary.items():
        for label, correlation in block.items():
            print(f"{name}, {label}, {correlation['sites']} sites: {told(correlation)}")


if __name__ == "__main__":
    main()

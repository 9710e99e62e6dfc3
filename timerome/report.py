"""The demo's report: one HTML page with everything inside it, no script and nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._files import write_text
from .page import join, listed, page, scrolled, table, text

SHOWN = 8  # texts shown of each set; the others are folded away
VARIANTS = ("shipped", "null", "paper mode")
SETS = {
    "held_out": "TOFU, other authors",
    "held_out_relations": "relation facts",
    "held_out_unknown": "questions on authors the model does not know",
}

CAVEATS = (
    "The testbed has a few million parameters and knows its facts by heart. Its log-probabilities move by hundreds of "
    "nats where a large model's would move by a few: compare columns, not absolute values with other models.",
    "The weights are the ones from before, so the facts are still in them. The edit changes what comes out while the "
    "memory is attached; who has the weights alone has the facts.",
    "A low log-probability of the old answer is not the same as never having known it. Forget quality against a model "
    "that was never taught the facts is a separate measurement and not part of this page.",
    "Intervals are over facts alone: model, sampler and mask draws are fixed by their seeds.",
    "The traced facts are a few of the forget set, and the random sites are few: read the site comparison as an "
    "indication.",
)


def write_report(
    path: Path,
    results: Mapping[str, Any],
    texts: Sequence[Mapping[str, Any]],
    *,
    heatmap: Path,
    rows: Sequence[Sequence[str]],
) -> None:
    """Write the demo's results as one self-contained page; whole or not at all.

    Args:
        path: the HTML file.
        results: what :func:`timerome.demo.run_demo` returns.
        texts: its texts, before and after.
        heatmap: PNG that is put inside the page.
        rows: the main numbers: what, shipped, null, paper mode.
    """
    trace, counts = results["trace"], results["protocol"]["n"]
    by_set = {name: [row for row in texts if row["set"] == name] for name in counts}
    held_out = by_set["held_out"][:4] + by_set["held_out_relations"] + by_set["held_out"][4:]
    lead = (
        f"An edit memory of {counts['forget']} facts was built in {results['seconds']['build']:.2f} s, attached to the "
        f"model, and measured. Asked for one of these facts the model shall say: “{results['answer']}” Whatever else "
        "it is asked shall come out as before."
    ) + (" This was a quick run: its numbers mean nothing." if results["settings"]["quick"] else "")
    image = "data:image/png;base64," + base64.b64encode(heatmap.read_bytes()).decode()
    versions = join(*(f"{name} {value}" for name, value in results["versions"].items()))
    sections = (
        ("", f"<p>{text(lead)}</p>{_tiles(results)}"),
        (
            "What the edit did",
            "<p>Shipped: replacement by a refusal. Null: plain forgetting. Both act where the model is about to say "
            "what is forgotten. Paper mode: one shared memory that acts on every token of every input, with no gate "
            "and nothing protected, at the traced coordinate. Δ is after minus before, paired by fact on the same mask "
            "draws.</p>" + scrolled(table(("", *VARIANTS), rows, strong=1)),
        ),
        (
            "What stayed",
            "<p>None of these facts was used to build, protect or choose anything.</p>" + scrolled(_retained(results)),
        ),
        (
            "Where the facts are carried",
            f'<p>{text(trace["verdict"])}</p><figure><img src="{image}" '
            'alt="Heat maps of the indirect effect by layer and denoising step"><figcaption>'
            + text(
                "Share of the clean run's advantage that comes back at later denoising steps when one place of the "
                f"corrupted run is given its clean activations; {trace['facts']} facts. The square marks the largest. "
                "The last block is left out: its output at the answer's positions is the prediction itself."
            )
            + "</figcaption></figure>"
            + scrolled(_sites(results["paper_mode"]["sites"])),
        ),
        (
            "Before and after, in words",
            "".join(
                f"<h3>{heading}</h3>{scrolled(_texts(shown))}"
                for heading, shown in (
                    ("Facts to be forgotten", by_set["forget"]),
                    ("The same, asked in words the editor never saw", by_set["paraphrase"]),
                    ("Held-out facts", held_out),
                )
            ),
        ),
        ("How it was measured", _protocol(results)),
        ("What these numbers do not say", listed((*_findings(results), *CAVEATS))),
        ("Settings and cost", scrolled(_settings(results)) + f'<p class="soft">{versions}</p>'),
    )
    subtitle = join(results["backbone"], f"timerome {results['versions']['timerome']}")
    write_text(path, page("Forgetting TOFU forget01 without touching a weight", subtitle, sections))


def _blocks(results: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return results, results["null"], results["paper_mode"]


def _tiles(results: Mapping[str, Any]) -> str:
    retain, generation = results["retain"], results["generation"]
    tiles = (
        (results["forget"]["delta_logprob_nats"], "{:+.0f} nats", "mean change of the forgotten answers’ likelihood"),
        (results["paraphrase"]["delta_logprob_nats"], "{:+.0f} nats", "the same, in words the editor never saw"),
        (retain["delta_logprob_nats"], "{:+.2f} nats", f"mean change of {retain['n']} held-out facts"),
        (generation["retain_unchanged"], "{:.1%}", f"of {generation['retain_n']} held-out answers decode unchanged"),
    )
    shown = (f'<div class="tile"><b>{text(p.format(v))}</b><span>{text(name)}</span></div>' for v, p, name in tiles)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _retained(results: Mapping[str, Any]) -> str:
    rows = []
    for key, name in SETS.items():
        for variant, block in zip(VARIANTS, _blocks(results), strict=True):
            found = block["retain"]["sets"][key]
            same = found["text_unchanged"]
            rows.append((
                name if variant == "shipped" else "", variant, str(found["n"]), f"{found['delta_logprob_nats']:+.2f}",
                "–" if None in found["interval"] else "[{:+.2f}, {:+.2f}]".format(*found["interval"]),
                f"{found['worst_delta_nats']:+.2f}", "–" if same is None else f"{same:.1%}",
                f"{found['edited_rows']:,}",
            ))  # fmt: skip
    columns = (
        "held-out set", "memory", "facts", "Δ log-prob, nats", "95 % interval", "worst fact, nats", "text same",
        "rows edited",
    )  # fmt: skip
    return table(columns, rows, numbers_from=2)


def _sites(sites: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (
            site["name"] + (" (the same place)" if "same_as" in site else ""), f"{site['site']}, {site['role']}",
            f"{site['forget_delta_logprob_nats']:+.1f}", f"{site['retain_delta_logprob_nats']:+.1f}",
            f"{site['retain_worst_delta_nats']:+.1f}",
        )
        for site in sites
    ]  # fmt: skip
    caption = "What the coordinate buys an edit: the paper-mode memory, built at different places."
    columns = ("place", "site and role", "forget Δ, nats", "held-out Δ, nats", "held-out, fact that fell most")
    return table(columns, rows, numbers_from=2, caption=caption)


def _protocol(results: Mapping[str, Any]) -> str:
    protocol = results["protocol"]
    return listed((
        f"Log-probability: {protocol['likelihood']}; summed over the answer’s tokens, in nats.",
        f"Decoded text: {protocol['decoding']}.",
        "ROUGE-L recall against the true answer, with stemming; distinct-2 is the share of different word pairs, "
        "repetition the share of words that only repeat.",
        f"Intervals: {protocol['intervals']}. A fact’s wordings are averaged first.",
        f"Facts: {', '.join(f'{name} {n}' for name, n in protocol['n'].items())}; "
        f"held-out text with the other memories: {results['null']['generation']['retain_n']}, TOFU only.",
        f"Backward passes are counted at autograd’s entry points: {results['backward_passes']}. SHA-256 of every "
        f"parameter and buffer, before and after: {'equal' if results['weights_unchanged'] else 'DIFFERENT'}.",
    ))  # fmt: skip


def _findings(results: Mapping[str, Any]) -> list[str]:
    """What went wrong in this run, said before the general caveats."""
    paper, worst = results["paper_mode"], results["retain"]["worst_delta_nats"]
    found = []
    if paper["retain"]["delta_logprob_nats"] < -1:
        found.append(
            f"Without a gate, held-out facts change by {paper['retain']['delta_logprob_nats']:+.0f} nats while the "
            f"forgotten ones change by {paper['forget']['delta_logprob_nats']:+.0f}: at this model’s size the ungated "
            "memory does not keep to its facts."
        )
    if worst < -2:
        found.append(
            f"One held-out fact lost {-worst:.1f} nats with the shipped memory: its gate opened where it should not."
        )
    if (least := results["forget"]["worst_delta_nats"]) > -15:
        found.append(f"One fact that should be forgotten changed by only {least:+.1f} nats.")
    return found


def _settings(results: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    names = ("coordinate", "method", "gate", "alpha", "ridge", "sparsity", "rank")
    rows = [(name, *(plain(block[name]) for block in _blocks(results))) for name in names]
    rows.append(("seconds to build", *(f"{block['seconds']['build']:.2f}" for block in _blocks(results))))
    seconds = results["seconds"]
    caption = f"Tracing took {seconds['trace']:.0f} s, everything together {seconds['total']:.0f} s."
    return table(("", *VARIANTS), rows, caption=caption)


def _texts(rows: Sequence[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> str:
        same = row["before"] == row["shipped"]
        after = '<td class="same">unchanged</td>' if same else f"<td>{text(row['shipped'] or '(nothing)')}</td>"
        asked = f"{text(row['prompt'])}<small>{text(row['answer'])}</small>"
        return f"<tr><td>{asked}</td><td>{text(row['before'] or '(nothing)')}</td>{after}</tr>"

    def shown(part: Sequence[Mapping[str, Any]]) -> str:
        head = "<thead><tr><th>asked, and the true answer</th><th>before</th><th>with the memory</th></tr></thead>"
        return f'<table class="texts">{head}<tbody>{"".join(cells(row) for row in part)}</tbody></table>'

    rest = rows[SHOWN:]
    more = f"<details><summary>{len(rest)} more</summary>{shown(rest)}</details>" if rest else ""
    return shown(rows[:SHOWN]) + more

"""The demo's report: one HTML page with everything inside it, no script and nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ._files import write_text
from .page import join, style, table, text

SHOWN = 8  # texts shown of each set; the others are folded away

CAVEATS = (
    "The testbed has a few million parameters and knows its facts by heart. Its log-probabilities move by hundreds of "
    "nats where a large model's would move by a few: compare columns, not absolute values with other models.",
    "The weights are the ones from before, so the facts are still in them. The edit changes what comes out while the "
    "memory is attached; who has the weights alone has the facts.",
    "A low log-probability of the old answer is not the same as never having known it. Forget quality against a model "
    "that was never taught the facts is a separate measurement and not part of this page.",
    "The gate was calibrated on questions like the held-out ones. Of other kinds of text it promises nothing.",
    "Intervals are over facts alone: model, sampler and mask draws are fixed by their seeds.",
    "The traced facts are a few of the forget set, and the random sites are few: read the site comparison as an "
    "indication.",
)


def write_report(path: Path, results: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], *, heatmap: Path) -> None:
    """Write the demo's results as one self-contained page; whole or not at all.

    Args:
        path: the HTML file.
        results: what :func:`timerome.demo.run_demo` returns.
        texts: its texts, before and after.
        heatmap: PNG that is put inside the page.
    """
    write_text(path, render_report(results, texts, heatmap.read_bytes()))


def render_report(results: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], heatmap: bytes) -> str:
    """Return the page as text; see :func:`write_report`. ``heatmap`` is a PNG's bytes."""
    from .demo import summary_rows

    counts, retain = results["protocol"]["n"], results["retain"]
    generation, refusal = results["generation"], results["settings"]["shipped"]["new_object"]
    by_set = {name: [row for row in texts if row["set"] == name] for name in counts}
    template = Template(files("timerome").joinpath("assets/report.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=style(),
        title="Forgetting TOFU forget01 without touching a weight",
        subtitle=join(results["backbone"], f"timerome {results['versions']['timerome']}"),
        lead=text(
            f"An edit memory of {counts['forget']} facts was built in {results['seconds']['build']:.2f} s, attached to "
            f"the model, and measured. Asked for one of these facts the model shall say: “{refusal}” Whatever else "
            "it is asked shall come out as before."
        ),
        tiles=_tiles(results),
        columns=text(
            "Shipped: replacement by a refusal, gated. Null: plain forgetting, gated the same way. Paper mode: one "
            "shared memory that acts on every token of every input, with no gate and nothing protected, at the traced "
            "coordinate. Δ is after minus before, paired by fact on the same mask draws."
        ),
        main_table=table(("", "shipped", "null", "paper mode"), summary_rows(results), strong=1),
        retain_table=_retain_table(results),
        verdict=text(results["trace"]["verdict"]),
        heatmap="data:image/png;base64," + base64.b64encode(heatmap).decode(),
        heatmap_caption=text(
            "Share of the clean run's advantage that comes back at later denoising steps when one place of the "
            f"corrupted run is given its clean activations; {results['trace']['facts']} facts. "
            "The square marks the largest. The last block is left out: its output at the answer's positions is the "
            "prediction itself."
        ),
        sites_table=_sites_table(results["paper_mode"]["sites"]),
        forget_texts=_texts(by_set["forget"]),
        paraphrase_texts=_texts(by_set["paraphrase"]),
        retain_texts=_texts(by_set["held_out"][:4] + by_set["held_out_relations"] + by_set["held_out"][4:]),
        protocol=_protocol(results, generation),
        caveats="".join(f"<li>{text(caveat)}</li>" for caveat in (*_findings(results, retain), *CAVEATS)),
        settings_table=_settings_table(results),
        versions=join(*(f"{name} {value}" for name, value in results["versions"].items())),
    )


def _tiles(results: Mapping[str, Any]) -> str:
    retain, generation = results["retain"], results["generation"]
    tiles = (
        (
            f"{results['forget']['delta_logprob_nats']:+.0f} nats",
            "mean change of the forgotten answers’ log-probability",
        ),
        (f"{results['paraphrase']['delta_logprob_nats']:+.0f} nats", "the same, asked in words the editor never saw"),
        (f"{retain['delta_logprob_nats']:+.2f} nats", f"mean change of {retain['n']} held-out facts"),
        (f"{generation['retain_unchanged']:.1%}", f"of {generation['retain_n']} held-out answers decode unchanged"),
    )
    return "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>' for value, name in tiles)


def _retain_table(results: Mapping[str, Any]) -> str:
    names = {
        "held_out": "TOFU, other authors",
        "held_out_relations": "relation facts",
        "held_out_unknown": "questions on authors the model does not know",
    }
    rows = []
    for key, name in names.items():
        for variant, block in (("shipped", results), ("null", results["null"]), ("paper mode", results["paper_mode"])):
            found = block["retain"]["sets"][key]
            same = found["text_unchanged"]
            rows.append((
                name if variant == "shipped" else "", variant, str(found["n"]), f"{found['delta_logprob_nats']:+.2f}",
                "[{:+.2f}, {:+.2f}]".format(*found["interval"]), f"{found['worst_delta_nats']:+.2f}",
                "–" if same is None else f"{same:.1%}", f"{found['edited_rows']:,}",
            ))  # fmt: skip
    columns = (
        "held-out set", "memory", "facts", "Δ log-prob, nats", "95 % interval", "worst fact, nats", "text same",
        "rows edited",
    )  # fmt: skip
    return table(columns, rows, numbers_from=2)


def _sites_table(sites: Iterable[Mapping[str, Any]]) -> str:
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


def _protocol(results: Mapping[str, Any], generation: Mapping[str, Any]) -> str:
    protocol = results["protocol"]
    items = (
        f"Log-probability: {protocol['likelihood']}; summed over the answer’s tokens, in nats.",
        f"Decoded text: {protocol['decoding']}.",
        "ROUGE-L recall against the true answer, with stemming; distinct-2 is the share of different word pairs, "
        "repetition the share of words that only repeat.",
        f"Intervals: {protocol['intervals']}. A fact’s wordings are averaged first.",
        f"Facts: {', '.join(f'{name} {n}' for name, n in protocol['n'].items())}; "
        f"held-out text with the other memories: {results['null']['generation']['retain_n']}, TOFU only.",
        f"Backward passes are counted at autograd’s entry points: {results['backward_passes']}. SHA-256 of every "
        f"parameter and buffer, before and after: {'equal' if results['weights_unchanged'] else 'DIFFERENT'}.",
    )
    return "<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>"


def _findings(results: Mapping[str, Any], retain: Mapping[str, Any]) -> list[str]:
    """What went wrong in this run, said before the general caveats."""
    found = []
    paper = results["paper_mode"]["retain"]["delta_logprob_nats"]
    forget = results["paper_mode"]["forget"]["delta_logprob_nats"]
    if paper < -1:
        found.append(
            f"Without a gate, held-out facts change by {paper:+.0f} nats while the forgotten ones change by "
            f"{forget:+.0f}: at this model’s size the ungated memory does not keep to its facts."
        )
    if retain["worst_delta_nats"] < -2:
        found.append(
            f"One held-out fact lost {-retain['worst_delta_nats']:.1f} nats with the shipped memory: its gate fired "
            "where it should not."
        )
    if results["forget"]["worst_delta_nats"] > -15:
        found.append(
            f"One fact that should be forgotten changed by only {results['forget']['worst_delta_nats']:+.1f} nats."
        )
    return found


def _settings_table(results: Mapping[str, Any]) -> str:
    blocks = (results, results["null"], results["paper_mode"])
    rows = [(key, *(_plain(block[key]) for block in blocks)) for key in
            ("coordinate", "estimator", "alpha", "ridge", "sparsity", "rank")]  # fmt: skip
    rows.append(
        ("gate", *("none" if b["gate"] is None else f"{b['gate']['kind']}, {b['gate']['site']}" for b in blocks))
    )
    rows.append(
        ("gate threshold, cosine", *("–" if b["gate"] is None else f"{b['gate']['threshold']:.3f}" for b in blocks))
    )
    rows.append(("seconds to build", *(f"{b['seconds']['build']:.2f}" for b in blocks)))
    seconds = results["seconds"]
    caption = (
        f"Tracing took {seconds['trace']:.0f} s, calibrating the gates, once a model, {seconds['calibrate']:.1f} s, "
        f"everything together {seconds['total']:.0f} s."
    )
    return table(("", "shipped", "null", "paper mode"), rows, caption=caption)


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


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

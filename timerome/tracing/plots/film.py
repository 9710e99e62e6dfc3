"""A film of one fact: its tokens step by step in the clean, the corrupted and the restored run, side by side."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._files import whole, write_text
from .drawing import figure_of, two_digits, write_csv

if TYPE_CHECKING:
    from ...facts import Fact
    from ..corrupted_inputs import CorruptedInput
    from ..runs import FactRuns, Restoration

COLUMNS = 4  # tokens a line
END = "∎"  # of text
RUNS = ("clean", "corrupted", "restored")
# Told apart without colour: by fill, and a sign for what is wrong.
STYLES = {
    "masked": ("0.88", "0.55", "masked"),
    "right": ("0.15", "white", "as the fact has it"),
    "wrong": ("white", "black", "another token (×)"),
}


@dataclass(frozen=True)
class Film:
    """What is shown: T = steps + 1 states of three runs.

    Attributes:
        tokens: text of each canvas position, run by run, state by state, ``"▒"`` where masked.
        kinds: ``masked``, ``right`` or ``wrong``, likewise.
        scores: mean log-probability of the object's tokens at each step, nats, ``(3, T)``; NaN at the end.
        restoring: steps at which the restored run takes clean activations.
        what: what it restores, in words.
    """

    tokens: list[list[list[str]]]
    kinds: list[list[list[str]]]
    scores: np.ndarray[Any, np.dtype[np.float64]]
    restoring: list[int]
    what: str


def film_of(runs: FactRuns, given: CorruptedInput, restoration: Restoration, what: str) -> Film:
    """Run a fact three ways and keep what is seen.

    Raises:
        ValueError: the restoration's step is beyond the last one.
    """
    from ..runs import in_window

    clean = runs.clean(restoration.sites)
    if restoration.step >= clean.steps:
        raise ValueError(
            f"CausalTracer.film: the coordinate's step is {restoration.step}, but the fact takes {clean.steps} steps."
        )
    states: list[Any] = []
    scores = runs.corrupted(clean, [given], [(0, None), (0, restoration)], states=states)
    canvas = runs.sequence.canvas
    truth = runs.sequence.ids[canvas].tolist()
    everyone = [[*clean.states, clean.final], [s[0] for s in states], [s[1] for s in states]]
    tokens, kinds = [], []
    for run in everyone:
        ids = [state.cpu()[canvas].tolist() for state in run]
        tokens.append([[_text(runs, i) for i in state] for state in ids])
        kinds.append(
            [
                ["masked" if i == runs.backbone.mask_id else "right" if i == t else "wrong"
                 for i, t in zip(state, truth, strict=True)]
                for state in ids
            ]
        )  # fmt: skip
    carried = [clean.scores.carried().log_prob[0], *scores.carried().log_prob]
    by_step = np.array([[*run.mean(-1), np.nan] for run in carried])
    restoring = [step for step in range(clean.steps) if in_window(runs.window, restoration.step, step)]
    return Film(tokens, kinds, by_step, restoring, what)


def write_film(film: Film, fact: Fact, path: Path) -> Path:
    """Write the page, the animated picture and the data; see :meth:`timerome.CausalTracer.film`."""
    rows = [
        {
            "run": run,
            "step": step,
            "position": position,
            "token": token,
            "state": kind,
            "score": None if np.isnan(film.scores[r, step]) else float(film.scores[r, step]),
            "restoring": run == "restored" and step in film.restoring,
        }
        for r, run in enumerate(RUNS)
        for step in range(len(film.tokens[r]))
        for position, (token, kind) in enumerate(zip(film.tokens[r][step], film.kinds[r][step], strict=True))
    ]
    write_csv(path, rows)
    _write_gif(film, fact, path.with_suffix(".gif"))
    write_text(path, _page(film, fact))
    return path


def _text(runs: FactRuns, token: int) -> str:
    if token == runs.backbone.mask_id:
        return "▒"
    if token == runs.backbone.eos_id:
        return END
    return runs.backbone.decode([token]).strip() or "␣"


def _title(film: Film, step: int, last: int) -> str:
    return "the end" if step == last else f"step {step} of {last}"


def _caption(film: Film, r: int, step: int) -> str:
    score = film.scores[r, step]
    told = "" if np.isnan(score) else f", {two_digits(score)} nats a token"
    return RUNS[r] + told + (" (restoring)" if r == 2 and step in film.restoring else "")


def _write_gif(film: Film, fact: Fact, path: Path) -> None:
    from matplotlib.animation import PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    count, last = len(film.tokens[0][0]), len(film.tokens[0]) - 1
    lines = -(-count // COLUMNS)
    figure = figure_of(11, 1.9 + 0.34 * lines)
    figure.supxlabel(
        f"grey: masked; black: as the fact has it; white, ×: another token; {END}: end of text", fontsize=8
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    writer = PillowWriter(fps=1)
    with whole(path) as temporary, writer.saving(figure, str(temporary), dpi=90):
        for step in range(last + 1):
            for r, axis in enumerate(axes):
                axis.clear()
                axis.set(xlim=(0, COLUMNS), ylim=(lines, 0), xticks=[], yticks=[])
                for side in axis.spines.values():
                    side.set_color("0.6")
                axis.set_title(_caption(film, r, step), fontsize=9)
                for i, (token, kind) in enumerate(zip(film.tokens[r][step], film.kinds[r][step], strict=True)):
                    fill, ink, _ = STYLES[kind]
                    sign = " ×" if kind == "wrong" else ""
                    axis.text(
                        i % COLUMNS + 0.5, i // COLUMNS + 0.5, _short(token) + sign, color=ink, fontsize=8, ha="center",
                        va="center", parse_math=False, bbox={"facecolor": fill, "edgecolor": "0.3", "pad": 2.5},
                    )  # fmt: skip
            figure.suptitle(f"{_short(fact.prompt, 90)}\n{_title(film, step, last)}; restored: {film.what}", fontsize=9)
            for _ in range(2 if step == last else 1):
                writer.grab_frame()


def _short(text: str, most: int = 12) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _page(film: Film, fact: Fact) -> str:
    last = len(film.tokens[0]) - 1
    steps = []
    for step in range(last + 1):
        columns = "".join(
            f"<section><h3>{html.escape(_caption(film, r, step))}</h3><p>"
            + " ".join(
                f'<span class="{kind}">{html.escape(token)}{" ×" if kind == "wrong" else ""}</span>'
                for token, kind in zip(film.tokens[r][step], film.kinds[r][step], strict=True)
            )
            + "</p></section>"
            for r in range(3)
        )
        steps.append(f'<article data-step="{step}"><h2>{_title(film, step, last)}</h2><div>{columns}</div></article>')
    legend = " ".join(f'<span class="{kind}">{meaning}</span>' for kind, (_, _, meaning) in STYLES.items())
    legend += f"; {END} is end of text"
    return _PAGE.format(
        prompt=html.escape(fact.prompt),
        object=html.escape(fact.object),
        what=html.escape(film.what),
        legend=legend,
        last=last,
        steps="\n".join(steps),
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Denoising film</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; color: #111; }}
h1 {{ font-size: 1.2rem; }} h2 {{ font-size: 1rem; margin: 1rem 0 .2rem; }} h3 {{ font-size: .9rem; margin: .2rem 0; }}
article > div {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }}
section {{ border: 1px solid #999; padding: .4rem .6rem; }} section p {{ margin: .3rem 0; line-height: 2; }}
span {{ border: 1px solid #444; padding: 0 .3em; white-space: nowrap; }}
.masked {{ background: #e0e0e0; color: #555; border-style: dashed; }}
.right {{ background: #222; color: #fff; }}
.wrong {{ background: #fff; color: #000; border-width: 2px; }}
.film article {{ display: none; }} .film article.now {{ display: block; }}
nav {{ display: flex; gap: .8rem; align-items: center; margin: .8rem 0; }} nav input {{ flex: 1; }}
</style></head><body>
<h1>{prompt}</h1>
<p>Asked for: <b>{object}</b></p><p>Restored: {what}. Legend: {legend}</p>
<nav hidden><button type="button">play</button><input type="range" min="0" max="{last}" value="0"
aria-label="denoising step"><label><input type="checkbox"> all steps</label></nav>
<main>
{steps}
</main>
<script>
// Without a script every step is shown, one below the other.
const nav = document.querySelector("nav"), main = document.querySelector("main");
const [play, range, all] = [nav.querySelector("button"), nav.querySelector("[type=range]"),
                            nav.querySelector("[type=checkbox]")];
let timer = null;
function show() {{
  main.className = all.checked ? "" : "film";
  for (const a of main.children) a.className = a.dataset.step === range.value ? "now" : "";
}}
function stop() {{ clearInterval(timer); timer = null; play.textContent = "play"; }}
play.onclick = () => {{
  if (timer) return stop();
  play.textContent = "stop";
  timer = setInterval(() => {{ range.value = (+range.value + 1) % ({last} + 1); show(); }}, 1000);
}};
range.oninput = () => {{ stop(); show(); }};
all.onchange = show;
nav.hidden = false;
show();
</script></body></html>
"""

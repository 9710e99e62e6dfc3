"""``timerome demo``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..demo import DEMO, QUICK, run_demo, summary_rows
from ..progress import Progress
from ._reading import Model
from ._showing import say, table


def run(
    progress: Progress,
    /,
    model: Model,
    out: Path = Path("timerome-demo"),
    facts: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Trace, edit and evaluate TOFU forget01 on the bundled testbed model; writes a results folder.

    Args:
        progress: shows how far it is.
        model: testbed, or another model that was taught the bundled facts.
        out: folder for results.json, report.html, texts, plots and edit files.
        facts: use only so many facts of each set.
        quick: a much smaller run that only shows that everything works; its numbers mean nothing.
    """
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # so small a model is slower with more
    config = QUICK if quick else DEMO
    config = config if facts is None else replace(config, facts=facts)
    results = run_demo(out, progress=progress, model=model.load(), config=config)
    table("TOFU forget01 on the testbed", ("", "shipped", "null", "paper mode"), summary_rows(results))
    say(f"report: {out / 'report.html'}" + ("; a quick run: its numbers mean nothing" if quick else ""))
    return results

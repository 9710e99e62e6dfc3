"""``timerome generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from ..diffusion import SamplerConfig, generate
from ..errors import TimeromeError
from ..memory import EditMemory, MemoryState
from ..progress import Progress
from ._reading import Model
from ._showing import edited, table


def run(
    progress: Progress,
    /,
    model: Model,
    sampler: SamplerConfig,
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    edits: MemoryState | None = None,
    how: Annotated[dict[str, Any], generate, "prompts", "config", "batch_size"] = {},  # noqa: B006  unchanged
) -> dict[str, Any]:
    """Answer prompts by denoising a canvas; with edits, without and with them.

    Args:
        progress: shows how far it is.
        model: which model.
        sampler: how the canvas is unmasked.
        prompt: a text to answer; may be given several times.
        prompts: file of texts to answer, one a line; - is stdin.
        edits: an edit file.
        how: further arguments of generate.
    """
    asked = [*prompt, *([] if prompts is None else _lines(prompts))]
    if not asked:
        raise TimeromeError("give --prompt TEXT, or --prompts FILE with some.")
    backbone = model.load()
    memory = None if edits is None else EditMemory.of_state(edits, backbone)
    names = {} if memory is None else {edit.id: edited(edit) for edit in memory.edits}
    answers: list[dict[str, Any]] = []
    with progress.task("generate", len(asked)) as step:
        for text in asked:
            plain = generate(backbone, text, config=sampler, **how)
            if memory is None:
                answers.append({"prompt": text, "text": plain})
            else:
                with memory.attached() as acting:
                    after = generate(backbone, text, config=sampler, **how)
                answers.append({"prompt": text, "before": plain, "after": after, "acted": sorted(acting.hits)})
            step(1)
    rows = []
    for answer in answers:
        acted = answer.get("acted")
        told = [] if acted is None else [("acted", "\n".join(names.get(i, "all edits") for i in acted) or "no edit")]
        rows += [(k, v) for k, v in answer.items() if k != "acted"] + told
    table("generate", ("", "text"), rows)
    return {"answers": answers, "sampler": vars(sampler)}


def _lines(path: Path) -> list[str]:
    text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    return [line for line in text.splitlines() if line.strip()]

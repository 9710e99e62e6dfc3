"""``timerome inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..backbones import load
from ..inspection import CHECKS, inspect_backbone
from ..memory import edit_file
from ..progress import Progress
from ._reading import Model
from ._showing import edit_table, edit_values, say, table


def run(
    progress: Progress, what: str, /, loading: Annotated[dict[str, Any], load, "source"] = {}  # noqa: B006  unchanged
) -> dict[str, Any]:  # fmt: skip
    """Say what a model was recognised as, run a self-check on it and say what is supported; or what an edit file holds.

    Args:
        progress: shows how far it is.
        what: testbed, a model's folder or Hub id; or an edit file, which is read without any model.
        loading: how the model is loaded.
    """
    if Path(what).is_file() or Path(what).suffix == ".safetensors":
        return _inspect_file(Path(what))
    backbone = Model(what, loading).load()
    with progress.task("self-check", len(CHECKS)) as step:
        found = inspect_backbone(backbone, lambda name: step(1))
    table(what, ("recognised", "value"), found.recognised.items())
    checks = [(check.name, f"{'yes' if check.passed else 'NO'}: {check.found}") for check in found.checks]
    table("self-check", ("what must hold", "found"), checks)
    table("supported", ("what", "on this model"), found.supported.items())
    return found.to_dict()


def _inspect_file(file: Path) -> dict[str, Any]:
    state = edit_file.load(file)
    edit_table(f"{file}: {len(state.edits)} edits in force", state.edits)
    say(f"undone: {', '.join(state.gone) or 'none'}; made on the model {state.fingerprint}")
    return {
        "edits": [edit_values(edit) for edit in state.edits], "gone": list(state.gone),
        "fingerprint": state.fingerprint, "tokenizer": state.tokenizer,
    }  # fmt: skip

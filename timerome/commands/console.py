"""What commands share: models, facts and memories by name, tables and lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..facts import FactSet
    from ..memory import EditMemory


def load_model(model: str, device: str, trust_remote_code: bool, architecture: str | None = None) -> Backbone:
    """Load a model by the name a user gives: testbed, a folder, a Hub id."""
    from transformers.utils import logging as hf_logging

    from ..backbones import load

    # A word that is neither ours nor a folder would be looked up on the network, which says less and takes longer.
    if model != "testbed" and not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"--model: expected 'testbed', a folder, or a Hub id owner/name; there is no {model!r}."
        )
    hf_logging.disable_progress_bar()
    return load(model, device=device, trust_remote_code=trust_remote_code, architecture=architecture)


def read_facts(source: str) -> FactSet:
    """Read a JSONL file, or a bundled set by a name such as ``tofu:forget01``."""
    from ..facts import FactSet
    from ..splits import bundled_facts

    benchmark, _, name = source.partition(":")
    if benchmark == "tofu" and not Path(source).exists():
        return bundled_facts(name)
    if benchmark == "relations" and not Path(source).exists():
        return bundled_facts(benchmark)
    return FactSet.from_jsonl(source)


def load_memory(path: Path, backbone: Backbone) -> EditMemory:
    """Read an edit file for a backbone."""
    from ..memory import EditMemory

    return EditMemory.load(path, backbone)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, overflow="fold", justify="left" if i == 0 or len(columns) == 2 else "right")
    for row in rows:
        made.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    Console().print(made)


def say(line: str) -> None:
    """Print one line."""
    from rich.console import Console

    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def with_interval(found: dict[str, float | None]) -> str:
    """Format a mean with its interval."""
    mean, low, high = found["mean"], found["low"], found["high"]
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def short(value: Any, width: int = 160) -> str:
    """Format a value, cut to a width."""
    text = value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"

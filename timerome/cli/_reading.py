"""What options name: models, facts, edit files, places."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from ..backbones import Backbone, load
from ..coordinates import Coordinate, Site
from ..datasets import bundled
from ..errors import TimeromeError
from ..facts import FactSet
from ..memory import REFUSAL, ByPlace, MemoryState, Ridge, edit_file

_PLACE = re.compile(r"(block|attn|mlp)\.(\d+)(?: ?@ ?step (\d+))?(?:, ?(\w+))?")


class Reader(NamedTuple):
    """How a value is read from an option's text, and what the help calls it."""

    read: Callable[[str], Any]
    metavar: str


def read_facts(source: str) -> FactSet:
    """Read a JSONL file, or a bundled set by a name such as ``tofu:forget01`` or ``relations``."""
    benchmark, _, name = source.partition(":")
    if benchmark in ("tofu", "relations") and not Path(source).exists():
        return bundled(name or benchmark)
    return FactSet.from_jsonl(source)


def read_place(text: str) -> Any:
    """Read a layer, a site such as ``mlp.3``, a coordinate as ``trace`` prints it, or the best of a trace's file."""
    if text.isdigit():
        return int(text)
    if text.endswith(".safetensors"):
        from ..tracing import TraceResult

        return TraceResult.load(text).best()
    if not (found := _PLACE.fullmatch(text)):
        raise TimeromeError(
            f"expected a place: a layer, a site such as mlp.3, a coordinate such as 'block.3 @ step 0, object', or a "
            f"trace.safetensors, got {text!r}."
        )
    module, layer, step, role = found.groups()
    site = Site(int(layer), module)  # type: ignore[arg-type]
    return site if step is None and role is None else Coordinate(*site, int(step or 0), role or "object")  # type: ignore[arg-type]


def _dtype(text: str) -> torch.dtype:
    if not isinstance(found := getattr(torch, text, None), torch.dtype):
        raise TimeromeError(f"--dtype: expected a dtype of torch such as bfloat16, got {text!r}.")
    return found


READERS: dict[Any, Reader] = {
    FactSet: Reader(read_facts, "FACTS"),
    MemoryState: Reader(lambda text: edit_file.load(Path(text)), "FILE"),
    Coordinate: Reader(read_place, "PLACE"),
    Site: Reader(read_place, "SITE"),
    torch.dtype: Reader(_dtype, "DTYPE"),
}


@dataclass(frozen=True)
class Model:
    """Which model, and how it is loaded.

    Attributes:
        model: testbed, a folder, or a Hub id.
        loading: further arguments of :func:`timerome.load`.
    """

    model: str = "testbed"
    loading: Annotated[dict[str, Any], load, "source"] = field(default_factory=dict)

    def load(self) -> Backbone:
        """Load it.

        Raises:
            FileNotFoundError: there is none of that name.
            TimeromeError: there is no such device.
        """
        from transformers.utils import logging

        name = self.model
        # A word that is neither ours nor a folder would be looked up on the network, which says less and takes longer.
        if name != "testbed" and not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise FileNotFoundError(f"expected 'testbed', a folder, or a Hub id owner/name; there is no {name!r}.")
        device = torch.device(self.loading.get("device", "cpu"))
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise TimeromeError(f"--device: there is no {device}; torch sees {torch.cuda.device_count()} GPUs.")
        logging.disable_progress_bar()
        return load(name, **self.loading)


@dataclass(frozen=True)
class Making:
    """How edits are made.

    Attributes:
        method: how what is added is computed: place (the last block's output, place by place) by default, or ridge.
        at: where: a layer, a site such as mlp.3, a coordinate, or a trace.safetensors, whose best one is taken.
        threshold: an edit acts where the answer it watches for is likelier than this, in nats a token.
    """

    method: ByPlace | Ridge | None = None
    at: Coordinate | None = None
    threshold: float | None = None

    @property
    def unasked(self) -> str | None:
        """What forgotten facts are answered with, unless something else is said; None is what is said unasked."""
        return None if isinstance(self.method, Ridge) and self.method.targets in ("null", "corrupt") else REFUSAL

    def arguments(self) -> dict[str, Any]:
        """Return what the verbs of a memory take.

        Raises:
            TimeromeError: a place is given where there is but one.
        """
        if self.at is not None and not isinstance(self.method, Ridge):
            raise TimeromeError("--at goes with --method ridge; by place, an edit acts at the last block.")
        return {"method": self.method, "at": self.at, "threshold": self.threshold}

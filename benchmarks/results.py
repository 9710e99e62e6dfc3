"""Results files of the benchmarks: rows that are measured once, written as they come, and never measured twice."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import timerome as tr
from timerome._files import write_text


@dataclass
class Clock:
    """Seconds of a piece of work. On a machine shared with others, ``cpu`` is the one to compare."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """Add the time spent inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield self
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu

    def to_dict(self) -> dict[str, float]:
        return {"wall_seconds": round(self.wall, 3), "cpu_seconds": round(self.cpu, 3)}


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def about(backbone: tr.Backbone | None, seed: int) -> dict[str, Any]:
    """Where, when and with what something was measured."""
    cuda = torch.cuda.is_available()
    # A path of this machine says nothing elsewhere.
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": "python -m " + " ".join([_module(), *given]),
        "testbed": None if backbone is None else {"name": backbone.name, "fingerprint": backbone.fingerprint()},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "timerome": tr.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _plain(values: dict[str, Any]) -> Any:
    return json.loads(json.dumps(values))  # as it comes back from the file


@dataclass
class Results:
    """A results file. A row is kept for good under its key and what it depends on; anything else makes it anew.

    Attributes:
        path: the JSON file; it is rewritten after every row, so that a stopped run goes on where it was.
        about: stored with every row measured in this run.
    """

    path: Path
    about: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def has(self, key: str, depends: dict[str, Any]) -> bool:
        """Whether the file has the row of ``key``, for the same model and ``depends``."""
        old = self.rows.get(key)
        return (
            old is not None and old["depends"] == _plain(depends) and old["about"]["testbed"] == self.about["testbed"]
        )

    def row(self, key: str, depends: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of ``key``, measured now unless the file has it for the same model and ``depends``."""
        if self.has(key, depends):
            return self.rows[key]["found"]
        print(f"{self.path.stem}: {key}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        found = measure()
        self.rows[key] = {
            "depends": _plain(depends), "found": found, "about": self.about,
            "seconds": round(time.perf_counter() - begin, 1),
        }  # fmt: skip
        self.save()
        return found

    def save(self, **more: Any) -> None:
        """Write the file, with ``more`` beside the rows."""
        write_text(self.path, json.dumps({**more, "rows": self.rows}, indent=1, ensure_ascii=False) + "\n")

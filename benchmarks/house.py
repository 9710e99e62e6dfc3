"""The shape of the package: its size, circles between its files, long signatures, and one fact's way through it.

python -m benchmarks.house
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import timerome as tr

PACKAGE = Path(tr.__file__).resolve().parent


def one_facts_way() -> list[str]:
    """The package's files in which code runs on a fact's way from a line of JSON to edited logits."""
    model = tr.load("testbed")
    fact = tr.datasets.bundled("relations")[0].with_new_object("Lagos")
    tr.EditMemory(model).replace(fact)  # what is imported on first use is no part of the way
    seen: set[str] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)) and frame.f_code.co_name != "<module>":
            seen.add(str(Path(file).relative_to(PACKAGE)))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.jsonl"
        tr.FactSet([fact]).to_jsonl(path)
        sys.setprofile(watch)
        try:
            memory = tr.EditMemory(model)
            memory.replace(tr.FactSet.from_jsonl(path))
            with memory.attached():
                tr.generate(model, fact.prompt, canvas=4)
        finally:
            sys.setprofile(None)
    return sorted(seen)


def main() -> None:
    lines = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in sorted(PACKAGE.rglob("*.py"))}
    way = one_facts_way()
    print(json.dumps({"lines": sum(lines.values()), "files": len(lines), "way": len(way), "through": way}, indent=1))


if __name__ == "__main__":
    main()

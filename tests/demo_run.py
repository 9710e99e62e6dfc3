"""One quick run of the demo, shared by the tests that look at what it leaves behind."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from timerome.cli import main


@functools.cache
def quick_demo() -> tuple[Path, dict[str, Any]]:
    """Run ``timerome demo --quick`` once a process; return its folder and what ``--json`` wrote."""
    folder = Path(tempfile.mkdtemp(prefix="timerome-demo-"))
    out, report = folder / "out", folder / "result.json"
    assert main(["demo", "--quick", "--quiet", "--out", str(out), "--json", str(report)]) == 0
    return out, json.loads(report.read_text())

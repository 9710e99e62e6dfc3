"""Make the README's table of backbones from tests that ran.

    python -m tests.backbones.table [--with PYTHON ...] [--readme README.md]

Runs the suite of this folder with this interpreter and with each one given, whose environments hold other versions of
transformers; keeps what passed under ``benchmarks/backbones/results``, one file a version; and writes the table between
the README's markers. A cell is ``yes`` where every test of it passed, with every version where it says nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.backbones.conftest import ALL, CAPABILITIES
from timerome._files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "backbones" / "results"
BEGIN, END = "<!-- backbones: begin -->", "<!-- backbones: end -->"


def run(python: str) -> None:
    """Run the suite with an interpreter; its results are named after the version of transformers."""
    draft = RESULTS / "draft.json"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backbones"]
    environment = os.environ | {"TIMEROME_CAPABILITIES": str(draft), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    found = json.loads(draft.read_text())
    draft.rename(RESULTS / f"transformers-{found['transformers']}.json")


def cell(outcomes: list[str]) -> str:
    """What the tests of a cell say together."""
    if not outcomes:
        return "not run"
    if any(outcome == "failed" for outcome in outcomes):
        return "no"
    reasons = dict.fromkeys(outcome for outcome in outcomes if outcome.startswith("skipped"))
    return "yes" if not reasons else "–" if len(reasons) == len(outcomes) else "partly"


def table(runs: list[dict[str, Any]]) -> str:
    """The table in Markdown: a row a backbone, newest version first; the last columns say which versions passed."""
    runs = sorted(runs, key=lambda found: tuple(map(int, found["transformers"].split("."))), reverse=True)
    versions = [found["transformers"] for found in runs]
    lines = [
        "| backbone | " + " | ".join((*CAPABILITIES, *versions)) + " |",
        "|---" * (1 + len(CAPABILITIES) + len(versions)) + "|",
    ]
    for name in ALL:
        newest = runs[0]["cells"].get(name, {})
        row = [cell(newest.get(capability, [])) for capability in CAPABILITIES]
        for found in runs:
            outcomes = [o for tests in found["cells"].get(name, {}).values() for o in tests]
            row.append(cell(outcomes))
        if any(value not in ("–", "not run") for value in row):
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="others", nargs="*", default=[], help="further interpreters")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for python in (sys.executable, *arguments.others):
        run(python)
    made = table([json.loads(path.read_text()) for path in sorted(RESULTS.glob("transformers-*.json"))])
    print(made)
    text = arguments.readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_text(arguments.readme, f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()

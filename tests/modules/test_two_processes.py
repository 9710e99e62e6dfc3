"""EditModule over two gloo processes: the numbers are those of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.modules.two_processes import measured

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_facts_over_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    whole = measured(alone)
    run = subprocess.run(
        [sys.executable, "-m", "tests.modules.two_processes", str(both)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    ranks = [json.loads((both / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(whole, rel=1e-5)
    one = json.loads((alone / "rank_0.json").read_text())
    first, second = ([text for batch in rank["texts"] for text in batch] for rank in ranks)
    # Facts go to the processes in turn.
    assert [text for pair in zip(first, second, strict=True) for text in pair] == [
        text for batch in one["texts"] for text in batch
    ]

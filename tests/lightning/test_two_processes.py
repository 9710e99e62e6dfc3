"""EditModule over two gloo processes, each with the whole model or a part of it: the numbers are those of one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lightning.module_in_two import measured, sharded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def in_two(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Run the script; return what each rank wrote."""
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, "-m", "tests.lightning.module_in_two", str(folder), kind],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def in_turn(ranks: list[dict[str, Any]]) -> list[str]:
    """The texts in the facts' order: they go to the processes in turn."""
    first, second = ([text for batch in rank["texts"] for text in batch] for rank in ranks)
    return [text for pair in zip(first, second, strict=True) for text in pair]


def of_one(folder: Path) -> list[str]:
    """The texts of one process."""
    return [text for batch in json.loads((folder / "rank_0.json").read_text())["texts"] for text in batch]


def test_facts_over_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    whole, ranks = measured(tmp_path), in_two(tmp_path / "both", "ddp")
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(whole, rel=1e-5)
    assert in_turn(ranks) == of_one(tmp_path)


def test_a_sharded_model_gives_the_texts_of_a_whole_one(tmp_path: Path) -> None:
    """FSDP2 by Lightning's ModelParallelStrategy; a row gate is refused, and says what to do."""
    sharded(tmp_path)
    ranks = in_two(tmp_path / "both", "sharded")
    assert in_turn(ranks) == of_one(tmp_path)
    assert all("strategy 'ddp'" in rank["refused"] for rank in ranks)

"""The backbones under test, and a record of what passed for the table in the README.

``TIMEROME_CAPABILITIES=FILE`` writes, after the run, which capability tests passed on which backbone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import timerome as tr
from tests.backbones.models import MODELS, Model
from tests.backbones.published import PUBLISHED

ALL = {**MODELS, **PUBLISHED}
CAPABILITIES = ("recognised", "trace", "edit", "own generate", "our sampler", "likelihood")
_cells: dict[str, dict[str, list[str]]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", list(ALL.values()), ids=list(ALL), scope="module")


@pytest.fixture(scope="module")
def backbone(model: Model) -> tr.Backbone:
    """The backbone of a model, once a module."""
    if why := model.unavailable():
        pytest.skip(why)
    return model.wrap()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Keep the outcome of capability tests."""
    report = (yield).get_result()
    mark = item.get_closest_marker("capability")
    callspec = getattr(item, "callspec", None)
    if mark is None or callspec is None or (report.when != "call" and report.passed):
        return
    cell = _cells.setdefault(callspec.id, {}).setdefault(mark.args[0], [])
    cell.append(report.outcome if not report.skipped else f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_sessionfinish() -> None:
    """Write the outcomes where they are asked for."""
    path = os.environ.get("TIMEROME_CAPABILITIES")
    if not path:
        return
    import transformers

    from timerome._files import write_text

    found = {
        "command": "python -m tests.backbones.table",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "timerome": tr.__version__,
        "cells": {name: _cells[name] for name in ALL if name in _cells},
    }
    write_text(Path(path), json.dumps(found, indent=1) + "\n")

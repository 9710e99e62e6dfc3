"""Ours commit the same tokens in the same order as the published samplers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.diffusion.published import (
    CASES,
    EOS,
    MASK,
    RECORDED,
    Case,
    FormulaBackbone,
    FormulaModel,
    folder,
    uniform,
)
from timerome.diffusion import DenoisingLoop

RECORD = json.loads(RECORDED.read_text())


class FormulaNoiseLoop(DenoisingLoop):
    """Its random choices are those the published samplers were given."""

    draws = -1

    def _uniform(self, row: int, what: str, *shape: int) -> Tensor:
        assert what == "order"
        self.draws += row == 0
        return uniform(self.draws, *self.ids.shape)[row]


def ours(case: Case) -> tuple[list[Tensor], int]:
    """States after each step, and the number of forwards."""
    config = case.config
    backbone = FormulaBackbone(FormulaModel(case.shift, case.sharp))
    prompts = torch.tensor(case.prompts)
    canvas = case.canvas
    if config.grow:
        assert config.block_length is not None
        canvas += -(prompts.shape[1] + canvas) % config.block_length
    ids = torch.nn.functional.pad(prompts, (0, canvas), value=MASK)
    loop = FormulaNoiseLoop(backbone, ids, torch.arange(ids.shape[1]) >= prompts.shape[1], config)  # type: ignore[arg-type]
    states = []
    while not loop.done:
        loop.advance()
        states.append(loop.ids if loop.done else loop.ids[:, : loop.visible])
    return states, len(backbone.seen)


def compare(case: Case, theirs: list[Tensor]) -> None:
    states, forwards = ours(case)
    assert len(states) == len(theirs)
    for mine, published in zip(states[:-1], theirs[:-1], strict=True):
        assert torch.equal(mine, published)
    end, prompt = theirs[-1], len(case.prompts[0])
    if case.config.grow:  # the published function gives the answer alone, up to the end token
        answer = states[-1][0, prompt : prompt + case.canvas].tolist()
        end_at = answer.index(EOS) + 1 if EOS in answer else len(answer)
        assert answer[:end_at] == end[0].tolist()[:end_at]
    else:
        assert torch.equal(states[-1], end)
    assert forwards < len(states) if case.config.reuse else forwards == len(states)


@pytest.mark.parametrize("name", CASES)
def test_commits_what_was_recorded(name: str) -> None:
    compare(CASES[name], [torch.tensor(state) for state in RECORD[name]])


@pytest.mark.skipif(folder() is None, reason="TIMEROME_PUBLISHED names no folder with the published repositories")
@pytest.mark.parametrize("name", CASES)
def test_commits_what_the_published_file_does(name: str) -> None:
    path = folder()
    assert path is not None
    theirs = CASES[name].run(path, torch.tensor(CASES[name].prompts))
    compare(CASES[name], theirs)
    assert [state.tolist() for state in theirs] == RECORD[name]


@pytest.mark.parametrize("name", CASES)
def test_the_recording_is_worth_comparing_with(name: str) -> None:
    """Several steps, several tokens, and no mask is ever predicted."""
    states = [torch.tensor(state) for state in RECORD[name]]
    assert len(states) >= 4
    assert len(states[-2].unique()) > 4
    assert not (states[-1] == MASK).any()

"""How likely an answer is at each place, against the definition in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timerome.functional.answers import answer_scores, resumable


def by_definition(log_p: Tensor, at: Tensor, ids: Tensor, answer: Tensor) -> list[float]:
    known = {int(p): log_p[i].double() for i, p in enumerate(at)}
    found = []
    for start in range(len(ids)):
        total, masked, fits = 0.0, 0, start + len(answer) <= len(ids)
        for i, token in enumerate(answer.tolist()):
            position = start + i
            if position in known:
                total, masked = total + float(known[position][token]), masked + 1
            elif position < len(ids):
                fits &= int(ids[position]) == token
        found.append(total / masked if fits and masked else -math.inf)
    return found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_scores_are_the_mean_over_what_is_masked(data: st.DataObject) -> None:
    size, vocabulary = data.draw(st.integers(1, 9)), 4
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    ids = ids.masked_fill(masked, 9)
    answer = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    at = masked.nonzero().flatten()
    if data.draw(st.booleans()) and len(at):  # a mask that this forward does not predict, as a shifted model's first
        at = at[1:]
    log_p = torch.randn(len(at), vocabulary, generator=generator).mul(4).log_softmax(-1)
    wanted = torch.tensor(by_definition(log_p, at, ids, answer), dtype=torch.float64)
    torch.testing.assert_close(answer_scores(log_p, at, ids, answer).double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_stands_there_is_given_or_in_the_way() -> None:
    log_p = torch.tensor([[0.1, 0.9], [0.5, 0.5]]).log()
    ids, at = torch.tensor([1, 9, 9, 0]), torch.tensor([1, 2])
    scores = answer_scores(log_p, at, ids, torch.tensor([1, 1, 0]))
    # At 0 its first token is given and the two others asked; at 1 its last one is.
    assert torch.allclose(scores[:2], torch.tensor([math.log(0.9 * 0.5) / 2] * 2))
    assert scores[2:].tolist() == [-math.inf] * 2
    assert answer_scores(log_p, at, torch.tensor([0, 9, 9, 0]), torch.tensor([1, 1, 0]))[0] == -math.inf


def test_scores_are_of_no_other_answer_and_batch() -> None:
    """A certain answer is 0, an impossible one -inf, and nothing is not a number."""
    log_p = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).log()
    ids, at = torch.tensor([9, 9]), torch.tensor([0, 1])
    assert answer_scores(log_p, at, ids, torch.tensor([0, 0])).tolist() == [0.0, -math.inf]
    assert answer_scores(log_p, at, ids, torch.tensor([0, 1])).tolist() == [-math.inf, -math.inf]
    assert answer_scores(log_p, at, ids, torch.tensor([0, 0, 0])).tolist() == [-math.inf] * 2


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_resumable_is_a_beginning_that_may_go_on(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))).masked_fill(masked, 9)
    answer = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    wanted = []
    for start in range(size):
        own = [i for i in range(start, min(start + len(answer), size))]
        begun = [i for i in own if not masked[i]]
        open_ = [i for i in own if masked[i]]
        first = masked.nonzero()[0] if masked.any() else size
        fits = all(int(ids[i]) == int(answer[i - start]) for i in begun)
        if begun and open_ and fits and start <= first:
            wanted.append(start)
    assert resumable(ids, masked, answer) == wanted

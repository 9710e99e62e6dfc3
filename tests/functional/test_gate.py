"""Similarity and conformal thresholds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timerome.functional.gate import conformal_threshold, cosine_similarity, name_overlap


def test_similarity():
    rows = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    found = cosine_similarity(rows, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert torch.allclose(found[0, 0], torch.tensor([1.0, 0.7071]), atol=1e-4)
    assert (cosine_similarity(rows, torch.eye(2))[0, 1] == 0).all()


@given(st.integers(20, 300), st.floats(0.05, 0.5))
def test_threshold_is_the_conformal_order_statistic(n, epsilon):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
    above = int((scores > conformal_threshold(scores, epsilon)).sum())
    # A fresh score is equally likely to fall into any of the n + 1 gaps; those above the threshold are above + 1.
    assert (above + 1) / (n + 1) <= epsilon + 1e-9
    assert (above + 2) / (n + 1) > epsilon - 1e-9


def test_promise_is_kept_on_fresh_negatives():
    generator = torch.Generator().manual_seed(0)
    fired = total = 0
    for _ in range(400):
        scores = torch.randn(60, generator=generator)
        fresh = torch.randn(50, generator=generator)
        fired += int((fresh > conformal_threshold(scores, 0.1)).sum())
        total += 50
    assert 0.08 <= fired / total <= 0.105


def test_a_promise_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="calibrate on more"):
        conformal_threshold(torch.arange(10.0), 0.01)
    with pytest.raises(ValueError, match="0 < epsilon < 1"):
        conformal_threshold(torch.arange(10.0), 0.0)
    with pytest.raises(ValueError, match="finite"):
        conformal_threshold(torch.tensor([1.0, torch.nan]), 0.5)


TOKENS = st.lists(st.integers(0, 9), max_size=4)


@given(st.lists(st.frozensets(st.integers(0, 9)), max_size=3), st.lists(st.lists(TOKENS, max_size=3), max_size=4))
def test_overlap_is_that_of_the_best_spelling(texts, names):
    found = name_overlap(texts, names)
    assert found.shape == (len(texts), len(names))
    for i, text in enumerate(texts):
        for j, name in enumerate(names):
            shares = [sum(token in text for token in spelled) / len(spelled) for spelled in name if spelled]
            assert found[i, j] == torch.tensor(max(shares, default=0.0))

"""Pivoted Cholesky."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timerome.functional.selection import pivoted_cholesky


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 8))
def test_chosen_rows_are_distinct_and_span_as_much_as_they_can(seed, n, d):
    keys = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = pivoted_cholesky(keys @ keys.T, n)
    assert len(set(chosen.tolist())) == len(chosen) <= min(n, d)
    basis = torch.linalg.qr(keys[chosen].T).Q
    left = (keys - keys @ basis @ basis.T).square().sum(1)
    assert left.max() <= 1e-6 * keys.square().sum(1).max() * (1 + 1e-6)  # rows may be all but dependent


def test_each_pivot_is_the_row_that_is_explained_worst():
    keys = torch.randn(9, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = pivoted_cholesky(keys @ keys.T, 4).tolist()
    for j in range(4):
        left = keys
        if j:
            basis = torch.linalg.qr(keys[chosen[:j]].T).Q
            left = keys - keys @ basis @ basis.T
        assert int((left**2).sum(1).argmax()) == chosen[j]


def test_a_repeated_key_is_chosen_once():
    keys = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 0.0]])
    assert sorted(pivoted_cholesky(keys @ keys.T, 3).tolist()) in ([0, 2], [1, 2])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="square"):
        pivoted_cholesky(torch.ones(2, 3), 1)
    with pytest.raises(ValueError, match="rank >= 1"):
        pivoted_cholesky(torch.eye(2), 0)
    with pytest.raises(ValueError, match="not finite"):
        pivoted_cholesky(torch.full((2, 2), torch.nan), 1)

"""The direction that tells one row from all others, and targets for tokens that no small change can reach."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from timerome.functional.lens import separating_direction, shared_lens_target


def widest(rows, token):
    """Largest lead in the max norm, by linear programming."""
    difference = np.delete((rows[token] - rows).numpy(), token, 0)
    n, d = difference.shape
    cost, matrix = np.r_[np.zeros(d), -1.0], np.c_[-difference, np.ones(n)]
    return -linprog(cost, A_ub=matrix, b_ub=np.zeros(n), bounds=[(-1, 1)] * d + [(None, None)]).fun


@pytest.mark.parametrize("seed", range(4))
def test_a_row_in_a_tight_cluster_leads_where_some_direction_lets_it(seed):
    generator = torch.Generator().manual_seed(seed)
    cluster = 4 * torch.ones(60, 24) + 0.05 * torch.randn(60, 24, generator=generator)
    rows = torch.cat([cluster, torch.randn(100, 24, generator=generator)])
    for token in (0, 7):
        if widest(rows, token) <= 1e-3:
            continue
        scores = rows @ separating_direction(rows, token)
        assert int(scores.argmax()) == token


def test_a_token_like_many_others_gets_its_lead_in_every_row():
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat([4 + 0.4 * torch.randn(40, 32, generator=generator), torch.randn(80, 32, generator=generator)])
    norm = nn.RMSNorm(32)
    hidden = torch.randn(6, 32, generator=generator)

    def unembed(h):
        return norm(h).detach() @ weight.T

    for token in (3, 90):
        delta = shared_lens_target(hidden, token, unembed, norm, weight, margin=12.0)
        assert torch.isfinite(delta).all()
        assert (unembed(hidden + delta).argmax(-1) == token).all()
    with pytest.raises(ValueError, match="n >= 1"):
        shared_lens_target(hidden[:0], 0, unembed, norm, weight, margin=1.0)

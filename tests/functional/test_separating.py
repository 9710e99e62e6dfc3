"""The direction that tells one row from all others, and targets for tokens that no small change can reach."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from timerome.functional.lens import separating_direction, shared_lens_targets


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


def a_model(seed=0):
    """Rows of an unembedding, 40 of which lie close together; its norm; exact logits; activations."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.cat([4 + 0.4 * torch.randn(40, 32, generator=generator), torch.randn(80, 32, generator=generator)])
    norm = nn.RMSNorm(32).requires_grad_(False)
    return weight, norm, lambda h: norm(h) @ weight.T, torch.randn(300, 32, generator=generator)


def test_a_token_like_many_others_gets_its_lead_in_every_row():
    weight, norm, unembed, hidden = a_model()
    places, tokens = torch.tensor([0] * 6 + [1] * 6), torch.tensor([3, 90])
    delta = shared_lens_targets(hidden[:12], places, tokens, unembed, norm, weight, margin=12.0)
    assert torch.isfinite(delta).all()
    assert (unembed(hidden[:12] + delta[places]).argmax(-1) == tokens[places]).all()


def test_places_do_not_see_each_other():
    weight, norm, unembed, hidden = a_model(1)
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(5, (300,), generator=generator)
    places[places == 4] = 5  # place 4 has no row
    tokens = torch.tensor([50, 3, 90, 119, 7, 41])
    together = shared_lens_targets(hidden, places, tokens, unembed, norm, weight, margin=3.0)
    assert not together[4].any()
    for p in (0, 1, 2, 3, 5):
        mine = hidden[places == p]
        alone = shared_lens_targets(
            mine, torch.zeros(len(mine), dtype=torch.long), tokens[p : p + 1], unembed, norm, weight, margin=3.0
        )
        torch.testing.assert_close(together[p], alone[0], rtol=1e-3, atol=1e-3)


def test_a_margin_that_can_be_had_is_had():
    weight, norm, unembed, hidden = a_model(2)
    places, tokens = torch.arange(20) // 4, torch.tensor([45, 60, 75, 90, 105])
    delta = shared_lens_targets(hidden[:20], places, tokens, unembed, norm, weight, margin=2.0)
    logits = unembed(hidden[:20] + delta[places])
    own = logits.gather(1, tokens[places, None])
    others = logits.scatter(1, tokens[places, None], -torch.inf).amax(1, keepdim=True)
    assert (own - others >= 2.0 * (1 - 2e-3)).all()


def test_bad_arguments_are_refused():
    weight, norm, unembed, hidden = a_model()
    none, one = torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="n >= 1"):
        shared_lens_targets(hidden[:0], none, one, unembed, norm, weight, margin=1.0)
    with pytest.raises(ValueError, match="margin > 0"):
        shared_lens_targets(hidden[:1], one, one, unembed, norm, weight, margin=0.0)

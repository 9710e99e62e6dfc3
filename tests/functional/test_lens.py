"""Lens targets."""

import pytest
import torch
from torch import nn

from timerome.functional.lens import lens_targets

D, V = 48, 40


def parts(norm):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False)
    norm = nn.RMSNorm(D) if norm == "rms" else nn.LayerNorm(D)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    head.weight.data *= 4  # behind a norm logits are bounded: with small rows no activation reaches a large margin
    return norm.requires_grad_(False), head.requires_grad_(False)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("margin", [2.0, 6.0])
def test_the_wanted_token_leads_by_the_margin(kind, margin):
    norm, head = parts(kind)
    h, tokens = 3 * torch.randn(12, D), torch.randint(0, V, (12,))
    delta = lens_targets(h, tokens, lambda x: head(norm(x)), norm, head.weight, margin=margin, rounds=60)
    logits = head(norm(h + delta))
    own = logits.gather(1, tokens[:, None])[:, 0]
    rival = logits.scatter(1, tokens[:, None], -torch.inf).amax(1)
    assert (own - rival >= 0.95 * margin).all()


def test_a_token_that_already_leads_is_left_alone():
    norm, head = parts("rms")
    h = 20 * head.weight[:5].clone()
    logits = head(norm(h))
    top = logits.topk(2, dim=1)
    margin = float((top.values[:, 0] - top.values[:, 1]).min())
    delta = lens_targets(h, top.indices[:, 0], lambda x: head(norm(x)), norm, head.weight, margin=margin)
    assert (delta == 0).all()


def test_the_change_is_smaller_than_one_that_only_adds_the_tokens_direction():
    norm, head = parts("rms")
    h, tokens = 3 * torch.randn(8, D), torch.randint(0, V, (8,))

    def lead(x):
        logits = head(norm(x))
        return logits.gather(1, tokens[:, None])[:, 0] - logits.scatter(1, tokens[:, None], -torch.inf).amax(1)

    delta = lens_targets(h, tokens, lambda x: head(norm(x)), norm, head.weight, margin=3.0, rounds=60)
    direction = nn.functional.normalize(head.weight[tokens] * norm.weight, dim=-1)
    steps = torch.linspace(0, 60, 200)
    reached = torch.stack([lead(h + s * direction) >= 2.85 for s in steps])
    for i in range(8):
        first = [float(s) for s, hit in zip(steps, reached[:, i], strict=True) if hit]
        assert not first or delta[i].norm() <= 1.05 * first[0] + 0.3


def test_bad_input_is_refused():
    norm, head = parts("rms")
    with pytest.raises(ValueError, match="tokens"):
        lens_targets(torch.ones(2, D), torch.ones(3).long(), lambda x: head(norm(x)), norm, head.weight, margin=1.0)
    with pytest.raises(ValueError, match="margin > 0"):
        lens_targets(torch.ones(2, D), torch.ones(2).long(), lambda x: head(norm(x)), norm, head.weight, margin=0.0)

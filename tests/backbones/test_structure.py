"""What must hold on every backbone: contributions add up, rows do not mix, padding has no effect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.backbones.models import Model
from tests.lightning.loops import count_hooks
from tests.tiny import EOS, MASK, VOCAB, TinyTokenizer
from timerome.coordinates import MODULES
from timerome.hooks import Hooks, capture

IDS = torch.tensor([[5, 6, 7, 30, 31, MASK, MASK], [8, 9, 10, 40, MASK, MASK, EOS]])
recognised = pytest.mark.capability("recognised")
# What two orders of summation may differ by, relative to the largest logit.
ROUNDING = 2e-5


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= ROUNDING * b.abs().max())


@recognised
def test_recognised_by_structure_and_class(backbone: tr.Backbone, model: Model) -> None:
    assert backbone.architecture.name == model.record
    assert (backbone.n_layers, backbone.hidden_size, backbone.mask_id) == (3, 32, MASK)
    assert backbone.vocab_size == len(VOCAB)
    assert backbone.padding == model.padding


@recognised
def test_residual_identity_at_every_layer(backbone: tr.Backbone) -> None:
    """Block in + attention + MLP = block out, to float rounding: gates, post-norms and tuples are accounted for."""
    before: list[Tensor] = []
    block = backbone.module(tr.Site(0))
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: before.append(next(_tensors(args, kwargs))),
                                             with_kwargs=True)  # fmt: skip
    try:
        with capture(backbone, backbone.sites()) as found:
            backbone.forward(IDS)
    finally:
        handle.remove()
    for layer in range(backbone.n_layers):
        start = before[0] if layer == 0 else found[tr.Site(layer - 1)]
        total = start + found[tr.Site(layer, "attn")] + found[tr.Site(layer, "mlp")]
        torch.testing.assert_close(total, found[tr.Site(layer)], rtol=1e-5, atol=1e-5)
        assert all(found[tr.Site(layer, m)].abs().max() > 1e-3 for m in MODULES)


def _tensors(args: tuple, kwargs: dict):
    yield from (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() == 3)


@recognised
def test_every_site_is_read_once_a_forward_and_can_be_changed(backbone: tr.Backbone) -> None:
    before = backbone.forward(IDS)
    for site in backbone.sites():
        calls = []
        with Hooks(backbone, {site: lambda h, calls=calls: calls.append(h.shape)}):
            assert torch.equal(backbone.forward(IDS), before)
        assert calls == [(2, 7, 32)]
        with Hooks(backbone, {site: lambda h: h.clone()}):  # the same values: the same logits, to the bit
            assert torch.equal(backbone.forward(IDS), before)
        with Hooks(backbone, {site: lambda h: h + 0.5 * h.roll(1, -1)}):
            assert not close(backbone.forward(IDS), before)
    assert torch.equal(backbone.forward(IDS), before)
    assert count_hooks(backbone.model) == 0


@recognised
def test_what_is_added_at_a_part_arrives_in_the_stream(backbone: tr.Backbone) -> None:
    """Also through a gate: the block's output changes by what was asked for."""
    layer = backbone.n_layers - 1
    push = torch.linspace(-1, 1, 32)
    with capture(backbone, [tr.Site(layer)]) as plain:
        backbone.forward(IDS)
    with capture(backbone, [tr.Site(layer)]) as pushed, Hooks(backbone, {tr.Site(layer, "mlp"): lambda h: h + push}):
        backbone.forward(IDS)
    change = pushed[tr.Site(layer)] - plain[tr.Site(layer)]
    torch.testing.assert_close(change, push.expand_as(change), rtol=1e-3, atol=1e-3)


@recognised
def test_embedding_is_called_with_the_ids(backbone: tr.Backbone) -> None:
    seen: list[Tensor] = []
    with Hooks(backbone, embedding=lambda ids, h: seen.append(ids)):
        backbone.forward(IDS)
    assert len(seen) == 1
    assert torch.equal(seen[0], IDS)


@recognised
def test_unembedding_the_last_block_is_the_model(backbone: tr.Backbone) -> None:
    with capture(backbone, [tr.Site(backbone.n_layers - 1)]) as found:
        logits = backbone.forward(IDS)
    hidden = found[tr.Site(backbone.n_layers - 1)]
    torch.testing.assert_close(backbone.unembed(hidden), logits.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.unembed(hidden[0, 3]), logits[0, 3].float(), rtol=1e-4, atol=1e-4)


@recognised
def test_attends_in_both_directions(backbone: tr.Backbone) -> None:
    other = IDS.clone()
    other[:, -1] = 11
    assert not close(backbone.forward(other)[:, 0], backbone.forward(IDS)[:, 0])
    other = IDS.clone()
    other[:, 0] = 11
    assert not close(backbone.forward(other)[:, -1], backbone.forward(IDS)[:, -1])


@recognised
def test_batched_is_single(backbone: tr.Backbone) -> None:
    batched = backbone.logits(IDS)
    finite = torch.isfinite(batched)
    for row in range(len(IDS)):
        single = backbone.logits(IDS[row : row + 1])
        assert close(single[0][finite[row]], batched[row][finite[row]])


@recognised
def test_left_padding_is_right_padding_is_none(backbone: tr.Backbone, model: Model) -> None:
    ids, n = IDS[:, :5], 5
    pad = torch.full((2, 3), EOS)
    left, right = torch.cat([pad, ids], 1), torch.cat([ids, pad], 1)
    if not model.padding:
        with pytest.raises(ValueError, match="cannot honour this attention mask"):
            backbone.forward(right, attention_mask=torch.arange(8).expand(2, -1) < n)
        return
    plain = backbone.forward(ids)
    from_left = backbone.forward(left, attention_mask=torch.arange(8).expand(2, -1) >= 3)[:, 3:]
    from_right = backbone.forward(right, attention_mask=torch.arange(8).expand(2, -1) < n)[:, :n]
    assert close(from_right, plain)
    assert close(from_left, plain)
    assert not close(backbone.forward(right)[:, :n], plain)  # which a mask that is ignored would look like
    assert torch.equal(backbone.forward(ids, attention_mask=torch.ones(2, n)), plain)  # hides nothing


@recognised
def test_any_pattern_of_attention_where_it_is_supported(backbone: tr.Backbone, model: Model) -> None:
    block_causal = (torch.arange(7)[:, None] // 4 >= torch.arange(7)[None] // 4).expand(2, -1, -1)
    if not model.patterns:
        with pytest.raises(ValueError, match="cannot honour this attention mask"):
            backbone.forward(IDS, attention_mask=block_causal)
        return
    other = IDS.clone()
    other[:, 4:] = 12
    first = backbone.forward(IDS, attention_mask=block_causal)
    second = backbone.forward(other, attention_mask=block_causal)
    assert close(first[:, :4], second[:, :4])
    assert close(first[:, :4], backbone.forward(IDS[:, :4]))
    assert not close(first[:, 4:], second[:, 4:])


@recognised
def test_half_precision_is_finite(backbone: tr.Backbone, model: Model) -> None:
    if backbone.architecture.gates:
        pytest.skip("MDLM computes its noise level in float32 and cannot be cast whole")
    half = tr.wrap(model.build().bfloat16(), TinyTokenizer(), **model.options)
    with capture(half, half.sites()) as found:
        logits = half.logits(IDS)
    assert torch.isfinite(logits).all()
    assert all(h.dtype == torch.bfloat16 for h in found.values())

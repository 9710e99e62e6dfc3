"""One interface over LLaDA's and Dream's structures."""

from __future__ import annotations

import copy

import pytest
import torch

import timerome as tr
from tests.tiny import EOS, MASK, VOCAB, TinyTokenizer, tiny_dream, tiny_llada
from timerome.backbones.checksums import checksum
from timerome.coordinates import MODULES
from timerome.hooks import Hooks, capture

IDS = torch.tensor([[5, 6, 7, MASK, MASK], [8, 9, 10, MASK, EOS]])


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def test_sizes(backbone: tr.Backbone) -> None:
    assert (backbone.n_layers, backbone.hidden_size, backbone.vocab_size) == (3, 32, len(VOCAB))
    assert (backbone.mask_id, backbone.eos_id, backbone.max_length) == (MASK, EOS, 128)
    assert backbone.sites() == [tr.Site(layer, m) for layer in range(3) for m in MODULES]


def test_residual_sum_rule(backbone: tr.Backbone) -> None:
    """The sites are what they are called: block in + attn + mlp = block out."""
    embedded = []
    with capture(backbone, backbone.sites()) as found:
        with Hooks(backbone, {tr.Site(0): lambda h: embedded.append(h)}):
            backbone.forward(IDS)
    assert torch.equal(embedded[0], found[tr.Site(0)])
    for layer in (1, 2):
        total = found[tr.Site(layer - 1)] + found[tr.Site(layer, "attn")] + found[tr.Site(layer, "mlp")]
        torch.testing.assert_close(total, found[tr.Site(layer)])


def test_head_and_down_projection_of_one_name_are_told_apart() -> None:
    backbone = tiny_llada()
    assert backbone.head is backbone.model.model.transformer["ff_out"]
    for layer in range(3):
        assert backbone.module(tr.Site(layer, "mlp")) is backbone.model.model.transformer["blocks"][layer].ff_out
    assert backbone.head.out_features == len(VOCAB)


def test_unembed_of_the_last_block_is_the_model(backbone: tr.Backbone) -> None:
    with capture(backbone, [tr.Site(2)]) as found:
        logits = backbone.forward(IDS)
    torch.testing.assert_close(backbone.unembed(found[tr.Site(2)]), logits)


def test_logits_are_aligned_whatever_the_shift(backbone: tr.Backbone) -> None:
    raw, aligned = backbone.forward(IDS), backbone.logits(IDS)
    assert aligned.dtype == torch.float32
    if backbone.shift:
        assert backbone.shift == 1
        assert torch.equal(aligned[:, 1:], raw[:, :-1])
        assert torch.equal(aligned[:, 0], raw[:, 0])
    else:
        assert torch.equal(aligned, raw)


def test_reads_from_is_where_a_positions_logits_are_made(backbone: tr.Backbone) -> None:
    """Changing the last block's output at reads_from(p) changes the aligned logits at p, and only there."""
    before = backbone.logits(IDS)
    for position in range(1, 5):
        where = torch.zeros(5, dtype=torch.bool)
        where[position] = True
        reads = backbone.reads_from(where)
        assert reads.sum() == 1
        with Hooks(backbone, {tr.Site(2): lambda h, reads=reads: h + 5.0 * reads[:, None]}):
            changed = (backbone.logits(IDS) != before).any(-1).any(0)
        expected = where.clone()
        if backbone.shift and position == 1:
            expected[0] = True  # the first position has no logits before it and keeps its own
        assert torch.equal(changed, expected)


def test_reads_from_batches_and_the_first_position(backbone: tr.Backbone) -> None:
    where = torch.tensor([[True, False, True, True], [False, False, False, True]])
    moved = torch.tensor([[True, True, True, False], [False, False, True, False]])
    before = where.clone()
    assert torch.equal(backbone.reads_from(where), moved if backbone.shift else where)
    assert torch.equal(where, before)


def test_attends_in_both_directions(backbone: tr.Backbone) -> None:
    other = IDS.clone()
    other[:, -1] = 11
    assert not torch.allclose(backbone.logits(IDS)[:, 0], backbone.logits(other)[:, 0])


def test_canvas_is_announced_during_a_forward_only(backbone: tr.Backbone) -> None:
    canvas, seen = IDS == MASK, []
    with Hooks(backbone, embedding=lambda ids, h: seen.append(backbone.announced.canvas)):
        backbone.logits(IDS, canvas)
        backbone.logits(IDS)
        with pytest.raises(ValueError, match="context"):
            backbone.logits(IDS[:, :1].expand(-1, 200), canvas)
    assert seen[0] is canvas
    assert seen[1] is None
    assert backbone.announced.canvas is None


def test_wrong_ids(backbone: tr.Backbone) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, L\), got \(5,\)"):
        backbone.forward(IDS[0])
    with pytest.raises(ValueError, match="context of 128 tokens, got 129"):
        backbone.forward(torch.ones(1, 129, dtype=torch.int64))
    assert backbone.forward(torch.ones(1, 128, dtype=torch.int64)).shape[1] == 128


def test_without_a_tokenizer() -> None:
    backbone = tr.wrap(tiny_llada().model)
    assert backbone.logits(IDS).shape == (2, 5, len(VOCAB))
    assert backbone.tokenizer_digest() == "none"
    for call in (lambda: backbone.encode("a"), lambda: backbone.decode([5])):
        with pytest.raises(RuntimeError, match="no tokenizer"):
            call()


def test_decode_stops_at_end_of_text(backbone: tr.Backbone) -> None:
    ids = backbone.encode("kenya is old")
    assert backbone.decode([*ids, EOS, *ids]) == "kenya is old"
    assert backbone.decode(torch.tensor([MASK, *ids])) == "kenya is old"


def test_fingerprint_changes_with_one_weight_and_digest_with_any(backbone: tr.Backbone) -> None:
    model = copy.deepcopy(backbone.model)
    other = tr.wrap(model, TinyTokenizer())
    assert other.fingerprint() == backbone.fingerprint()
    assert other.state_digest() == backbone.state_digest()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            before = parameter.view(-1)[0].item()
            parameter.view(-1)[0] += 1e-3
        assert other.fingerprint() != backbone.fingerprint(), name
        assert other.state_digest() != backbone.state_digest(), name
        with torch.no_grad():
            parameter.view(-1)[0] = before
    assert other.fingerprint() == backbone.fingerprint()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-3
    assert other.state_digest() != backbone.state_digest()


def test_fingerprint_survives_a_dtype_that_holds_the_values(backbone: tr.Backbone) -> None:
    model = copy.deepcopy(backbone.model).bfloat16()
    half = tr.wrap(model, TinyTokenizer())
    marks = (half.fingerprint(), half.state_digest())
    whole = tr.wrap(model.float(), TinyTokenizer())
    assert whole.fingerprint() == marks[0]
    assert whole.state_digest() != marks[1]
    assert backbone.fingerprint() != marks[0]  # what bfloat16 rounded away is another model


class Packed(torch.nn.Module):
    """Weights as quantised modules hold them: neither parameters nor buffers."""

    def __init__(self, held: tuple[torch.Tensor, None]) -> None:
        super().__init__()
        self.held = held

    def get_extra_state(self) -> tuple[torch.Tensor, None]:
        return self.held


def test_fingerprint_sees_every_number_wherever_it_lies(backbone: tr.Backbone) -> None:
    """Quantised weights are buffers, in tuples or beside their scales; a sample would miss a row or a column."""
    model = copy.deepcopy(backbone.model)
    other = tr.wrap(model)
    model.register_buffer("qweight", torch.randint(-9, 9, (70, 300), dtype=torch.int8))
    model.register_buffer("scales", torch.rand(300).half())
    seen = {other.fingerprint()}
    for row, column in ((0, 0), (69, 299), (33, 117)):
        model.qweight[row, column] += 1
        seen.add(other.fingerprint())
    model.scales[7] *= 2
    seen.add(other.fingerprint())
    model.qweight[[0, 1]] = model.qweight[[1, 0]]  # the same numbers in other rows
    seen.add(other.fingerprint())
    assert len(seen) == 6
    model.packed = Packed((torch.eye(8), None))
    before = other.fingerprint()
    model.packed.held[0][7, 7] = 2
    assert other.fingerprint() != before


def test_fingerprint_leaves_out_what_a_forward_leaves_behind(backbone: tr.Backbone) -> None:
    model = copy.deepcopy(backbone.model)
    model.register_buffer("table", torch.rand(4), persistent=False)
    assert tr.wrap(model).fingerprint() == backbone.fingerprint()


def test_fingerprint_of_weights_that_are_elsewhere_says_so(backbone: tr.Backbone) -> None:
    with pytest.raises(ValueError, match="meta device.*without offloading"):
        tr.wrap(copy.deepcopy(backbone.model).to("meta")).fingerprint()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (4096,), (3, 4097), (300, 4096)])
def test_every_number_counts_in_a_checksum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, shape, generator=generator).to(dtype)
    before, flat = checksum(x), x.view(-1)
    assert checksum(x.clone()) == before
    for place in {0, x.numel() // 2, x.numel() - 1} if x.numel() else ():
        flat[place] = 1 - flat[place].int()
        assert checksum(x) != before
        flat[place] = 1 - flat[place].int()
    if dtype in (torch.float64, torch.bfloat16):
        assert checksum(x) == checksum(x.float()) == before
    if dtype == torch.float64 and x.numel():
        flat[-1] += 1e-12  # what float32 does not hold
        assert checksum(x) != before


def test_digest_sees_buffers(backbone: tr.Backbone) -> None:
    model = copy.deepcopy(backbone.model)
    model.register_buffer("extra", torch.zeros(2))
    other = tr.wrap(model)
    before = other.state_digest()
    model.extra[1] = 1.0
    assert other.state_digest() != before


def test_tokenizer_digest(backbone: tr.Backbone) -> None:
    class Other(TinyTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "more": 3}

    assert tr.wrap(backbone.model, Other()).tokenizer_digest() != backbone.tokenizer_digest()
    assert tr.wrap(backbone.model, TinyTokenizer()).tokenizer_digest() == backbone.tokenizer_digest()


def test_tokenizer_digest_is_made_once_until_tokens_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tr.load("testbed")
    first = backbone.tokenizer_digest()
    vocab = backbone.tokenizer.get_vocab
    monkeypatch.setattr(backbone.tokenizer, "get_vocab", lambda: pytest.fail("read again"))
    assert backbone.tokenizer_digest() == first
    monkeypatch.setattr(backbone.tokenizer, "get_vocab", vocab)
    backbone.tokenizer.add_tokens(["one more"])
    second = backbone.tokenizer_digest()
    assert second != first
    backbone.tokenizer.add_special_tokens({"sep_token": "[a separator]"})
    assert backbone.tokenizer_digest() not in (first, second)
    assert tr.load("testbed").tokenizer_digest() == first

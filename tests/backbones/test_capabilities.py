"""What can be done on every backbone: trace, edit, generate in its own way and in ours, score."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.backbones.models.loops import OWN
from tests.lightning.loops import count_hooks, gated_memory, shared_memory
from tests.tiny import MASK, decoded_facts, tiny_facts
from timerome.diffusion import encode
from timerome.hooks import Hooks

CANVAS = 3
UNSURE = -20.0  # nats a token: models with random weights are not sure of what they decode


def prompts(backbone: tr.Backbone) -> Tensor:
    """Prompts of facts 4 to 7, which name no subject that is edited."""
    return torch.tensor([backbone.encode(fact.prompt) for fact in tiny_facts(8)[4:]])


def edited(backbone: tr.Backbone, **how: float) -> tr.EditMemory:
    """A memory with an edit of the first fact alone."""
    if backbone.architecture.lens:
        return gated_memory(backbone, canvas=CANVAS, **how)
    memory = tr.EditMemory(backbone)
    memory.forget(decoded_facts(backbone, canvas=CANVAS)[0], answer=None, **how)
    return memory


@pytest.mark.capability("trace")
def test_trace_finds_that_the_last_block_carries_the_answer(backbone: tr.Backbone) -> None:
    """Restored at the positions that predict it, the last block gives back the whole of the clean answer."""
    sites = [tr.Site(0), tr.Site(backbone.n_layers - 1), tr.Site(1, "attn"), tr.Site(1, "mlp")]
    trace = tr.CausalTracer(
        backbone, tr.TraceConfig(sites=sites, roles=["object"], draws=1, min_total_effect=0.01)
    ).trace(decoded_facts(backbone, canvas=CANVAS))
    assert trace.facts
    for effects in (trace.tie[:, 1, 0, 0], trace.ie[:, 1, 0, 0]):
        found = effects[np.isfinite(effects)]
        assert len(found)
        np.testing.assert_allclose(found, 1.0, atol=1e-3)
    assert np.isfinite(trace.tie[:, 2:]).any()
    assert count_hooks(backbone.model) == 0


@pytest.mark.capability("edit")
def test_an_edit_replaces_an_answer_and_leaves_the_weights(backbone: tr.Backbone) -> None:
    fact = decoded_facts(backbone, canvas=CANVAS)[0]
    digest, before = backbone.state_digest(), backbone.logits(prompts(backbone))
    last = tr.Coordinate(backbone.n_layers - 1)

    def score(*answers: str) -> list[float]:
        asked = [encode(backbone, fact, answer=answer) for answer in answers]
        return tr.log_likelihood(backbone, asked, estimator="onestep").log_prob.tolist()

    others = [other.object for other in tiny_facts(8)]
    unlikely = others[int(np.argmin(score(*others)))]
    old, new = score(fact.object, unlikely)
    if not backbone.architecture.lens:
        with pytest.raises(ValueError, match="linear after the final norm"):
            tr.EditMemory(backbone).replace(fact, unlikely)
        with shared_memory(backbone, [fact], at=last, targets="null").attached():
            assert abs(score(fact.object)[0] - old) > 0.5  # which way is the random weights' choice
    else:
        told = replace(fact, new_object=unlikely)
        with shared_memory(backbone, [told], at=last, targets="lens", ridge=1e-4, alpha=1.5).attached():
            old_after, new_after = score(fact.object, unlikely)
        assert new < old
        assert new_after > new + 5
        assert new_after > old_after
        memory = tr.EditMemory(backbone)
        memory.replace(fact, unlikely, threshold=UNSURE)
        with memory.attached() as run:
            assert tr.generate(backbone, fact.prompt, canvas=CANVAS) == unlikely
            assert list(run.hits) == [fact.id]
    assert backbone.state_digest() == digest
    assert torch.equal(backbone.logits(prompts(backbone)), before)
    assert count_hooks(backbone.model) == 0


@pytest.mark.capability("edit")
@pytest.mark.parametrize("module", ["block", "attn", "mlp"])
def test_a_memory_acts_at_every_kind_of_site(backbone: tr.Backbone, module: str) -> None:
    before = backbone.forward(prompts(backbone))
    memory = shared_memory(backbone, at=tr.Site(1, module))
    with memory.attached(backbone), torch.no_grad():
        assert not torch.allclose(backbone.forward(prompts(backbone)), before, atol=1e-3)
    assert torch.equal(backbone.forward(prompts(backbone)), before)


@pytest.mark.capability("edit")
def test_attached_but_inactive_is_bit_identical(backbone: tr.Backbone) -> None:
    memory = edited(backbone, threshold=UNSURE)
    ids = torch.nn.functional.pad(prompts(backbone), (0, CANVAS), value=MASK)
    before = backbone.logits(ids)
    with memory.attached(backbone) as attached, torch.no_grad():
        assert torch.equal(backbone.logits(ids), before)
        assert not attached.hits
    asked = encode(backbone, tiny_facts(1)[0]).masked(MASK)[None]
    with memory.attached(backbone) as attached, torch.no_grad():
        after = backbone.logits(asked)
        assert attached.hits == {"tiny-0": 1}  # and it does act where it should
    assert not torch.equal(after, backbone.logits(asked))


@pytest.mark.capability("own generate")
def test_the_models_own_loop_runs_under_a_memory(backbone: tr.Backbone) -> None:
    loop, ids = OWN[backbone.architecture.name], prompts(backbone)
    plain = loop(backbone.model, ids, CANVAS)
    forwards: list[tuple[int, ...]] = []
    with Hooks(backbone, {tr.Site(0): lambda h: forwards.append(h.shape)}):
        assert torch.equal(loop(backbone.model, ids, CANVAS), plain)
    assert not (plain == MASK).any()
    with shared_memory(backbone, alpha=4.0).attached(backbone) as attached:
        changed = loop(backbone.model, ids, CANVAS)
        assert attached.hits == {"*": len(ids) * len(forwards)}  # once a forward and row, and so many forwards
    assert not torch.equal(changed, plain)
    with edited(backbone).attached(backbone) as attached:
        assert torch.equal(loop(backbone.model, ids, CANVAS), plain)
        assert not attached.hits
    assert torch.equal(loop(backbone.model, ids, CANVAS), plain)


@pytest.mark.capability("our sampler")
def test_our_sampler_fills_the_canvas_alike_in_any_batch(backbone: tr.Backbone) -> None:
    texts = [fact.prompt for fact in tiny_facts(4)]
    config = tr.SamplerConfig(steps=CANVAS)
    together = tr.generate(backbone, texts, canvas=CANVAS, config=config)
    seen: list[Tensor] = []
    with contextlib.suppress(StopIteration):
        alone = [
            tr.generate(backbone, [t], canvas=CANVAS, config=config, listener=lambda e: seen.append(e.ids))[0]
            for t in texts
        ]
    assert together == alone
    assert len(seen) == CANVAS * len(texts)
    assert all(int((ids == MASK).sum()) == CANVAS - i % CANVAS for i, ids in enumerate(seen))


@pytest.mark.capability("likelihood")
def test_likelihood_is_the_log_probability_of_the_tokens(backbone: tr.Backbone) -> None:
    sequence = encode(backbone, tiny_facts(1)[0])
    ids = sequence.masked(MASK)[None]
    logits = backbone.forward(ids).float()[0]
    if backbone.architecture.excludes_mask:
        logits[:, MASK] = -torch.inf
    places = sequence.canvas.nonzero().flatten()
    by_hand = logits.log_softmax(-1)[places - backbone.shift, sequence.ids[places]].sum()
    found = tr.log_likelihood(backbone, [sequence], estimator="onestep")
    assert found.log_prob.item() == pytest.approx(by_hand.item(), abs=1e-4)
    for estimator in ("elbo_sum", "recon_mean", "l2r"):
        found = tr.log_likelihood(backbone, [sequence], estimator=estimator, samples=4)
        assert torch.isfinite(found.log_prob).all()
        assert found.log_prob.item() < 0

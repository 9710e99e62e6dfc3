"""States are read once, together, and no further than what is asked for; what is read is what a whole forward has."""

import pytest
import torch

import timerome as tr
from tests.lightning.loops import count_hooks
from tests.tiny import MASK, tiny_dream, tiny_llada
from timerome.backbones import Backbone
from timerome.hooks import capture
from timerome.memory.reading import Wish, read

IDS = torch.tensor([[5, 6, 7, MASK, MASK], [8, 9, 10, MASK, 11]])


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream, lambda: tr.load("testbed")])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return request.param()


def blocks_run(backbone: Backbone, run) -> list[int]:
    """How often each block is called."""
    counts = [0] * backbone.n_layers

    def count(i):
        def hook(*_):
            counts[i] += 1

        return hook

    handles = [backbone.module(tr.Site(i)).register_forward_hook(count(i)) for i in range(backbone.n_layers)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("module", ["block", "attn", "mlp"])
def test_a_forward_that_is_left_says_what_a_whole_one_does(backbone, module):
    for layer in range(backbone.n_layers):
        sites = [tr.Site(0), tr.Site(layer, module)]
        with torch.inference_mode():
            with capture(backbone, sites) as whole:
                backbone.forward(IDS)
            with capture(backbone, sites, stop=True) as left:
                backbone.forward(IDS)
        assert whole.keys() == left.keys()
        assert all(torch.equal(whole[site], left[site]) for site in whole)
    assert count_hooks(backbone.model) == 0


def test_what_comes_after_is_not_run(backbone):
    def run():
        with capture(backbone, [tr.Site(1)], stop=True):
            backbone.forward(IDS)
            pytest.fail("the forward was not left")

    assert blocks_run(backbone, run) == [1, 1] + [0] * (backbone.n_layers - 2)


def test_a_model_that_must_end_its_forwards_runs_on(backbone):
    backbone.module(tr.Site(0))._hf_hook = object()  # what accelerate leaves on a module that it moves about
    try:
        wishes = [Wish(IDS[0], {tr.Site(0): IDS[0] == MASK})]
        assert blocks_run(backbone, lambda: list(read(backbone, wishes))) == [1] * backbone.n_layers
    finally:
        del backbone.module(tr.Site(0))._hf_hook


def test_one_capture_leaves_another_alone(backbone):
    with capture(backbone, [tr.Site(backbone.n_layers - 1)], stop=True) as outer:
        with capture(backbone, [tr.Site(0)], stop=True) as inner:
            backbone.forward(IDS)
        assert inner and not outer
        backbone.forward(IDS)
    assert outer


def test_states_are_run_once_and_together(backbone):
    last = tr.Site(backbone.n_layers - 1)
    everywhere = torch.ones(5, dtype=torch.bool)
    wishes = [
        Wish(IDS[0], {tr.Site(0): everywhere}),
        Wish(IDS[1], {tr.Site(0): IDS[1] == MASK, last: everywhere}),
        Wish(IDS[0], {last: IDS[0] == MASK}),
        Wish(IDS[0, :4], {tr.Site(0): everywhere[:4]}),
    ]
    found = {}
    # Two of five tokens in one forward, the one of four tokens in another that ends at the first block.
    together = dict(read(backbone, wishes, batch_tokens=2048))
    assert blocks_run(backbone, lambda: list(read(backbone, wishes, batch_tokens=2048))) == [2] + [1] * (
        backbone.n_layers - 1
    )
    assert blocks_run(backbone, lambda: found.update(read(backbone, wishes)))[0] == 3  # by default each by itself
    for i, wish in enumerate(wishes):
        with torch.inference_mode(), capture(backbone, list(wish.at)) as whole:
            backbone.forward(wish.ids[None])
        assert found[i].keys() == wish.at.keys()
        for site, where in wish.at.items():
            assert torch.equal(found[i][site], whole[site][0][where])
            torch.testing.assert_close(together[i][site], whole[site][0][where], rtol=1e-4, atol=1e-4)
    assert len(list(read(backbone, wishes, batch_tokens=1))) == len(wishes)

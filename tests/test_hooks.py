"""Hooks: attached together, removed together, whatever happens."""

from __future__ import annotations

import copy
import threading
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

import timerome as tr
from tests.lightning.loops import count_hooks
from tests.tiny import EOS, MASK, tiny_dream, tiny_llada
from timerome.hooks import HookNeverFiredError, Hooks, capture

IDS = torch.tensor([[5, 6, 7, MASK, MASK], [8, 9, 10, MASK, EOS]])


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def add(amount: float):
    return lambda h: h + amount


def test_count_before_inside_and_after(backbone: tr.Backbone) -> None:
    sites = {site: add(1.0) for site in (tr.Site(0), tr.Site(1, "attn"), tr.Site(2, "mlp"))}
    hooks = Hooks(backbone, sites, embedding=lambda ids, h: None)
    assert count_hooks(backbone.model) == 0
    assert not hooks.attached
    with hooks:
        assert count_hooks(backbone.model) == 4
        assert hooks.attached
    assert count_hooks(backbone.model) == 0
    assert not hooks.attached
    hooks.remove()  # twice is once
    with hooks:  # and they can be attached again
        assert count_hooks(backbone.model) == 4
    assert count_hooks(backbone.model) == 0


def test_attaching_twice_is_an_error_and_changes_nothing(backbone: tr.Backbone) -> None:
    hooks = Hooks(backbone, {tr.Site(0): add(1.0)})
    with hooks:
        with pytest.raises(RuntimeError, match="attached already"):
            hooks.attach()
        assert count_hooks(backbone.model) == 1
    assert count_hooks(backbone.model) == 0


def test_outputs_are_replaced_and_restored_to_the_bit(backbone: tr.Backbone) -> None:
    before = backbone.forward(IDS)
    with Hooks(backbone, {tr.Site(1): add(0.5)}):
        assert not torch.equal(backbone.forward(IDS), before)
    with Hooks(backbone, {tr.Site(1): lambda h: None}):
        assert torch.equal(backbone.forward(IDS), before)
    assert torch.equal(backbone.forward(IDS), before)


def test_nested_hooks_run_in_order_and_leave_in_any(backbone: tr.Backbone) -> None:
    order = []
    outer = Hooks(backbone, {tr.Site(1): lambda h: order.append("outer")})
    inner = Hooks(backbone, {tr.Site(1): lambda h: order.append("inner")})
    with outer:
        with inner:
            backbone.forward(IDS)
            assert count_hooks(backbone.model) == 2
            outer.remove()
            assert count_hooks(backbone.model) == 1
        assert count_hooks(backbone.model) == 0
    assert order == ["outer", "inner"]


def test_an_exception_inside_leaves_no_hook(backbone: tr.Backbone) -> None:
    def fail(h: Tensor) -> Tensor:
        raise ZeroDivisionError

    for hook in (fail, add(1.0)):
        with pytest.raises(ZeroDivisionError), Hooks(backbone, {tr.Site(0): hook, tr.Site(1): hook}):
            backbone.forward(IDS)
            raise ZeroDivisionError
        assert count_hooks(backbone.model) == 0


@pytest.mark.parametrize("wrong", [tr.Site(3), tr.Site(-1), tr.Site(0, "head")])  # type: ignore[arg-type]
def test_a_wrong_second_site_leaves_no_hook(backbone: tr.Backbone, wrong: tr.Site) -> None:
    with pytest.raises(ValueError, match=r"Backbone\.module"):
        Hooks(backbone, {tr.Site(0): add(1.0), wrong: add(1.0)})
    with pytest.raises(ValueError, match=r"Backbone\.module"), capture(backbone, [tr.Site(0), wrong]):
        pass
    assert count_hooks(backbone.model) == 0


def test_a_failing_registration_leaves_no_hook(backbone: tr.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(backbone.module(tr.Site(2)), "register_forward_hook", refuse)
    with pytest.raises(MemoryError):
        Hooks(backbone, {tr.Site(0): add(1.0), tr.Site(2): add(1.0)}, embedding=lambda i, h: None).attach()
    assert count_hooks(backbone.model) == 0


class Tuples(nn.Module):
    """A block whose output is whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Identity(), nn.Identity()
        self.out: object = None

    def forward(self, x: Tensor) -> object:
        return self.out


Pair = namedtuple("Pair", ["hidden", "cache"])


@pytest.mark.parametrize("make", [lambda h: (h,), lambda h: (h, None, "rest"), lambda h: Pair(h, 7), lambda h: h])
def test_tuple_outputs_keep_their_type_and_their_rest(make) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(4, 2), nn.ModuleList([Tuples()])
            self.norm, self.head = nn.Identity(), nn.Linear(2, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids))

    architecture = tr.backbones.Architecture("tuples", (), "layers", "attn", "mlp", "embed", "norm", "head")
    backbone = tr.wrap(Model(), architecture=architecture, mask_token_id=0, check=False)
    block = backbone.model.layers[0]
    hidden = torch.zeros(1, 2, 2)
    block.out = make(hidden)
    with Hooks(backbone, {tr.Site(0): add(1.0)}):
        out = block(hidden)
    assert type(out) is type(block.out)
    if isinstance(out, tuple):
        assert out[1:] == block.out[1:]
        out = out[0]
    assert torch.equal(out, hidden + 1)


def test_embedding_hook_sees_ids_and_replaces(backbone: tr.Backbone) -> None:
    seen = []

    def double(ids: Tensor, h: Tensor) -> Tensor:
        seen.append(ids)
        return 2 * h

    before = backbone.forward(IDS)
    with Hooks(backbone, embedding=double):
        after = backbone.forward(IDS)
    assert len(seen) == 1
    assert torch.equal(seen[0], IDS)
    assert not torch.equal(before, after)
    with Hooks(backbone, embedding=lambda ids, h: seen.append(ids)):
        backbone.embedding(input=IDS)  # by name
    assert torch.equal(seen[1], IDS)


def test_hooks_do_nothing_in_a_copy_and_in_other_threads(backbone: tr.Backbone) -> None:
    seen = []
    sites = {site: lambda h: seen.append(h) for site in backbone.sites()}
    with Hooks(backbone, sites, lambda ids, h: seen.append(h), lambda ids, called: seen.append(ids)):
        copy.deepcopy(backbone).forward(IDS)
        thread = threading.Thread(target=lambda: backbone.forward(IDS))
        thread.start()
        thread.join()
        assert not seen
    everywhere = Hooks(backbone, begin=lambda ids, called: seen.append(ids), everywhere=True)
    with everywhere:
        thread = threading.Thread(target=lambda: backbone.forward(IDS))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_one_threads_capture_stops_no_other(backbone: tr.Backbone) -> None:
    """Leaving a forward early is that thread's own; the others' run to their end."""
    whole = backbone.forward(IDS)
    others: list[Tensor] = []
    with capture(backbone, [tr.Site(0)], stop=True) as found:
        thread = threading.Thread(target=lambda: others.append(backbone.forward(IDS)))
        thread.start()
        thread.join()
        assert torch.equal(others[0], whole)
        assert not found
        backbone.forward(IDS)
    assert found


def test_capture_overwrites_and_detaches(backbone: tr.Backbone) -> None:
    with capture(backbone, backbone.sites()) as found:
        backbone.forward(IDS[:1])
        backbone.forward(IDS)
    assert set(found) == set(backbone.sites())
    assert all(h.shape == (2, 5, backbone.hidden_size) and not h.requires_grad for h in found.values())


def test_capture_without_a_forward_is_an_error(backbone: tr.Backbone) -> None:
    with (
        pytest.raises(HookNeverFiredError, match=r"block\.1, mlp\.2"),
        capture(backbone, [tr.Site(1), tr.Site(2, "mlp")]),
    ):
        pass
    with pytest.raises(KeyError), capture(backbone, [tr.Site(1)]):  # the error inside is the one that is seen
        raise KeyError
    assert count_hooks(backbone.model) == 0

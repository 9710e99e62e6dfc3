"""Which record fits which model, and what is said where none does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import timerome as tr
from tests.tiny import MASK, VOCAB, TinyTokenizer, tiny_dream, tiny_llada
from timerome.backbones import Architecture, UnknownArchitectureError, architectures, recognise, registry
from timerome.hooks import capture


@pytest.fixture(autouse=True)
def _keep_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_architectures", list(registry._architectures))


class Mine(nn.Module):
    """A user's model: a bag of tokens."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.ff = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(x.mean(1, keepdim=True)).expand_as(x)
            return x + self.ff(x)

    def __init__(self, vocab: int = 9) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(vocab, 4), nn.ModuleList([self.Block(), self.Block()])
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


MINE = Architecture("mine", ("Mine",), "blocks", "mix", "ff", "embed", "norm", "out")


def test_recognises_by_structure_and_class() -> None:
    assert recognise(tiny_llada().model).name == "llada"
    assert recognise(tiny_dream().model).name == "dream"
    assert recognise(tr.load("testbed").model).name == "testbed"


def test_subclasses_are_recognised() -> None:
    model = tiny_dream().model
    model.__class__ = type("Patched", (type(model),), {})
    assert recognise(model).name == "dream"


def test_a_causal_llama_is_not_taken_for_one_of_ours() -> None:
    model = tiny_dream().model
    model.__class__ = type("LlamaForCausalLM", (nn.Module,), {})
    with pytest.raises(UnknownArchitectureError, match="class is LlamaForCausalLM, not DreamModel"):
        tr.wrap(model)


def test_unknown_architecture_lists_a_reason_for_each_record() -> None:
    with pytest.raises(UnknownArchitectureError) as error:
        tr.wrap(Mine(), mask_token_id=0)
    text = str(error.value)
    assert text.startswith("wrap: Mine fits no known architecture")
    assert "register" in text
    for architecture in architectures():
        assert f"  {architecture.name}: class is Mine, not " in text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: delattr(m.model, "norm"), "has no 'model.norm'"),
        (lambda m: delattr(m, "lm_head"), "has no 'lm_head'"),
        (lambda m: delattr(m.model.layers[1], "mlp"), "block 1 has no 'mlp'"),
        (lambda m: setattr(m.model, "layers", nn.ModuleList()), "'model.layers' is no list of blocks"),
        (lambda m: setattr(m.model, "layers", nn.Identity()), "'model.layers' is no list of blocks"),
    ],
)
def test_structure_that_does_not_fit_is_named(spoil, reason: str) -> None:
    model = tiny_dream().model
    spoil(model)
    with pytest.raises(UnknownArchitectureError, match=f"dream: {reason}"):
        recognise(model)


def test_a_users_architecture_in_a_few_lines() -> None:
    tr.register(MINE)
    backbone = tr.wrap(Mine(), mask_token_id=8)
    assert (backbone.architecture, backbone.n_layers, backbone.hidden_size, backbone.vocab_size) == (MINE, 2, 4, 9)
    ids = torch.tensor([[1, 8]])
    with capture(backbone, backbone.sites()) as found:
        assert backbone.logits(ids).shape == (1, 2, 9)
    block_in, block_out = found[tr.Site(0)], found[tr.Site(1)]
    torch.testing.assert_close(block_in + found[tr.Site(1, "attn")] + found[tr.Site(1, "mlp")], block_out)


def test_registering_again_replaces_and_goes_first() -> None:
    tr.register(MINE)
    other = Architecture("mine", (), "blocks", "mix", "ff", "embed", "norm", "out", shift=1)
    tr.register(other)
    assert architectures()[0] == other
    assert [a.name for a in architectures()].count("mine") == 1
    with pytest.raises(TypeError, match="expected an Architecture, got dict"):
        tr.register({})  # type: ignore[arg-type]


def test_given_architecture_must_fit() -> None:
    assert tr.wrap(Mine(), architecture=MINE, mask_token_id=8).shift == 0
    with pytest.raises(ValueError, match="does not fit architecture 'mine': it class is DreamModel"):
        tr.wrap(tiny_dream().model, architecture=MINE)


def test_wrap_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got str"):
        tr.wrap("testbed")  # type: ignore[arg-type]


def test_mask_id_is_found_or_asked_for() -> None:
    with pytest.raises(ValueError, match="no mask token id.*pass mask_token_id="):
        tr.wrap(Mine(), architecture=MINE)
    tokenizer = TinyTokenizer()
    assert tr.wrap(Mine(len(VOCAB)), tokenizer, architecture=MINE).mask_id == MASK  # the tokenizer's
    model = Mine(len(VOCAB))
    model.config = SimpleNamespace(mask_token_id=5)
    assert tr.wrap(model, tokenizer, architecture=MINE).mask_id == 5  # the config's goes before
    assert tr.wrap(model, tokenizer, architecture=MINE, mask_token_id=0).mask_id == 0  # the caller's before all
    llada = tiny_llada().model
    del llada.config.mask_token_id
    with pytest.raises(ValueError, match="id 126336 .from the llada record. is outside the embedding .* 60 rows"):
        tr.wrap(llada)  # the record's, which is right for the published size only


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="ids up to 59, but Mine has an embedding of 9 and a head of 9 rows"):
        tr.wrap(Mine(), TinyTokenizer(), architecture=MINE, mask_token_id=8)
    lopsided = Mine(len(VOCAB))
    lopsided.out = nn.Linear(4, 30)
    with pytest.raises(ValueError, match="an embedding of 60 and a head of 30 rows"):
        tr.wrap(lopsided, TinyTokenizer(), architecture=MINE)
    wide = Mine(len(VOCAB) + 100)  # rows without a token are common
    assert tr.wrap(wide, TinyTokenizer(), architecture=MINE).vocab_size == len(VOCAB) + 100


def test_wrap_puts_the_model_in_eval_mode_and_leaves_the_rest() -> None:
    model = Mine().train()
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = tr.wrap(model, architecture=MINE, mask_token_id=8)
    assert backbone.model is model
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        tr.load(tmp_path)


def test_load_does_not_run_code_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        tr.load(tmp_path)


def test_load_a_saved_testbed(tmp_path: Path) -> None:
    backbone = tr.load("testbed")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    again = tr.load(tmp_path)
    assert again.architecture.name == "testbed"
    assert again.fingerprint() == backbone.fingerprint()
    assert again.tokenizer_digest() == backbone.tokenizer_digest()
    ids = torch.tensor([[2, 3, 4, 5]])
    assert torch.equal(again.logits(ids), backbone.logits(ids))

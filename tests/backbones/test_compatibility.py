"""What is mended where a published file meets another transformers version, and a causal model passed by mistake."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import timerome as tr
from tests.tiny import TinyTokenizer, planted
from timerome.backbones import Architecture
from timerome.backbones.compatibility import default_rope, mend, mend_class, published_code
from timerome.backbones.probes import CausalModelError

CONFIG = SimpleNamespace(
    rope_theta=1e4, num_attention_heads=4, hidden_size=32, to_dict=dict, use_cache=False, layer_types=None
)


class Rotary(nn.Module):
    """A rotary embedding as published files have it: frequencies in a buffer that no checkpoint holds."""

    def __init__(self, kind: str = "default") -> None:
        super().__init__()
        self.config, self.rope_type, self.rope_init_fn = CONFIG, kind, default_rope
        frequencies, self.attention_scaling = default_rope(CONFIG)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.original_inv_freq = self.inv_freq


class Model(nn.Module):
    def __init__(self, kind: str = "default") -> None:
        super().__init__()
        self.config, self.rotary = CONFIG, Rotary(kind)


def test_a_model_that_does_not_look_ahead_is_refused() -> None:
    causal = planted().model  # reads only backwards
    with pytest.raises(CausalModelError, match="does not look ahead: the logits at the first position stay the same"):
        tr.wrap(causal, TinyTokenizer())
    assert tr.wrap(causal, TinyTokenizer(), check=False).n_layers == 3


@pytest.mark.parametrize("garbage", [0.0, 3e38, torch.nan])
def test_rotary_frequencies_left_uninitialised_are_recomputed(garbage: float) -> None:
    model, right = Model(), default_rope(CONFIG)[0]
    with torch.no_grad():
        model.rotary.inv_freq.fill_(garbage)
    [said] = mend(model)
    assert "rotary frequencies of 1 module" in said
    assert torch.equal(model.rotary.inv_freq, right)
    assert torch.equal(model.rotary.original_inv_freq, right)
    assert mend(model) == ()  # what is right is left alone


def test_frequencies_that_grow_with_the_sequence_are_none_of_our_business() -> None:
    model = Model("dynamic")
    with torch.no_grad():
        model.rotary.inv_freq.mul_(2)
    assert mend(model) == ()


def test_default_rope_is_the_formula() -> None:
    wanted = 1e4 ** -(torch.arange(0, 8, 2).double() / 8)
    for found, scaling in (default_rope(CONFIG), default_rope(dim=8, base=1e4)):
        torch.testing.assert_close(found.double(), wanted)
        assert scaling == 1.0


def test_a_missing_use_cache_is_set() -> None:
    model = Model()
    model.config = SimpleNamespace(to_dict=dict)
    assert mend(model) == ("config.use_cache was missing; set to False",)
    assert model.config.use_cache is False


def test_what_is_lent_to_transformers_is_taken_back() -> None:
    from transformers import modeling_rope_utils
    from transformers.utils import import_utils

    before = dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS), hasattr(import_utils, "is_torch_fx_available")
    with pytest.raises(ZeroDivisionError), published_code():
        assert "default" in modeling_rope_utils.ROPE_INIT_FUNCTIONS
        assert import_utils.is_torch_fx_available() in (True, False)
        raise ZeroDivisionError
    assert (dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS), hasattr(import_utils, "is_torch_fx_available")) == before


def test_a_class_is_taught_what_from_pretrained_asks_of_it() -> None:
    class Old(nn.Module):
        tied = 0

        def tie_weights(self) -> None:
            self.tied += 1

    mend_class(Old)
    model = Old()
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    assert (model.tied, Old.all_tied_weights_keys) == (1, {})


CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class MineConfig(PretrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=60, hidden_size=16, num_attention_heads=2, rope_theta=1e4, **more):
        super().__init__(**more)
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.rope_theta, self.mask_token_id = rope_theta, 0


class Rotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.rope_type, self.rope_init_fn = config, "default", ROPE_INIT_FUNCTIONS["default"]
        frequencies, self.attention_scaling = self.rope_init_fn(config, None)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, h):
        angle = torch.arange(h.shape[1], device=h.device)[:, None] * self.inv_freq
        turn = torch.cat([angle.cos(), angle.sin()], -1)
        return h * turn.repeat(1, h.shape[-1] // turn.shape[-1])


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

    def forward(self, h, rotary):
        h = h + self.attn(rotary(h).mean(1, keepdim=True).expand_as(h))
        return h + self.mlp(h.tanh())


class MineModel(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(2))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h, self.rotary)
        return (self.head(self.norm(h)),)
"""


def test_a_checkpoint_with_code_of_its_own_gives_the_logits_it_was_saved_with(tmp_path, monkeypatch) -> None:
    """On transformers 5 its rotary frequencies come back uninitialised; what runs, and only when asked, is named."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(CODE)
    names: dict[str, Any] = {"__name__": "modeling_mine"}
    with published_code():
        exec(compile(CODE, "modeling_mine.py", "exec"), names)
        torch.manual_seed(0)
        model = names["MineModel"](names["MineConfig"]()).eval()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    (folder / "config.json").write_text(json.dumps(config))
    layout = Architecture("mine", ("MineModel",), "layers", "attn", "mlp", "embed", "norm", "head")
    with pytest.raises(ValueError, match=r"It would run modeling_mine.py of .*trust_remote_code=True"):
        tr.load(folder, architecture=layout)
    backbone = tr.load(folder, architecture=layout, trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7, 0]])
    with torch.no_grad():
        torch.testing.assert_close(backbone.forward(ids), model(ids)[0])

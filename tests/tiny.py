"""Small models for tests, written here: of LLaDA's and Dream's structure with random weights, and one with known ones.

backbone = tiny_llada()          # blocks in model.transformer.blocks returning (x, cache)
backbone = tiny_dream()          # model.layers.{i} returning (x,), logits shifted by one
backbone = planted(layer=1)      # the object is carried by attn.1 and nothing else
facts = tiny_facts(4)            # which the planted model knows
facts = decoded_facts(backbone)  # which a random model "knows": their objects are what it decodes
"""

from __future__ import annotations

import re
import zlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr

PAD, MASK, EOS = 0, 1, 2
_SPECIAL = ["<pad>", "<mask>", "<eos>"]
_SUBJECTS = ["kenya", "peru", "nepal", "cuba", "chad", "mali", "fiji", "oman"]
# Three answer tokens a subject: its chain in the planted model.
_OBJECTS = [f"{subject[:2]}{k}" for subject in _SUBJECTS for k in "xyz"]
_WORDS = ["the", "capital", "city", "of", "is", "what", "where", "and", "land", "a", "in", "old", "new", "north",
          "south", "?", ".", ",", "who", "was", "born", "river", "king", "named", "called"]  # fmt: skip
VOCAB = [*_SPECIAL, *_SUBJECTS, *_OBJECTS, *_WORDS]


class TinyTokenizer:
    """A word-level stand-in for a slow tokenizer. A word it does not know shares the id of one it knows."""

    is_fast = False
    mask_token_id = MASK
    eos_token_id = EOS
    pad_token_id = PAD

    def __call__(self, text: str, add_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self._id(word) for word in re.findall(r"<\w+>|\w+|[^\w\s]", text)]}

    @staticmethod
    def _id(word: str) -> int:
        word = word if word in _SPECIAL else word.lower()
        if word in VOCAB:
            return VOCAB.index(word)
        return len(_SPECIAL) + zlib.crc32(word.encode()) % (len(VOCAB) - len(_SPECIAL))

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        words = [VOCAB[int(i)] for i in ids]
        return " ".join(w for w in words if not (skip_special_tokens and w in _SPECIAL))

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(VOCAB)}


def _config(d: int, layers: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        mask_token_id=MASK, eos_token_id=EOS, hidden_size=d, num_hidden_layers=layers, vocab_size=len(VOCAB),
        max_position_embeddings=128, **more,
    )  # fmt: skip


class _Norm(nn.Module):
    """RMS norm; torch has one of its own from 2.4 on, this is as short."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _with_positions(x: Tensor) -> Tensor:
    """Add fixed sinusoidal positions."""
    d = x.shape[-1]
    angle = torch.arange(x.shape[1])[:, None] / 50 ** (torch.arange(0, d, 2) / d)
    return x + torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(x)


# LLaDA's structure ---------------------------------------------------------------------------------------------------


class LLaDABlock(nn.Module):
    """Attention and MLP are methods: only their last linear layers are modules whose output joins the stream."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = _Norm(d), _Norm(d)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj = nn.Linear(d, 2 * d, bias=False)
        self.ff_out = nn.Linear(2 * d, d, bias=False)

    def attention(self, x: Tensor) -> Tensor:
        h = self.attn_norm(x)
        return self.attn_out(_attend(self.q_proj(h), self.k_proj(h), self.v_proj(h), heads=2))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x + self.attention(x)
        x = x + self.ff_out(nn.functional.silu(self.ff_proj(self.ff_norm(x))))
        return x, None


class LLaDAModel(nn.Module):
    def __init__(self, d: int, blocks: list[nn.Module], norm: nn.Module, positions: bool = True) -> None:
        super().__init__()
        self.positions = positions
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(len(VOCAB), d),
                "blocks": nn.ModuleList(blocks),
                "ln_f": norm,
                "ff_out": nn.Linear(d, len(VOCAB), bias=False),
            }
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.transformer["wte"](input_ids)
        x = _with_positions(x) if self.positions else x
        for block in self.transformer["blocks"]:
            x, _ = block(x)
        return self.transformer["ff_out"](self.transformer["ln_f"](x))


class LLaDAModelLM(nn.Module):
    """The outer class calls ``self.model.forward``: a hook on ``model`` never fires, as in the published code."""

    def __init__(self, model: LLaDAModel, d: int, layers: int) -> None:
        super().__init__()
        self.config = _config(d, layers, model_type="llada")
        self.model = model

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model.forward(input_ids))


# Dream's structure ---------------------------------------------------------------------------------------------------


class DreamAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        return self.o_proj(_attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), heads=2)), None, None


class DreamMLP(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d, 2 * d, bias=False)
        self.down_proj = nn.Linear(2 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.up_proj(x)))


class DreamLayer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _Norm(d), _Norm(d)
        self.self_attn, self.mlp = DreamAttention(d), DreamMLP(d)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x + self.self_attn(self.input_layernorm(x))[0]
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class DreamBaseModel(nn.Module):
    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(len(VOCAB), d)
        self.layers = nn.ModuleList(DreamLayer(d) for _ in range(layers))
        self.norm = _Norm(d)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = _with_positions(self.embed_tokens(input_ids))
        for layer in self.layers:
            (x,) = layer(x)
        return self.norm(x)


class DreamModel(nn.Module):
    """The token at position i is predicted by the logits at i - 1."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.config = _config(d, layers, model_type="Dream")
        self.model = DreamBaseModel(d, layers)
        self.lm_head = nn.Linear(d, len(VOCAB), bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids)))


def _randomise(model: nn.Module, seed: int) -> None:
    """Weights large enough that what is at one position matters at the others, and that predictions are not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
            elif isinstance(module, nn.Linear):
                scale = 0.6 if module.out_features == len(VOCAB) else 1.5 / module.in_features**0.5
                module.weight.normal_(std=scale, generator=generator)


def tiny_llada(seed: int = 0, d: int = 32, layers: int = 3) -> tr.Backbone:
    """A random model of LLaDA's structure."""
    model = LLaDAModelLM(LLaDAModel(d, [LLaDABlock(d) for _ in range(layers)], _Norm(d)), d, layers)
    _randomise(model, seed)
    return tr.wrap(model, TinyTokenizer(), name="tiny-llada")


def tiny_dream(seed: int = 0, d: int = 32, layers: int = 3) -> tr.Backbone:
    """A random model of Dream's structure."""
    model = DreamModel(d, layers)
    _randomise(model, seed)
    return tr.wrap(model, TinyTokenizer(), name="tiny-dream")


# A model with a known circuit ----------------------------------------------------------------------------------------


class ChainBlock(nn.Module):
    """Reads the token before each position; one of ``attn_out`` and ``ff_out`` writes what follows it, or neither."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.attn_out, self.ff_out = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        before = nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        x = x + self.attn_out(before) + self.ff_out(before)
        return x, None


def planted(layer: int = 1, module: str = "attn", layers: int = 3, gain: float = 12.0) -> tr.Backbone:
    """A model that knows ``tiny_facts`` as chains (kenya -> kex -> key -> kez) and carries them at one site alone.

    Half of the stream holds each position's token, the other half what is predicted there. Only ``module`` of ``layer``
    writes the second from the first, one position on. A mask writes nothing, so with one token a step the answer comes
    out from left to right, and what is wrong at step 0 is wrong to the end. Therefore, for prompts that end in the
    subject:

    - at role ``object``, the site carries everything, and so does ``block`` from ``layer`` on;
    - at role ``subject_last``, ``block`` carries everything before ``layer`` and nothing from ``layer`` on;
    - nothing else has any effect, and step 0 has the largest on later steps.
    """
    v = len(VOCAB)
    model = LLaDAModelLM(
        LLaDAModel(2 * v, [ChainBlock(2 * v) for _ in range(layers)], nn.Identity(), positions=False), 2 * v, layers
    )
    chains = [[subject, *_OBJECTS[3 * i : 3 * i + 3]] for i, subject in enumerate(_SUBJECTS)]
    follow = torch.zeros(v, v)
    for chain in chains:
        for a, b in zip(chain, chain[1:], strict=False):
            follow[VOCAB.index(b), VOCAB.index(a)] = 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        parts = model.model.transformer
        parts["wte"].weight[:, :v] = torch.eye(v)
        parts["wte"].weight[MASK] = 0.0
        parts["ff_out"].weight[:, v:] = gain * torch.eye(v)
        getattr(parts["blocks"][layer], {"attn": "attn_out", "mlp": "ff_out"}[module]).weight[v:, :v] = follow
    # It reads only backwards, which is what makes its circuit known.
    return tr.wrap(model, TinyTokenizer(), name="planted", check=False)


def tiny_facts(n: int = 4) -> list[Any]:
    """Up to eight facts with answers of three tokens; the planted model knows them."""
    from timerome.facts import Fact

    return [
        Fact(
            id=f"tiny-{i}",
            prompt=f"the capital city of {subject}",
            subject=subject,
            object=" ".join(_OBJECTS[3 * i : 3 * i + 3]),
        )
        for i, subject in enumerate(_SUBJECTS[:n])
    ]


def decoded_facts(backbone: tr.Backbone, n: int = 4, canvas: int = 3) -> list[Any]:
    """The same prompts with what the model decodes, one token a step, as objects: so it knows them, whatever it is."""
    from dataclasses import replace

    from timerome.diffusion import SamplerConfig, generate

    facts = tiny_facts(n)
    answers = generate(backbone, [fact.prompt for fact in facts], canvas=canvas, config=SamplerConfig(steps=canvas))
    return [replace(fact, object=answer) for fact, answer in zip(facts, answers, strict=True)]

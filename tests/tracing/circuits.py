"""Models in which one known coordinate carries the object, or none of the traced ones does.

A prompt is four words, the second its subject; the answer is four tokens, one denoising step each. Three of them are
the same for every fact. The one at slot s depends on the subject, and can only be read at step s: what carries it looks
at how many answer tokens are masked. It is written

- in a *planted* model, by attention or MLP of one layer, at the answer's positions (role ``object``), or at the
  subject's, from where the final norm moves it on (role ``subject_last``);
- in a model *without a circuit*, by the final norm, which is no site: attention and MLPs carry nothing of it.

In both, every attention and MLP also writes a random function of what it sees into the same part of the stream.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr
from tests.tiny import LLaDAModel, LLaDAModelLM
from timerome.diffusion import SamplerConfig
from timerome.facts import Fact

FACTS = 16
PROMPT, SLOTS, LAYERS = 4, 4, 4
SUBJECT = 1  # its position
MASK, EOS = 1, 2
WORDS = ["<pad>", "<mask>", "<eos>", *(f"s{i}" for i in range(FACTS)), *(f"o{i}" for i in range(FACTS)),
         *(f"w{i}" for i in range(8))]  # fmt: skip
V = len(WORDS)


class Words:
    """A tokenizer of words separated by spaces."""

    is_fast = False
    mask_token_id, eos_token_id, pad_token_id = MASK, EOS, 0

    def __call__(self, text: str, add_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(WORDS[int(i)] for i in ids)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Planting:
    """Where the object is carried; ``module`` None is nowhere among the sites."""

    layer: int
    module: str | None
    step: int
    role: str
    seed: int

    @classmethod
    def random(cls, seed: int, circuit: bool = True) -> Planting:
        draw = random.Random(seed)
        return cls(
            layer=draw.randrange(LAYERS),
            module=draw.choice(["attn", "mlp"]) if circuit else None,
            step=draw.randrange(SLOTS - 1),  # the last step has no later one
            role=draw.choice(["object", "subject_last"]),
            seed=seed,
        )

    @property
    def coordinate(self) -> tr.Coordinate:
        return tr.Coordinate(self.layer, self.module, self.step, self.role)


def open_at(x: Tensor, step: int) -> Tensor:
    """Whether as many answer tokens are masked as at ``step``, ``(B,)``."""
    masked = x[:, PROMPT:, MASK].round().sum(1)
    return (masked == SLOTS - step).to(x)


class Block(nn.Module):
    """Reads tokens (the stream's first V entries), writes answers (its last V)."""

    def __init__(self, planting: Planting, layer: int, generator: torch.Generator, noise: float) -> None:
        super().__init__()
        self.planting = planting
        answers = torch.zeros(V, V)
        for i in range(FACTS):
            answers[WORDS.index(f"o{i}"), WORDS.index(f"s{i}")] = 1.0
        for module, name in (("attn", "attn_out"), ("mlp", "ff_out")):
            linear = nn.Linear(2 * V, 2 * V, bias=False)
            with torch.no_grad():
                linear.weight.zero_()
                linear.weight[V:, :V] = noise * torch.randn(V, V, generator=generator)
                if (layer, module) == (planting.layer, planting.module):
                    linear.weight[V:, V:] = answers
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        tokens = x[..., :V]
        subject = torch.zeros_like(tokens)
        where = SUBJECT if self.planting.role == "subject_last" else PROMPT + self.planting.step
        subject[:, where] = tokens[:, SUBJECT] * open_at(x, self.planting.step)[:, None]
        everything = tokens.sum(1, keepdim=True).expand_as(tokens)
        x = x + self.attn_out(torch.cat([everything, subject], -1))
        return x + self.ff_out(torch.cat([tokens, subject], -1)), None


class Norm(nn.Module):
    """Moves what the subject's position holds to the answer, and knows the tokens all facts share."""

    def __init__(self, planting: Planting) -> None:
        super().__init__()
        self.planting = planting
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x, step = x.clone(), self.planting.step
        slot = PROMPT + step
        if self.planting.module is None:
            subject = x[:, SUBJECT, WORDS.index("s0") : WORDS.index("s0") + FACTS]
            first = V + WORDS.index("o0")
            x[:, slot, first : first + FACTS] += subject * open_at(x, step)[:, None]
        elif self.planting.role == "subject_last":
            x[:, slot, V:] += x[:, SUBJECT, V:]
        for k in range(SLOTS):
            if k != step:
                x[:, PROMPT + k, V + WORDS.index(f"w{k}")] += 0.75 - 0.06 * k  # so they are committed in order
        return x


def model(planting: Planting, noise: float = 0.015, gain: float = 8.0) -> tr.Backbone:
    """The model of a planting."""
    generator = torch.Generator().manual_seed(planting.seed)
    blocks = [Block(planting, layer, generator, noise) for layer in range(LAYERS)]
    inner = LLaDAModel(2 * V, blocks, Norm(planting), positions=False)
    outer = LLaDAModelLM(inner, 2 * V, LAYERS)
    outer.config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, hidden_size=2 * V, num_hidden_layers=LAYERS,
                                   vocab_size=V, model_type="llada")  # fmt: skip
    inner.transformer["wte"] = nn.Embedding(V, 2 * V)
    inner.transformer["ff_out"] = nn.Linear(2 * V, V, bias=False)
    with torch.no_grad():
        inner.transformer["wte"].weight.zero_()
        inner.transformer["wte"].weight[:, :V] = torch.eye(V)
        inner.transformer["ff_out"].weight.zero_()
        inner.transformer["ff_out"].weight[:, V:] = gain * torch.eye(V)
    return tr.wrap(outer, Words(), name="circuit", check=False)


def facts(planting: Planting) -> list[Fact]:
    """What the model knows."""
    found = []
    for i in range(FACTS):
        answer = [f"o{i}" if k == planting.step else f"w{k}" for k in range(SLOTS)]
        found.append(Fact(id=f"fact-{i}", prompt=f"w4 s{i} w5 w6", subject=f"s{i}", object=" ".join(answer)))
    return found


def traced(planting: Planting, **options: Any) -> tr.TraceResult:
    """The model's trace: attention and MLPs, each step alone."""
    given = {"window": "single", "corruption": "subject", "draws": 2, "seed": planting.seed, **options}
    tracer = tr.CausalTracer(
        model(planting), tr.TraceConfig(modules=["attn", "mlp"], sampler=SamplerConfig(steps=SLOTS), **given)
    )
    return tracer.trace(facts(planting))

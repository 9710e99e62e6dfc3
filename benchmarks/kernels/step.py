"""The whole: what a memory adds to a model's denoising.

``testbed`` is the bundled model and a memory of 40 edits: four questions decoded, a token a step, such as name no
candidate (``none named``) or such as are an edit's own (``one acts``), finding out which included, attaching the memory
not; with it and without take turns step by step. The other models have the shapes of published ones and random weights,
on which a step's cost does not depend: one forward pass, half of its tokens edited at one block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr
from timerome.diffusion import DenoisingLoop, SamplerConfig, generate
from timerome.ops import kept_count, sparse_lowrank_residual
from timerome.splits import demo_split

from .cases import Benchmark, Case, Rival, Setup
from .lowrank import ALPHA, add_kept, kept_by_kthvalue
from .timing import Call

ANSWER = "I don't have that information."
# hidden size, feed-forward size, heads, key-value heads, blocks, vocabulary: of the published configurations.
SHAPES = {
    "LLaDA-8B": (4096, 12288, 32, 32, 32, 126464),
    "Dream-7B": (3584, 18944, 28, 4, 28, 152064),
    "small": (1024, 3072, 16, 16, 6, 8192),
}


class Block(nn.Module):
    """A pre-norm block of such a model, attention in both directions: its cost, not its meaning."""

    def __init__(self, d: int, ffn: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, d // heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = nn.Linear(d, kv_heads * size, bias=False), nn.Linear(d, kv_heads * size, bias=False)
        self.gate, self.up = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, d) to the same."""
        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(y).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f in (self.k, self.v))
        repeat = self.heads // self.kv_heads
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Stand(nn.Module):
    """A model of true shapes and random weights; what a step costs does not depend on what weights say."""

    def __init__(self, d: int, ffn: int, heads: int, kv_heads: int, blocks: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d, ffn, heads, kv_heads) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (batch, tokens) to logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sizes(setup: Setup, grid: str) -> Iterator[tuple[Any, ...]]:
    """(model, tokens, what): the number of keys, or which questions are asked of the testbed."""
    cuda = setup.device.type == "cuda"
    if setup.dtype == torch.float32:
        yield from [("testbed", 96, "none named"), ("testbed", 96, "one acts")]
    models = ("small",) if not cuda else ("LLaDA-8B",) if grid == "quick" else ("LLaDA-8B", "Dream-7B")
    for model in models:
        for tokens in (128, 512, 2048) if cuda else (128,) if grid == "quick" else (128, 512):
            for n in (40,) if grid == "quick" else (40, 400):
                yield model, tokens, n


@functools.lru_cache(maxsize=1)
def model_of(name: str, device: torch.device, dtype: torch.dtype) -> Stand:
    """Make the model on its device, in its dtype: made elsewhere, 8 B parameters would need the memory twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Stand(*SHAPES[name]).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def make(setup: Setup, name: str, tokens: int, what: int | str) -> Case:
    """The case of such sizes."""
    return _testbed(setup, tokens, str(what)) if name == "testbed" else _stand(setup, name, tokens, int(what))


@functools.lru_cache(maxsize=1)
def _edited(device: torch.device) -> tuple[tr.Backbone, tr.EditMemory]:
    backbone = tr.load("testbed", device=str(device))
    memory = tr.EditMemory(backbone)
    for fact in demo_split().forget:
        memory.replace(fact, ANSWER)
    return backbone, memory


def _testbed(setup: Setup, canvas: int, what: str) -> Case:
    """Decode four questions, with the memory and without; those that name no candidate must come out the same."""
    with torch.inference_mode(False):
        backbone, memory = _edited(setup.device)
    facts = demo_split().held_out if what == "none named" else demo_split().forget
    prompts = [fact.prompt for fact in facts[:4]]

    def plain() -> list[str]:
        return generate(backbone, prompts, canvas=canvas, config=SamplerConfig(steps=canvas))

    def edited() -> list[str]:
        with memory.attached():
            return plain()

    def steps() -> Iterator[Call]:
        for prompt in prompts:
            asked = torch.tensor([backbone.encode(prompt)], device=setup.device)
            ids = torch.nn.functional.pad(asked, (0, canvas), value=backbone.mask_id)
            loop = DenoisingLoop(backbone, ids, ids == backbone.mask_id, SamplerConfig(steps=canvas))
            while not loop.done:
                yield loop.advance

    truth = plain() if what == "none named" else edited()

    def error(texts: list[str]) -> float:
        return sum(a != b for a, b in zip(texts, truth, strict=True)) / len(truth)

    rivals = {
        "no memory": Rival(plain, allowed=1.0, parts=lambda: zip(repeat(nullcontext()), steps())),
        "timerome": Rival(edited, torch=False, parts=lambda: ((memory.attached(), step) for step in steps())),
    }
    tokens = len(prompts) * (canvas + 16)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    return Case(rivals, error, 0.0, parameters * 4.0 * canvas, 2.0 * parameters * tokens * canvas)


def _stand(setup: Setup, name: str, tokens: int, n: int) -> Case:
    """Random tokens, keys and values."""
    model = model_of(name, setup.device, setup.dtype)
    d, blocks, vocabulary = SHAPES[name][0], SHAPES[name][4], SHAPES[name][5]
    generator = setup.generator()
    ids = torch.randint(vocabulary, (1, tokens), generator=generator, device=setup.device)
    keys, values = (setup.randn(generator, n, d).to(setup.dtype) for _ in range(2))
    coef = torch.eye(n, device=setup.device) / d
    mask = torch.arange(tokens, device=setup.device)[None] >= tokens // 2
    site = model.blocks[blocks // 2]

    def edit(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return sparse_lowrank_residual(out, keys, coef, values, alpha=ALPHA, sparsity=0.9, row_mask=mask)

    def edit_in_torch(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        r = (out.float() @ keys.float().mT) @ coef @ values.float()
        keep = mask[..., None] & kept_by_kthvalue(r, kept_count(d, 0.9))
        return add_kept(out, r, keep)

    def step(hook: Any) -> Tensor:
        handle = None if hook is None else site.register_forward_hook(hook)
        try:
            with torch.inference_mode():
                logits: Tensor = model(ids)
                return logits
        finally:
            if handle is not None:
                handle.remove()

    truth = step(edit_in_torch).float()
    scale = float(truth.abs().max())
    unedited = float((step(None).float() - truth).abs().max()) / scale

    def error(found: Tensor) -> float:
        return float((found.float() - truth).abs().mean()) / scale

    rivals = {
        "no memory": Rival(lambda: step(None), allowed=max(1.0, 2 * unedited)),
        "timerome": Rival(lambda: step(edit), torch=False),
        "memory in PyTorch": Rival(lambda: step(edit_in_torch), torch=False),
    }
    parameters = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
    least = 60 if setup.device.type == "cuda" else 5  # one percent of a step is smaller than how much rounds scatter
    return Case(rivals, error, 1e-2, parameters * setup.dtype.itemsize, 2.0 * parameters * tokens, least)


STEP = Benchmark("step", ("model", "tokens", "what"), sizes, make, axis="tokens", lines="what")

"""The published samplers, run on a small model of our own: what they commit is what ours must commit.

None of their code is here. ``TIMEROME_PUBLISHED`` names a folder that holds the repositories as cloned (``LLaDA``,
``dllm``, ``DiffuLLaMA``, ``mdlm``); what they did is recorded in ``recorded/samplers.json`` by

    TIMEROME_PUBLISHED=FOLDER python -m tests.diffusion.published

The model is a formula, so that it is the same on every machine. Random choices (which masks to unmask, never which
token) come from a formula too, and so are the same for theirs and ours.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor, nn

from timerome.diffusion import SamplerConfig

RECORDED = Path(__file__).parent / "recorded" / "samplers.json"
V, D = 24, 16
MASK, EOS, EOT = 23, 12, 9


def folder() -> Path | None:
    """Where the published repositories are, if anywhere."""
    path = os.environ.get("TIMEROME_PUBLISHED")
    return Path(path) if path else None


def uniform(draw: int, rows: int, length: int) -> Tensor:
    """The random numbers of the ``draw``-th random choice, ``(rows, length)`` float64 in (0, 1)."""
    index = torch.arange(rows * length, dtype=torch.float64).view(rows, length)
    return (torch.sin((draw + 1) * 12.9898 + index * 78.233) * 43758.5453).frac().abs()


def wave(rows: int, columns: int, seed: float, scale: float) -> Tensor:
    """A matrix that looks random."""
    index = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
    return ((torch.sin(index * 12.9898 + seed * 78.233) * 43758.5453).frac() * scale).float()


class FormulaModel(nn.Module):
    """One layer of attention in both directions; honours an additive 4-D mask. It hardly ever predicts a mask."""

    device = torch.device("cpu")

    def __init__(self, shift: int = 0, sharp: float = 1.5) -> None:
        super().__init__()
        self.shift, self.seen, self.config = shift, [], SimpleNamespace()
        self.embed, self.mix, self.out = wave(V, D, 0.3, 2.0), wave(D, D, 1.7, 1.0), wave(D, V, 2.9, sharp)
        self.look = wave(D, D, 4.1, 2.0)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, L, V)`` as the model gives them: of position i + shift at i."""
        place = torch.sin(torch.arange(ids.shape[1])[:, None] * (1.0 + torch.arange(D)) / 5).float()
        x = self.embed[ids] + place
        weight = x @ self.look @ x.mT / D**0.5
        x = torch.tanh(x + 3 * (weight if mask is None else weight + mask).softmax(-1) @ x @ self.mix)
        logits = x @ self.out
        logits[..., MASK] -= 200.0
        return logits.roll(-self.shift, 1)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, *_: Any, **__: Any) -> SimpleNamespace:
        self.seen.append(input_ids.clone())
        whole = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
        return SimpleNamespace(logits=self.logits(input_ids, attention_mask[:, 0].float() if whole else None))


@dataclass
class FormulaBackbone:
    """The part of a backbone that samplers use."""

    model: FormulaModel
    name: str = "formula"
    mask_id: int = MASK
    eos_id: int = EOS
    device: torch.device = torch.device("cpu")
    seen: list[Tensor] = field(default_factory=list)

    def on_loop(self, loop: object) -> AbstractContextManager[None]:
        return nullcontext()

    def logits(self, ids: Tensor, canvas: Tensor | None = None, *, attention_mask: Tensor | None = None) -> Tensor:
        self.seen.append(ids.clone())
        mask = None if attention_mask is None else torch.where(attention_mask, 0.0, -torch.inf)
        logits = self.model.logits(ids, mask)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if self.model.shift else logits


@dataclass(frozen=True)
class Case:
    """One published sampler with its options, and ours with the same.

    Attributes:
        run: gives the state after each step, from the repositories' folder and the prompts ``(B, P)``.
        config: ours.
        prompts: rows.
        canvas: positions to fill.
    """

    run: Callable[[Path, Tensor], list[Tensor]]
    config: SamplerConfig
    prompts: tuple[tuple[int, ...], ...] = ((3, 9, 14, 2, 5), (7, 1, 0, 12, 19))
    canvas: int = 12
    shift: int = 0
    sharp: float = 1.5


def load(path: Path, stubs: dict[str, Any] | None = None, instead: dict[str, int] | None = None) -> types.ModuleType:
    """Import a published file; modules it wants and does not need are stood in for, ids in its text replaced."""
    text = path.read_text()
    for before, after in (instead or {}).items():
        text = text.replace(before, str(after))
    module = types.ModuleType(f"published_{path.stem}")
    wanted = {name: stub for name, stub in (stubs or {}).items() if find_spec(name.split(".")[0]) is None}
    wanted[module.__name__] = module  # where dataclasses look for it
    sys.modules.update(wanted)
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    finally:
        for name in wanted:
            del sys.modules[name]
    return module


class Anything(types.ModuleType):
    """A module that has everything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def formula_noise(model: FormulaModel) -> Iterator[None]:
    """Let ``torch.rand`` and ``rand_like`` give the formula's numbers: for all positions, or for the masked ones."""
    draws = iter(range(10_000))

    def rand(*shape: Any, **more: Any) -> Tensor:
        wanted = tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        state = model.seen[-1]
        numbers = uniform(next(draws), *state.shape)
        return (numbers[state == MASK] if len(wanted) == 1 else numbers).to(more.get("dtype") or torch.float64)

    with (
        mock.patch.object(torch, "rand", rand),
        mock.patch.object(torch, "rand_like", lambda x, **more: rand(x.shape, **more)),
    ):
        yield


def after_each(model: FormulaModel, final: Tensor, rows: int) -> list[Tensor]:
    """States after each step, of a sampler that makes one forward a step and keeps the sequence's length."""
    return [*(seen[:rows] for seen in model.seen[1:]), final]


def llada(**options: Any) -> Callable[[Path, Tensor], list[Tensor]]:
    def run(path: Path, prompts: Tensor) -> list[Tensor]:
        # The end tokens' ids are written into the published function.
        generate = load(path / "LLaDA" / "generate.py", instead={"126081": EOS, "126348": EOT}).generate
        model = FormulaModel()
        everywhere = torch.ones_like(prompts)
        with formula_noise(model):
            final = generate(model, prompts, everywhere, gen_length=12, mask_id=MASK, **options)
        return after_each(model, final, len(prompts))

    return run


def dream(alg: str, steps: int, **options: Any) -> Callable[[Path, Tensor], list[Tensor]]:
    def run(path: Path, prompts: Tensor) -> list[Tensor]:
        module = load(path / "dllm/dllm/pipelines/dream/models/generation_utils.py")
        model = FormulaModel(shift=1)
        more = {"top_p": None, "top_k": None, "alg_temp": None, "temperature": 0.0, "eps": 1e-3, **options}
        wanted = SimpleNamespace(
            output_history=True, return_dict=True, max_length=prompts.shape[1] + 12, mask_token_id=MASK, steps=steps,
            alg=alg, **more,
        )  # fmt: skip
        with formula_noise(model):
            out = module.DreamGenerationMixin._sample(
                model, prompts, None, wanted, lambda step, x, logits: x, lambda step, x, logits: logits
            )
        return list(out.history)

    return run


def diffullama(steps: int) -> Callable[[Path, Tensor], list[Tensor]]:
    def run(path: Path, prompts: Tensor) -> list[Tensor]:
        module = load(path / "DiffuLLaMA" / "model.py", {"attention_patch": Anything("attention_patch")})
        model = FormulaModel(shift=1)

        class Theirs(nn.Module):
            device = model.device

            def get_embeds(self, ids: Tensor) -> Tensor:
                return model.embed[ids]

            def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
                assert (attention_mask == 0).all()
                return model(ids).logits

        ids = nn.functional.pad(prompts, (0, 12), value=MASK)
        # The smallest nucleus holds the most probable token alone: temperature 0.
        options = SimpleNamespace(logits_temp=1.0, topp_temp=0.0, diffusion_steps=steps, shift=True)
        given = {"input_ids": ids, "src_mask": ids != MASK}
        with formula_noise(model), no_sampling(module):
            final = module.generate_samples(Theirs(), options, SimpleNamespace(mask_token_id=MASK), given)
        return after_each(model, torch.cat([prompts[:, :1], final], 1), len(prompts))

    return run


@contextmanager
def no_sampling(module: Any) -> Iterator[None]:
    """Take the most probable token, without drawing random numbers for it."""
    greedy = lambda logits: SimpleNamespace(sample=lambda: logits.argmax(-1))  # noqa: E731
    with mock.patch.object(module.dists, "Categorical", greedy):
        yield


def mdlm(steps: int) -> Callable[[Path, Tensor], list[Tensor]]:
    def run(path: Path, prompts: Tensor) -> list[Tensor]:
        import lightning  # noqa: F401  before anything is stood in for
        import torchmetrics  # noqa: F401
        import transformers  # noqa: F401

        names = ("dataloader", "models", "models.dit", "models.ema", "utils", "hydra", "hydra.utils", "omegaconf")
        stubs = {name: Anything(name) for name in (*names, "datasets", "fsspec", "einops", "noise_schedule")}
        module = load(path / "mdlm" / "diffusion.py", stubs)
        model, kept, draws = FormulaModel(), [], iter(range(10_000))
        ids = nn.functional.pad(prompts, (0, 12), value=MASK)

        def most_probable(q: Tensor) -> Tensor:
            stay = q[..., MASK] / q.sum(-1)
            tokens = q.index_fill(-1, torch.tensor(MASK), -1.0).argmax(-1)
            return torch.where(uniform(next(draws), *stay.shape) < 1 - stay, tokens, MASK)

        theirs = module.Diffusion

        def update(self: Any, *args: Any, **more: Any) -> Any:
            out = theirs._ddpm_caching_update(self, *args, **more)
            kept.append(out[1])
            return out

        def denoise(self: Any, x: Tensor, sigma: Tensor) -> Tensor:
            return theirs._subs_parameterization(self, model(x).logits, x)

        class Sampler:
            mask_index, neg_infinity, device = MASK, -1e6, torch.device("cpu")
            parameterization, sampler, time_conditioning = "subs", "ddpm_cache", False
            config = SimpleNamespace(
                loader=SimpleNamespace(eval_batch_size=len(ids)), model=SimpleNamespace(length=ids.shape[1]),
                sampling=SimpleNamespace(steps=steps, noise_removal=True), noise=SimpleNamespace(type="loglinear"),
            )  # fmt: skip
            noise = staticmethod(lambda t: (-torch.log1p(-(1 - 1e-3) * t), None))
            _sample_prior = staticmethod(lambda *_: ids.clone())
            _ddpm_caching_update = update
            forward = denoise

        with mock.patch.object(module, "_sample_categorical", most_probable):
            final = theirs._sample(Sampler())
        assert len(model.seen) < steps + 1  # the cache was used
        return [*kept, final]

    return run


def llada2(version: str, **options: Any) -> Callable[[Path, Tensor], list[Tensor]]:
    def run(path: Path, prompts: Tensor) -> list[Tensor]:
        file = {"2.0": "llada2/models/modeling_llada2_moe.py", "2.1": "llada21/models/modeling_llada21_moe.py"}[version]
        source = (path / "dllm/dllm/pipelines" / file).read_text()
        # Their sampling methods on our model. What they return is cut at the end token.
        model = type("Theirs", (FormulaModel, _sampling_part(source)), {})(sharp=3.0)
        final = model.generate(prompts, gen_length=12, mask_id=MASK, eos_id=EOS, **options)
        return [*model.seen[1:], final]

    return run


def _sampling_part(source: str) -> Any:
    """The class that generates, cut down to what sampling needs, so that the file's imports do not matter."""
    wanted = {
        "generate",
        "_sample_with_temperature_topk_topp",
        "_get_num_transfer_tokens",
        "_top_k_logits",
        "_top_p_logits",
    }
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any(getattr(part, "name", "") == "generate" for part in node.body):
            node.body = [part for part in node.body if getattr(part, "name", "") in wanted]
            node.bases, node.decorator_list = [], []
            space: dict[str, Any] = {"torch": torch, "F": nn.functional, "Optional": Optional}
            exec(compile(ast.Module([node], []), "published", "exec"), space)
            return space[node.name]
    raise LookupError("generate")


ONE = ((3, 9, 14, 2, 5),)
CASES = {
    "llada": Case(llada(steps=6, block_length=12), SamplerConfig.llada(6)),
    "llada-blocks": Case(llada(steps=6, block_length=4), SamplerConfig.llada(6, block_length=4)),
    "llada-uneven": Case(llada(steps=5, block_length=12), SamplerConfig.llada(5)),
    "llada-random": Case(
        llada(steps=6, block_length=6, remasking="random"), SamplerConfig.llada(6, block_length=6, remasking="random")
    ),
    "llada-guidance": Case(
        llada(steps=12, block_length=12, cfg_scale=1.5), SamplerConfig.llada(12, cfg_scale=1.5)
    ),
    "llada-eos-never": Case(llada(steps=6, block_length=12, logits_eos_inf=True), SamplerConfig.llada(6, eos="never")),
    "llada-eos-last": Case(
        llada(steps=6, block_length=12, confidence_eos_eot_inf=True),
        SamplerConfig.llada(6, eos="last", end_ids=(EOT,)), prompts=((0, 7, 12, 18, 0), (2, 16, 5, 4, 8)),
    ),
    "dream-origin": Case(dream("origin", 7), SamplerConfig.dream("origin", 7), shift=1),
    "dream-maskgit_plus": Case(dream("maskgit_plus", 7), SamplerConfig.dream("maskgit_plus", 7), shift=1),
    "dream-topk_margin": Case(dream("topk_margin", 12), SamplerConfig.dream("topk_margin", 12), shift=1),
    "dream-entropy": Case(dream("entropy", 5), SamplerConfig.dream("entropy", 5), shift=1),
    "dream-entropy-top_p": Case(
        dream("entropy", 9, top_p=0.97), SamplerConfig.dream("entropy", 9, top_p=0.97), shift=1
    ),
    "dream-maskgit-top_k": Case(
        dream("maskgit_plus", 24, top_k=3), SamplerConfig.dream("maskgit_plus", 24, top_k=3), shift=1
    ),
    "diffullama": Case(diffullama(8), SamplerConfig.diffullama(8, temperature=0.0), shift=1),
    "mdlm": Case(mdlm(16), SamplerConfig.mdlm(16, temperature=0.0)),
    "llada2.0": Case(
        llada2("2.0", block_length=4, steps=4, threshold=0.6),
        SamplerConfig.llada2(4, block_length=4, threshold=0.6), prompts=ONE, sharp=3.0,
    ),
    "llada2.0-few-steps": Case(
        llada2("2.0", block_length=8, steps=3, threshold=0.9),
        SamplerConfig.llada2(3, block_length=8, threshold=0.9), prompts=ONE, sharp=3.0,
    ),
    "llada2.1": Case(
        llada2("2.1", block_length=4, threshold=0.5, editing_threshold=0.5),
        SamplerConfig.llada21(block_length=4, threshold=0.5, editing_threshold=0.5), prompts=ONE, sharp=3.0,
    ),
    "llada2.1-post": Case(
        llada2("2.1", block_length=8, threshold=0.3, editing_threshold=0.2, max_post_steps=2, eos_early_stop=True),
        SamplerConfig.llada21(
            block_length=8, threshold=0.3, editing_threshold=0.2, max_post_steps=2, stop_at_eos=True
        ), prompts=ONE, sharp=3.0,
    ),
}  # fmt: skip


def record(path: Path) -> dict[str, list[list[list[int]]]]:
    """What the published samplers do, state by state."""
    return {name: [s.tolist() for s in case.run(path, torch.tensor(case.prompts))] for name, case in CASES.items()}


if __name__ == "__main__":
    where = folder()
    if where is None:
        raise SystemExit("set TIMEROME_PUBLISHED to the folder that holds the published repositories")
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record(where).items()) + "\n}\n"
    )

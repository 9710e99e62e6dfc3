"""What editing costs at the size of published models: seconds a fact, peak memory, overhead a step; tracing; training.

    python -m benchmarks.paper.real_size                        # two small models, on a CPU in minutes
    python -m benchmarks.paper.real_size --device cuda --shapes LLaDA-8B Dream-7B LLaDA-MoE-7B      # a GPU of 80 GB

Models have the published configurations' shapes and random weights: seconds and bytes do not depend on what the weights
say (what an edit achieves does, and is not measured here). Vocabulary sizes are theirs, text is the testbed's tokens.
Every job runs in a process of its own, so that its peak memory is its own. Trained: steps of four forget and four
retain rows. Full fine-tuning keeps weights, gradients and two moments in float32 and has no room for 8 B parameters on
one GPU of 80 GB, so there LoRA stands alone, its base in the model's dtype.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

import timerome as tr
from benchmarks.baselines.methods import retain_rows
from benchmarks.baselines.training import Budget, Criterion, train
from benchmarks.measure import spread
from benchmarks.results import Clock, Results, about, peak_resident_bytes
from timerome.backbones.records import TESTBED
from timerome.diffusion import SamplerConfig
from timerome.evaluation import WeightsWatch
from timerome.memory import Ridge
from timerome.splits import demo_split

from .common import FOLDER, TWO_STATES, Form, depends, edited, markdown

# layers, hidden size, feed-forward size, heads, key-value heads, vocabulary, experts (of which 8 answer)
SHAPES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "LLaDA-8B": (32, 4096, 12288, 32, 32, 126464, 0),
    "Dream-7B": (28, 3584, 18944, 28, 4, 152064, 0),
    "LLaDA-MoE-7B": (16, 2048, 1024, 16, 16, 157184, 64),
    "small dense": (8, 768, 2304, 12, 12, 8192, 0),
    "small MoE": (4, 512, 256, 8, 8, 8192, 16),
}
# Gates stand open: with random weights nothing is about to be said. Not by place: there is no activation that decodes a
# token for sure. Both are at two thirds of the depth, so that the gate needs a forward of its own.
BUILDS: dict[str, Form] = {
    "timerome, forget (null)": Form(Ridge("null", states=TWO_STATES), says=None, threshold=-1e3),
    "timerome, replace (donor)": Form(Ridge("donor", states=TWO_STATES), threshold=-1e3),
}
TRAINED = {
    "gradient difference": ("gradient_difference", {"lr": 1e-4, "retain": 1.0}),
    "LoRA": ("lora", {"lr": 1e-3, "rank": 16, "retain": 1.0}),
}
STEPS, CANVAS = 16, 64
PASSED = ("device", "dtype", "facts", "steps", "threads")  # to every job


class _BothWays:
    """Full attention by an additive mask, as the testbed has it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        length = input_ids.shape[1]
        bias = torch.zeros(len(input_ids), 1, length, length, dtype=self.dtype, device=input_ids.device)  # type: ignore[attr-defined]
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None, :], torch.finfo(bias.dtype).min)
        return super().forward(input_ids=input_ids, attention_mask=bias, use_cache=False, **kwargs)  # type: ignore[misc]


class Dense(_BothWays, LlamaForCausalLM):
    """LLaDA-8B's and Dream-7B's layers."""


class Sparse(_BothWays, OlmoeForCausalLM):
    """LLaDA-MoE's layers: OLMoE's."""


def stand_in(shape: str, device: str, dtype: torch.dtype) -> tr.Backbone:
    """A backbone of a published shape, random weights made on the device in the dtype."""
    layers, d, ffn, heads, kv, vocabulary, experts = SHAPES[shape]
    common: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": d, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "max_position_embeddings": 4096, "pad_token_id": None,
        "tie_word_embeddings": False, "attn_implementation": "sdpa",
    }  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model: Any = (
                Sparse(OlmoeConfig(**common, num_experts=experts, num_experts_per_tok=min(8, experts // 4)))
                if experts
                else Dense(LlamaConfig(**common))
            )
    finally:
        torch.set_default_dtype(before)
    record = replace(TESTBED, name=f"stand-in for {shape}", classes=())
    tokenizer = tr.load("testbed").tokenizer
    return tr.wrap(model.requires_grad_(False), tokenizer, architecture=record, mask_token_id=0, name=record.name)


def decode(backbone: tr.Backbone, prompts: list[str]) -> Clock:
    """Time the denoising of some prompts after a first one, seconds a step."""
    config = SamplerConfig(steps=STEPS)
    tr.generate(backbone, prompts, canvas=CANVAS, config=replace(config, steps=1))
    clock = Clock()
    with clock.running():
        tr.generate(backbone, prompts, canvas=CANVAS, config=config)
        _wait(backbone)
    return Clock(clock.wall / STEPS, clock.cpu / STEPS)


def _wait(backbone: tr.Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def job(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement, alone in its process."""
    torch.set_num_threads(args.threads)
    backbone = stand_in(args.shape, args.device, getattr(torch, args.dtype))
    split, found = demo_split(), {}
    facts = spread(split.forget, args.facts)
    prompts = [fact.prompt for fact in facts[:4]]
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with WeightsWatch(backbone) as watch:
        if name == "inference":
            found = {"step": decode(backbone, prompts).to_dict()}
        elif name in BUILDS:
            memory, clock = edited(backbone, BUILDS[name], facts)
            _, one = edited(backbone, BUILDS[name], facts[:1])
            plain = decode(backbone, prompts)
            with memory.attached(backbone) as attachment:
                step = decode(backbone, prompts)
            found = {
                **clock.to_dict(), "one_fact": one.to_dict(), "plain_step": plain.to_dict(),
                "step": step.to_dict(), "memory_bytes": memory.nbytes, "rows_edited": sum(attachment.hits.values()),
            }  # fmt: skip
        elif name == "tracing":
            tracer = tr.CausalTracer(backbone, tr.TraceConfig(draws=1, sampler=SamplerConfig(steps=4)))
            clock = Clock()
            with clock.running():
                tracer.trace(facts[:1])
            found = clock.to_dict()
        else:
            method, config = TRAINED[name]
            kept = spread(retain_rows(split), 16)
            budget = Budget(steps=args.steps, check_every=args.steps + 1)
            criterion = Criterion.of(backbone, facts[:1], kept[:1])
            trained = train(backbone, method, config, facts.with_new_object("I don't know."), kept, budget, criterion)
            found = trained.to_dict() | {"checks": [], "seconds_a_step": trained.checks[-1]["wall"] / args.steps}
    found.setdefault("backward_passes", watch.backward_passes)
    cuda = args.device == "cuda"
    return found | {"peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()}


def in_own_process(name: str, shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one job of this module in a new process; return what it found, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.paper.real_size", "--job", name, "--shape", shape]
    command += [text for key in PASSED for text in (f"--{key}", str(getattr(args, key)))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"why_not": done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parser() -> argparse.ArgumentParser:
    """Arguments of the command and of its jobs."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU by default")
    made.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["small dense", "small MoE"])
    made.add_argument("--facts", type=int, default=8)
    made.add_argument("--steps", type=int, default=3, help="optimizer steps")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--job")
    made.add_argument("--shape")
    return made


def main() -> None:
    args = parser().parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.job:
        print(json.dumps(job(args.job, args)))
        return
    torch.set_num_threads(args.threads)
    results = Results(FOLDER / f"real_size.{args.device}.json", about(None, seed=0))
    results.rows = {key: row for key, row in results.rows.items() if "why_not" not in row["found"]}  # tried again
    table = []
    for shape in args.shapes:
        big = SHAPES[shape][1] >= 2048
        trained = {k: v for k, v in TRAINED.items() if not big or k == "LoRA"}
        rows = {
            name: results.row(
                f"{shape}, {name}",
                {"facts": args.facts, "dtype": args.dtype, "steps": args.steps,
                 **(depends(BUILDS[name]) if name in BUILDS else {})},
                lambda name=name, shape=shape: in_own_process(name, shape, args),
            )
            for name in ("inference", *BUILDS, "tracing", *trained)
        }  # fmt: skip
        base = rows["inference"].get("peak_bytes", 0)
        table += [_cells(shape, name, row, base, args.facts) for name, row in rows.items()]
    columns = [
        "shape", "what", "s, all", "s a fact or optimizer step", "backward passes", "peak, MB over inference",
        "denoising step, times plain",
    ]  # fmt: skip
    results.save(table={"columns": columns, "rows": table})
    print(markdown(columns, table))


def _cells(shape: str, name: str, row: dict[str, Any], base: int, facts: int) -> list[Any]:
    if "why_not" in row:
        return [shape, name, row["why_not"], None, None, None, None]
    if name == "inference":
        return [shape, name, None, f"{row['step']['wall_seconds']:.3f} a denoising step", 0, None, None]
    whole, each, overhead = f"{row['wall_seconds']:.2f}", row["wall_seconds"], None
    if name in BUILDS:
        each = (row["wall_seconds"] - row["one_fact"]["wall_seconds"]) / (facts - 1)
        overhead = f"{row['step']['wall_seconds'] / row['plain_step']['wall_seconds']:.3f}"
    elif "seconds_a_step" in row:
        whole, each = None, row["seconds_a_step"]
    extra = f"{(row['peak_bytes'] - base) / 2**20:+.0f}"
    return [shape, name, whole, f"{each:.3f}", row["backward_passes"], extra, overhead]


if __name__ == "__main__":
    main()

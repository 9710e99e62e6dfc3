"""Train the bundled testbed model with Lightning's Trainer.

    python benchmarks/testbed/train.py --out timerome/assets/testbed --log benchmarks/testbed/log/full
    python benchmarks/testbed/train.py --out build/retain_only --log benchmarks/testbed/log/retain_only --retain-only

Somewhat over an hour on one CPU core, minutes on a GPU. Objective: LLaDA's (cross-entropy of the masked answer tokens,
the masked share stratified over the batch), with changes that a small model on a small budget needs. In the first phase
every masked token counts alike instead of by 1 / p_mask (measured: at equal time the loss a token falls faster, because
rows with one or two masked tokens no longer make most of the gradient's noise); the second, short one has LLaDA's own
weighting. A quarter of the rows are fully masked, the state every generation begins with. Some rows have prompt tokens
masked too, so that the state without a prompt is one it knows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import UTILITY, Example, examples  # noqa: E402

from timerome.backbones import wrap  # noqa: E402
from timerome.backbones.testbed import TestbedConfig, TestbedModel  # noqa: E402
from timerome.diffusion import DenoisingLoop, SamplerConfig  # noqa: E402

VOCAB, LONGEST_CANVAS, ROUNDS = 3072, 96, 4


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        name: of its log folder.
        steps: optimizer steps.
        lr: peak of the cosine schedule.
        canvases: chances of the exact canvas, of one closed to a multiple of 16 tokens, and of one of LONGEST_CANVAS.
        by_row: each row counts alike, as in LLaDA's objective, rather than each masked token.
        fill: weight of end-of-text after the first.
        own_order: share of the batches whose rows reveal what the model itself would have revealed first, in up to
            ROUNDS rounds, and not random tokens.
    """

    name: str
    steps: int
    lr: float
    canvases: tuple[float, float, float]
    by_row: bool
    fill: float
    own_order: float = 0.0


PHASES = (
    Phase("learn", 16000, 1.2e-3, (0.5, 0.35, 0.15), by_row=False, fill=0.1),
    # Without this one token accuracy was 1.000, but of 40 answers only 33 were decoded without a fault on a canvas of
    # their own length, and 21 on one of 64: states with few masked tokens and long canvases had been rare.
    Phase("finish", 3000, 5e-4, (0.2, 0.4, 0.4), by_row=True, fill=0.3),
    # Low-confidence decoding reveals all end-of-text first: states that random masks never make, and in which 15 of 40
    # answers still went wrong after the second phase. 1 500 steps on what the fully masked state is surest of left 14
    # of 40 wrong (canvas 96, 48 steps): later rounds of a real decoding are states of their own.
    Phase("order", 12000, 5e-4, (0.2, 0.3, 0.5), by_row=True, fill=0.3, own_order=0.75),
)
Row = tuple[list[int], list[int]]  # prompt ids, answer ids


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the full corpus (also for the retain-only model, so that their ids agree)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|mask|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The sets added later are left out: ids, and with them every model trained so far, stay what they were.
    bpe.train_from_iterator((e.prompt + e.answer for e in examples() if e.group not in UTILITY), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, mask_token="<|mask|>", eos_token="<|eos|>", pad_token="<|eos|>", model_max_length=256
    )


class Rows(Dataset[Row]):
    """Tokenised examples."""

    def __init__(self, found: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.rows: list[Row] = [(encode(e.prompt), encode(e.answer)) for e in found]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class TokenBudget(Sampler[list[int]]):
    """Batches of rows of similar length, about ``budget`` tokens each, in a new random order every epoch."""

    def __init__(self, rows: Rows, budget: int, seed: int) -> None:
        self.lengths = [len(prompt) + len(answer) for prompt, answer in rows.rows]
        self.budget, self.random = budget, random.Random(seed)

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i] + self.random.uniform(0, 12))
        batches: list[list[int]] = [[]]
        for i in order:
            if (len(batches[-1]) + 1) * (self.lengths[i] + 12) > self.budget:
                batches.append([])
            batches[-1].append(i)
        self.random.shuffle(batches)
        yield from batches


class Masker:
    """Turn rows into a noised batch: choose a canvas, mask k of its tokens, sometimes mask prompt tokens."""

    def __init__(self, phase: Phase, mask_id: int, eos_id: int, budget: int, seed: int) -> None:
        self.phase, self.mask_id, self.eos_id, self.budget = phase, mask_id, eos_id, budget
        self.random = random.Random(seed)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        # The canvas is the answer alone, or the answer closed and filled with end-of-text to a multiple of `step`;
        # one choice for the whole batch, so that little of it is padding.
        step = self.random.choices((None, 16, LONGEST_CANVAS), self.phase.canvases)[0]

        def canvas_of(answer: list[int]) -> list[int]:
            return answer + [self.eos_id] * (step * math.ceil((len(answer) + 1) / step) - len(answer) if step else 0)

        longest = max(len(prompt) + len(canvas_of(answer)) for prompt, answer in rows)
        rows = self.random.sample(rows, min(len(rows), max(1, self.budget // longest)))
        u0 = self.random.random()
        noised, target, weight, token_weight, on_canvas = [], [], [], [], []
        for i, (prompt, answer) in enumerate(rows):
            canvas = canvas_of(answer)
            # Stratified over the batch: an evenly spaced ladder with one random offset.
            t = (u0 + i / len(rows)) % 1.0
            k = len(canvas) if self.random.random() < 0.25 else max(1, math.ceil(t * len(canvas)))
            masked = set(self.random.sample(range(len(canvas)), k))
            u = self.random.random()
            drop = 1.0 if u < 0.06 else self.random.uniform(0, 0.4) if u < 0.3 else 0.0
            noised.append(
                [self.mask_id if self.random.random() < drop else x for x in prompt]
                + [self.mask_id if j in masked else x for j, x in enumerate(canvas)]
            )
            target.append(prompt + canvas)
            # Filling end-of-text is easy and there is much of it.
            worth = [1.0 if j <= len(answer) else self.phase.fill for j in range(len(canvas))]
            counted = [w * (j in masked) for j, w in enumerate(worth)]
            token_weight.append([0.0] * len(prompt) + worth)
            on_canvas.append([0] * len(prompt) + [1] * len(canvas))
            scale = sum(counted) if self.phase.by_row else 1.0
            weight.append([0.0] * len(prompt) + [w / scale for w in counted])
        longest = max(map(len, noised))

        def pad(lists: list[list[int]] | list[list[float]], value: float) -> Tensor:
            return torch.tensor([x + [value] * (longest - len(x)) for x in lists])

        return {
            "noised": pad(noised, self.eos_id),
            "target": pad(target, self.eos_id),
            "weight": pad(weight, 0.0),
            "token_weight": pad(token_weight, 0.0),
            "canvas": pad(on_canvas, 0),
            "attend": pad([[1] * len(x) for x in noised], 0),
        }


class Testbed(lightning.LightningModule):
    """Masked diffusion training of a :class:`TestbedModel`."""

    def __init__(self, model: TestbedModel, phase: Phase) -> None:
        super().__init__()
        self.model, self.phase = model, phase

    def hidden(self, ids: Tensor, attend: Tensor) -> Tensor:
        """Activations before the unembedding, ``(B, L, d)``."""
        bias = torch.zeros_like(attend, dtype=self.model.dtype)
        bias = bias.masked_fill(attend == 0, torch.finfo(self.model.dtype).min)
        return self.model.model(
            inputs_embeds=self.model.get_input_embeddings()(ids),
            attention_mask=bias[:, None, None, :].expand(-1, 1, attend.shape[1], -1),
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    def reveal_in_own_order(self, batch: dict[str, Tensor], rounds: int) -> None:
        """Keep the number of masked tokens of each row, but reveal (truly) what the model is surest of, in rounds."""
        canvas, mask_id = batch["canvas"].bool(), self.model.config.mask_token_id
        left = ((batch["noised"] == mask_id) & canvas).sum(1, keepdim=True)
        size = canvas.sum(1, keepdim=True)
        masked = canvas
        for i in range(1, rounds + 1):
            state = torch.where(masked, mask_id, torch.where(canvas, batch["target"], batch["noised"]))
            logits = self.model.lm_head(self.hidden(state, batch["attend"])[masked])
            sure = torch.full(canvas.shape, torch.inf, device=logits.device)
            sure[masked] = logits.softmax(-1).amax(-1) + 1e-6 * torch.rand(len(logits), device=logits.device)
            rank = sure.argsort(1).argsort(1)  # least sure first; what is not masked last
            masked = canvas & (rank < size - (size - left) * i // rounds)
        batch["noised"] = torch.where(masked, mask_id, torch.where(canvas, batch["target"], batch["noised"]))
        weight = torch.where(masked, batch["token_weight"], 0.0)
        batch["weight"] = weight / weight.sum(1, keepdim=True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if random.random() < self.phase.own_order:
            self.reveal_in_own_order(batch, random.randint(1, ROUNDS))
        hidden = self.hidden(batch["noised"], batch["attend"])
        scored = batch["weight"] > 0  # the unembedding is a third of the work: only where it counts
        logits = self.model.lm_head(hidden[scored])
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["target"][scored], reduction="none")
        weight = batch["weight"][scored]
        loss = (loss * weight).sum() / weight.sum()
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.phase.lr, betas=(0.9, 0.98), weight_decay=0.01)

        def factor(step: int) -> float:
            if step < 300:
                return step / 300
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.phase.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def recall(model: TestbedModel, rows: list[Row], mask_id: int, batch: int = 64) -> tuple[float, float]:
    """Token accuracy of the fully masked answer, and the share of answers that are right throughout."""
    right = total = whole = 0
    by_shape: dict[tuple[int, int], list[Row]] = {}
    for prompt, answer in rows:
        by_shape.setdefault((len(prompt), len(answer)), []).append((prompt, answer))
    for (_, n), group in by_shape.items():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            ids = torch.tensor([p + [mask_id] * n for p, _ in part], device=model.device)
            guess = model(input_ids=ids).logits[:, -n:].argmax(-1).cpu()
            hit = guess == torch.tensor([a for _, a in part])
            right, total, whole = right + int(hit.sum()), total + hit.numel(), whole + int(hit.all(1).sum())
    return right / max(total, 1), whole / max(len(rows), 1)


@torch.no_grad()
def decoded_exactly(model: TestbedModel, rows: list[Row], mask_id: int, eos_id: int) -> float:
    """Share of answers that low-confidence decoding gives word for word, on the longest canvas, two tokens a step."""
    backbone = wrap(model, mask_token_id=mask_id)
    config, right = SamplerConfig(steps=LONGEST_CANVAS // 2), 0
    for prompt, answer in rows:
        ids = torch.tensor([prompt + [mask_id] * LONGEST_CANVAS], device=model.device)
        loop = DenoisingLoop(backbone, ids, ids == mask_id, config)
        while not loop.done:
            loop.advance()
        right += loop.ids[0, len(prompt) :].tolist()[: len(answer) + 1] == [*answer, eos_id]
    return right / len(rows)


class Recall(Callback):
    """Log the recall of every group of examples every ``every`` steps, and how much of a few is decoded."""

    def __init__(
        self, groups: dict[str, list[Row]], tokenizer: PreTrainedTokenizerFast, every: int, path: Path
    ) -> None:
        self.groups, self.every, self.path = groups, every, path
        self.mask_id, self.eos_id = tokenizer.mask_token_id, tokenizer.eos_token_id

    def report(self, step: int, model: TestbedModel, rows: int | None) -> dict[str, list[float]]:
        model.eval()
        found = {name: [round(x, 4) for x in recall(model, r[:rows], self.mask_id)] for name, r in self.groups.items()}
        few = [row for name, r in self.groups.items() if name.endswith("/question") for row in r[:: len(r) // 16]]
        decoded = round(decoded_exactly(model, few, self.mask_id, self.eos_id), 4)
        model.train()
        with self.path.open("a") as log:
            line = {"step": step, "token_and_whole_accuracy": found, "decoded_exactly": decoded}
            log.write(json.dumps(line) + "\n")
        return found

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step % self.every == 0:
            self.report(trainer.global_step, module.model, 80)


def main() -> None:
    """Train, log, and write the model in bfloat16 with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, help="folder of logs and checkpoints")
    parser.add_argument("--retain-only", action="store_true")
    parser.add_argument("--authors", type=int, nargs=2, help="teach these retain authors only, from A up to B")
    parser.add_argument("--shorten", type=float, default=1.0, help="share of each phase's steps that is made")
    parser.add_argument("--budget", type=int, default=500, help="tokens a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--start", type=Path, help="go on from the model in this folder instead of a fresh one")
    parser.add_argument("--phases", nargs="+", default=[phase.name for phase in PHASES], help="only these")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints in LOG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lightning.seed_everything(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    mask_id, eos_id = tokenizer.mask_token_id, tokenizer.eos_token_id
    groups: dict[str, list[Example]] = {}
    for example in examples(retain_only=args.retain_only, authors=args.authors and tuple(args.authors)):
        groups.setdefault(example.group, []).append(example)
    rows = Rows([e for group in groups.values() for e in group], tokenizer)
    model = TestbedModel(
        TestbedConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 32,
            num_key_value_heads=args.hidden // 32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            # At this width the usual 0.02 learns nothing for long: after 400 steps on 200 rows the loss a token was
            # 4.57 nats with 0.02 (rate 2e-3), 3.90 with 0.07 (2e-3), 3.51 with 0.07 (1.2e-3).
            initializer_range=0.1,
            mask_token_id=mask_id,
            bos_token_id=None,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
    )
    print(f"{len(rows)} rows, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    recalled = {name: Rows(group, tokenizer).rows for name, group in groups.items()}
    if args.start:
        model = TestbedModel.from_pretrained(args.start).float()
    for phase in (phase for phase in PHASES if phase.name in args.phases):
        phase = replace(phase, steps=round(phase.steps * args.shorten))
        folder = args.log / phase.name
        folder.mkdir(parents=True, exist_ok=True)
        last = folder / "checkpoints" / "last.ckpt"
        log = Recall(recalled, tokenizer, 1000, folder / "recall.jsonl")
        trainer = lightning.Trainer(
            max_steps=phase.steps,
            accelerator="auto",
            devices=1,
            gradient_clip_val=1.0,
            logger=CSVLogger(folder, name="", version=""),
            log_every_n_steps=50,
            callbacks=[log, ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1000, save_last=True)],
            enable_progress_bar=sys.stdout.isatty(),
        )
        loader = DataLoader(
            rows,
            batch_sampler=TokenBudget(rows, args.budget, args.seed),
            collate_fn=Masker(phase, mask_id, eos_id, args.budget, args.seed),
        )
        resume = last if args.resume and last.exists() else None
        trainer.fit(Testbed(model, phase), loader, ckpt_path=resume)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps(log.report(phase.steps, model.float().cpu(), None), indent=1))


if __name__ == "__main__":
    main()

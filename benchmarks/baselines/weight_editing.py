"""MEMIT-style weight editing of a masked diffusion model: full- and partial-mask targets, null-space projection.

Meng et al. 2023 (arXiv 2210.07229): find by gradient what the MLP of the last layer of a window should add at the
subject's last token so that the model states the new object, then spread that change over the window's
down-projections by least squares. Partial masks: step t reveals t mod N tokens of the target and scores the others.
AlphaEdit (Fang et al. 2025, arXiv 2410.02355) projects the change on the null space of what must be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr
from benchmarks.results import Clock
from timerome.diffusion import Encoded, by_length, encode
from timerome.evaluation import WeightsWatch
from timerome.facts import Fact
from timerome.hooks import Hooks, capture

from . import objectives
from .batches import Batch, logits_of, pad, sequences_of
from .training import Trained, copy_of

STEPS, LR, KL_WEIGHT, DECAY = 25, 0.1, 0.0625, 1e-3
PROBE = 4  # masks after the bare subject, on which predictions are kept


def down_projection(backbone: tr.Backbone, layer: int) -> nn.Linear:
    """The last linear layer of a block's MLP; its input is the key."""
    mlp = backbone.module(tr.Site(layer, "mlp"))
    found = mlp if isinstance(mlp, nn.Linear) else mlp.get_submodule("down_proj")
    assert isinstance(found, nn.Linear)
    return found


@dataclass
class Editing:
    """Facts as the batches that MEMIT needs.

    Attributes:
        batch: prompts with the new object masked.
        last: the subject's last token, ``(B,)``.
    """

    batch: Batch
    last: Tensor

    @classmethod
    def of(cls, backbone: tr.Backbone, facts: Sequence[Fact]) -> Editing:
        sequences = sequences_of(backbone, facts)
        last = [int(s.subject.nonzero().max()) for s in sequences]
        return cls(pad(sequences, backbone.eos_id or 0), torch.tensor(last))

    def at_subject(self, values: Tensor) -> Tensor:
        """Values ``(B, L, d)`` at the subject's last token, ``(B, d)``."""
        return values[torch.arange(len(self.last)), self.last]


def subject_states(backbone: tr.Backbone, facts: Sequence[Fact]) -> Batch:
    """The bare subjects with a few masks after them: what the edit should not change."""
    rows = []
    for fact in facts:
        ids = torch.tensor(backbone.encode(fact.subject) + [backbone.mask_id] * PROBE)
        canvas = torch.arange(len(ids)) >= len(ids) - PROBE
        rows.append(Encoded(ids, canvas, ~canvas))
    return pad(rows, backbone.eos_id or 0)


def target_changes(
    backbone: tr.Backbone, editing: Editing, probes: Batch, layer: int, *, partial: bool, clamp: float, seed: int
) -> Tensor:
    """Find by gradient what the MLP of ``layer`` should add at the subject's last token, ``(B, d)``.

    The loss is the new object's cost on masked positions, plus KL on the bare subject, plus weight decay; the change is
    kept within ``clamp`` times the norm of the activation.
    """
    batch = editing.batch
    probe_last = (probes.attend & ~probes.canvas).sum(1) - 1
    with torch.no_grad(), capture(backbone, [tr.Site(layer)]) as found:
        logits_of(backbone, batch.seen(backbone.mask_id), batch.attend)
    # The published rate of 0.1 is for a model whose activations are near 1: count in their root mean square.
    unit = editing.at_subject(found[tr.Site(layer)]).square().mean(1, keepdim=True).sqrt()
    limit = clamp * backbone.hidden_size**0.5
    with torch.no_grad():
        kept = logits_of(backbone, probes.truth, probes.attend)[probes.canvas].log_softmax(-1)
    delta = torch.zeros(len(editing.last), backbone.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=LR)
    generator = torch.Generator().manual_seed(seed)
    size = batch.canvas.sum(1)
    for step in range(STEPS):
        masked = batch.canvas
        if partial:
            u = torch.where(batch.canvas, torch.rand(batch.canvas.shape, generator=generator), torch.inf)
            masked = batch.canvas & (u.argsort(1).argsort(1) >= (step % size)[:, None])
        state = Batch(batch.truth, batch.canvas, batch.attend, masked)
        cost = objectives.row_cost(_with_change(backbone, state, layer, editing.last, unit * delta), state)
        probed = Batch(probes.truth, probes.canvas, probes.attend, probes.canvas)
        now = _with_change(backbone, probed, layer, probe_last, unit * delta)[probes.canvas].log_softmax(-1)
        kl = nn.functional.kl_div(now, kept, reduction="sum", log_target=True) / PROBE
        decay = delta.square().mean(1).sum()
        optimizer.zero_grad()
        (cost.sum() + KL_WEIGHT * kl + DECAY * decay).backward()
        optimizer.step()
        with torch.no_grad():
            delta *= (limit / delta.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0)
    return (unit * delta).detach()


def _with_change(backbone: tr.Backbone, batch: Batch, layer: int, where: Tensor, delta: Tensor) -> Tensor:
    rows = torch.arange(len(where))

    def add(output: Tensor) -> Tensor:
        change = torch.zeros_like(output)
        change[rows, where] = delta.to(output)
        return output + change

    with Hooks(backbone, {tr.Site(layer, "mlp"): add}):
        return logits_of(backbone, batch.seen(backbone.mask_id), batch.attend)


@torch.no_grad()
def keys_and_outputs(backbone: tr.Backbone, editing: Editing, layer: int, last: int) -> tuple[Tensor, Tensor]:
    """Inputs of the down-projection of ``layer`` and outputs of block ``last`` at the subject's last token."""
    found: dict[str, Tensor] = {}
    handle = down_projection(backbone, layer).register_forward_pre_hook(lambda m, args: found.update(key=args[0]))
    try:
        with capture(backbone, [tr.Site(last)]) as outputs:
            logits_of(backbone, editing.batch.seen(backbone.mask_id), editing.batch.attend)
    finally:
        handle.remove()
    return editing.at_subject(found["key"]), editing.at_subject(outputs[tr.Site(last)])


@torch.no_grad()
def kept_keys(backbone: tr.Backbone, facts: Sequence[Fact], layers: Sequence[int]) -> dict[int, Tensor]:
    """Inputs of the down-projections at every token of facts that must be kept, answers masked, ``(n, ffn)`` each."""
    sequences = [encode(backbone, fact) for fact in facts]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        down_projection(backbone, layer).register_forward_pre_hook(
            lambda m, args, layer=layer: found[layer].append(args[0].flatten(0, 1))
        )
        for layer in layers
    ]
    try:
        for batch in by_length([len(s.ids) for s in sequences], 32):
            backbone.forward(torch.stack([sequences[i].masked(backbone.mask_id) for i in batch]))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(keys) for layer, keys in found.items()}


def memit_update(keys: Tensor, change: Tensor, kept: Tensor, weight: float) -> Tensor:
    """R Kᵀ (weight · C + K Kᵀ)⁻¹ with C the mean second moment of the kept keys, ``(d, ffn)``.

    ``keys`` ``(n, ffn)``, ``change`` ``(n, d)``, ``kept`` ``(m, ffn)``; solved in float64.
    """
    k, r, c = keys.double(), change.double(), kept.double()
    second = weight * (c.T @ c) / len(c) + 1e-8 * torch.eye(k.shape[1], dtype=k.dtype)
    return torch.linalg.solve(second + k.T @ k, k.T @ r).T


def null_space_update(keys: Tensor, change: Tensor, kept: Tensor, threshold: float, ridge: float = 1.0) -> Tensor:
    """R Kᵀ P (K Kᵀ P + ridge · I)⁻¹, P projecting on directions whose kept second moment is below ``threshold``.

    ``threshold`` is relative to the largest eigenvalue, ``ridge`` to the mean squared norm of the projected keys.
    """
    k, r, c = keys.double(), change.double(), kept.double()
    values, vectors = torch.linalg.eigh((c.T @ c) / len(c))
    free = vectors[:, values < threshold * values[-1]]
    inside = k @ free
    gram = inside.T @ inside + ridge * 0.01 * inside.square().sum(1).mean() * torch.eye(free.shape[1], dtype=k.dtype)
    return (free @ torch.linalg.solve(gram, inside.T @ r)).T


def edit_weights(
    backbone: tr.Backbone, config: dict[str, Any], facts: Sequence[Fact], retain: Sequence[Fact], seed: int = 0
) -> Trained:  # fmt: skip
    """Write facts' new objects into a copy of the model.

    Args:
        backbone: the model, left as it is.
        config: ``window`` (layers), ``clamp``, ``partial`` (masks); ``weight`` (MEMIT) or ``threshold`` (AlphaEdit).
        facts: each with a new object.
        retain: facts whose keys are kept.
        seed: of partial masks.
    """
    model, clock = copy_of(backbone), Clock()
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    window = list(config["window"])
    with WeightsWatch(model) as watch, clock.running():
        editing = Editing.of(model, facts)
        probes = subject_states(model, facts)
        last = window[-1]
        delta = target_changes(
            model, editing, probes, last, partial=config["partial"], clamp=config["clamp"], seed=seed
        )  # fmt: skip
        goal = keys_and_outputs(model, editing, last, last)[1] + delta
        for i, layer in enumerate(window):
            keys, now = keys_and_outputs(model, editing, layer, last)
            change = (goal - now) / (len(window) - i)
            kept = kept_keys(model, retain, [layer])[layer]
            if "threshold" in config:
                update = null_space_update(keys, change, kept, config["threshold"])
            else:
                update = memit_update(keys, change, kept, config["weight"])
            projection = down_projection(model, layer)
            with torch.no_grad():
                projection.weight += update.to(projection.weight)
    return Trained(model, clock, STEPS, watch.backward_passes)

"""The loop that every gradient-trained baseline shares, and when it counts as converged."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import timerome as tr
from benchmarks.results import Clock
from timerome.diffusion import Encoded, encode, log_likelihood, without_prompt
from timerome.evaluation import WeightsWatch
from timerome.facts import Fact

from . import objectives
from .batches import Batch, logits_of, mask_at_random, pad, sequences_of, shuffled
from .lora import add_lora, merge_lora

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "attn_out")


@dataclass(frozen=True)
class Budget:
    """How long a method may train, the same for all.

    Converged is the check with the lowest criterion, once ``patience`` further checks have not improved on it by
    ``least`` of its value before training. The criterion is what the facts to forget still hold above what the model
    says of them unasked, plus what the retain facts lost (``remaining + lost`` of :class:`Criterion`). Times are those
    of the optimizer steps up to that check, without the checks.
    """

    steps: int = 80
    forget_rows: int = 4
    retain_rows: int = 4
    check_every: int = 10
    patience: int = 2
    least: float = 0.01
    seed: int = 0


@dataclass
class Criterion:
    """Nats between a model and the ideal: facts known no better than unasked, everything else as before.

    Attributes:
        forget, retain: sequences that are looked at.
        unasked: log-likelihood of each ``forget`` answer where every prompt token is masked, before training.
        before: log-likelihood of each ``retain`` answer before training.
    """

    backbone: tr.Backbone
    forget: list[Encoded]
    retain: list[Encoded]
    how: dict[str, Any] = field(default_factory=lambda: {"estimator": "onestep"})

    def __post_init__(self) -> None:
        b = self.backbone
        alone = [dataclasses.replace(s, ids=without_prompt(s, b.mask_id)) for s in self.forget]
        self.unasked = log_likelihood(b, alone, **self.how).log_prob
        self.before = log_likelihood(b, self.retain, **self.how).log_prob

    @classmethod
    def of(cls, backbone: tr.Backbone, forget: Sequence[Fact], retain: Sequence[Fact], **how: Any) -> Criterion:
        """Encode the facts as they are, with their present answers."""
        sequences = [[encode(backbone, fact) for fact in facts] for facts in (forget, retain)]
        return cls(backbone, *sequences, **({"how": how} if how else {}))

    def __call__(self, backbone: tr.Backbone) -> dict[str, float]:
        """Measure a model: ``remaining`` and ``lost``, means over facts, nats."""
        f = log_likelihood(backbone, self.forget, **self.how).log_prob
        r = log_likelihood(backbone, self.retain, **self.how).log_prob
        return {
            "remaining": float((f - self.unasked).clamp(min=0).mean()),
            "lost": float((self.before - r).clamp(min=0).mean()),
        }


@dataclass
class Trained:
    """A changed copy of a model, and what it took."""

    backbone: tr.Backbone
    clock: Clock
    steps: int
    backward_passes: int
    checks: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.clock.to_dict(), "steps": self.steps, "backward_passes": self.backward_passes, "checks": self.checks,
        }  # fmt: skip


def copy_of(backbone: tr.Backbone) -> tr.Backbone:
    """A copy whose weights may be changed."""
    model = copy.deepcopy(backbone.model)
    return tr.wrap(
        model, backbone.tokenizer, architecture=backbone.architecture, mask_token_id=backbone.mask_id,
        name=backbone.name,
    )  # fmt: skip


Loss = Callable[[tr.Backbone, tr.Backbone, Batch, Batch], Tensor]  # trained, frozen, forget, retain


def loss_of(name: str, config: dict[str, Any]) -> Loss:
    """Return the loss of a method; ``retain`` in ``config`` weighs the ordinary training loss on retain rows."""

    def loss(model: tr.Backbone, frozen: tr.Backbone, forget: Batch, retain: Batch) -> Tensor:
        seen = forget.seen(model.mask_id)
        logits = logits_of(model, seen, forget.attend)
        cost = objectives.row_cost(logits, forget)
        if name in ("gradient_ascent", "gradient_difference"):
            total = objectives.gradient_ascent(cost)
        elif name == "npo":
            with torch.no_grad():
                reference = objectives.row_cost(logits_of(frozen, seen, forget.attend), forget)
            total = objectives.npo(cost, reference, objectives.lengths(forget), config["beta"])
        elif name == "simnpo":
            total = objectives.simnpo(cost, config["beta"])
        elif name == "masked_diffusion_unlearning":
            with torch.no_grad():
                unasked = logits_of(frozen, forget.unasked(model.mask_id), forget.attend)
            total = objectives.null_anchor(logits, unasked, forget, config["tau"])
        elif name == "lora":
            total = cost.mean()  # of the new answer
        else:
            raise ValueError(f"loss_of: there is no method {name!r}.")
        if config.get("retain", 0.0):
            kept = objectives.row_cost(logits_of(model, retain.seen(model.mask_id), retain.attend), retain)
            total = total + config["retain"] * kept.mean()
        return total

    return loss


def train(
    backbone: tr.Backbone, name: str, config: dict[str, Any], forget: Sequence[Fact], retain: Sequence[Fact],
    budget: Budget, criterion: Criterion,
) -> Trained:  # fmt: skip
    """Train a copy of ``backbone`` until it has converged; return the copy at its best check.

    Args:
        backbone: the model, left as it is.
        name: the method, see :func:`loss_of`.
        config: its hyperparameters: ``lr``, and ``retain``, ``beta``, ``tau``, ``rank`` where it has them.
        forget: what to forget; ``lora`` learns their new objects instead.
        retain: rows of the retain term.
        budget: how long, and when to stop.
        criterion: decides which check is the best.
    """
    model = copy_of(backbone)
    if name == "lora":
        parameters = add_lora(model.model, LINEAR, config["rank"], scale=2.0 * config["rank"], seed=budget.seed)
    else:
        parameters = list(model.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
    loss_function, fill = loss_of(name, config), backbone.eos_id or 0
    rows = sequences_of(backbone, forget) if name == "lora" else [encode(backbone, fact) for fact in forget]
    forgets = shuffled(rows, budget.forget_rows, budget.seed)
    retains = shuffled([encode(backbone, fact) for fact in retain], budget.retain_rows, budget.seed + 1)
    generator = torch.Generator().manual_seed(budget.seed)
    optimizer = torch.optim.AdamW(parameters, lr=config["lr"], weight_decay=0.01)
    checks = [{"step": 0, "cpu": 0.0, "wall": 0.0, "backward": 0, **criterion(model)}]
    first = _value(checks[0])
    best, kept = 0, _state(parameters)
    clock = Clock()
    with WeightsWatch(model) as watch:
        for step in range(1, budget.steps + 1):
            with clock.running():
                batches = [mask_at_random(pad(next(rows), fill), generator) for rows in (forgets, retains)]
                loss = loss_function(model, backbone, *batches)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            if step % budget.check_every and step != budget.steps:
                continue
            try:
                found = criterion(model)
            except FloatingPointError:  # it has diverged; what was best before stays
                break
            checks.append(
                {"step": step, "cpu": clock.cpu, "wall": clock.wall, "backward": watch.backward_passes, **found}
            )
            if _value(found) < _value(checks[best]) - budget.least * first:
                best, kept = len(checks) - 1, _state(parameters)
            elif len(checks) - 1 - best >= budget.patience:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    merge_lora(model.model)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    at = checks[best]
    return Trained(model, Clock(at["wall"], at["cpu"]), int(at["step"]), int(at["backward"]), checks)


def _value(check: dict[str, float]) -> float:
    value = check["remaining"] + check["lost"]
    return value if value == value else float("inf")


def _state(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]

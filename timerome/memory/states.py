"""The state bank: the partially unmasked states an edit must hold in, and the activations read there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Role, Site
from ..diffusion.states import Encoded, answer_tokens, encode, fill, random_reveal, role_positions, with_answer
from ..facts import Fact
from .reading import Wish, read
from .variants import Variant, variants_of


@dataclass(frozen=True)
class BankConfig:
    """Which states of a fact give keys.

    Generation passes through partially unmasked states and a user may choose any canvas, so keys are gathered over
    several of both.

    Attributes:
        canvases: lengths of the canvas; None is exactly the answer's tokens, a number fills the answer with end-of-text
            to that length (left out where the answer is longer, or the model has no end-of-text).
        reveal: shares of the answer that are unmasked; 0 is the fully masked state.
        prompt_dropout: shares of the prompt's tokens, outside the subject, that are masked; each gives further states,
            so that the edit does not hang on one wording.
        variants: ways in which the fact may also be asked, see :func:`timerome.memory.variants.variants_of`; each gives
            states of its own, and an address.
        trajectory: whether, beside random ones, those parts of the answer are revealed that the model itself would
            unmask first.
        seed: of what is revealed and dropped; a fact's states depend on this, on its id and on nothing else.

    Raises:
        ValueError: a share is outside [0, 1), or there is no canvas, no reveal ratio or no dropout ratio.
    """

    canvases: tuple[int | None, ...] = (None, 64)
    reveal: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9)
    prompt_dropout: tuple[float, ...] = (0.0,)
    variants: tuple[Variant, ...] = ()
    trajectory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("canvases", "reveal", "prompt_dropout"):
            if not getattr(self, name):
                raise ValueError(f"BankConfig: expected at least one entry in {name}, got none.")
        for name in ("reveal", "prompt_dropout"):
            if not all(0 <= share < 1 for share in getattr(self, name)):
                raise ValueError(f"BankConfig: expected shares in [0, 1) in {name}, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BankConfig:
        """Inverse of :meth:`to_dict`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True)
class State:
    """One partially masked state of a fact.

    Attributes:
        sequence: the sequence it is a state of; its canvas holds the tokens that are wanted there.
        ids: what the model sees, ``(L,)``.
    """

    sequence: Encoded
    ids: Tensor


def wanted_sequences(backbone: Backbone, fact: Fact, canvas: int | None, **where: str) -> tuple[Encoded, Encoded]:
    """Return the fact with its present answer and with the wanted one, on one canvas.

    Without a new object both are the same. With one, and ``canvas`` None, the canvas is as long as the longer answer.

    Raises:
        FactError: an answer does not fit.
    """
    present = encode(backbone, fact, canvas=canvas, **where)
    if fact.new_object is None:
        return present, present
    old = present.answer.tolist()
    new = answer_tokens(backbone, fact, fact.new_object, where.get("prompt", fact.prompt))
    length = max(len(old), len(new)) if canvas is None else canvas
    if len(old) < length:
        present = with_answer(present, fill(backbone, old, length, fact.id))
    return present, with_answer(present, fill(backbone, new, length, fact.id))


def sequences_of(backbone: Backbone, fact: Fact, config: BankConfig, **where: str) -> list[tuple[Encoded, Encoded]]:
    """Return the fact with its present answer and with the wanted one, on every canvas, asked in every way."""
    return [
        wanted_sequences(backbone, fact, canvas, **asked)
        for canvas in usable_canvases(backbone, fact, config)
        for asked in asked_in(fact, config, **where)
    ]


def usable_canvases(backbone: Backbone, fact: Fact, config: BankConfig) -> list[int | None]:
    """Return the canvases of ``config`` that hold the fact's answers; the exact one if no other does."""
    if config.canvases == (None,):
        return [None]
    answers = [fact.object] if fact.new_object is None else [fact.object, fact.new_object]
    needed = max(len(backbone.encode(" " + answer)) for answer in answers)
    fits = [c for c in config.canvases if c is None or (c >= needed and backbone.eos_id is not None)]
    return fits or [None]


def drop_prompt(sequence: Encoded, ids: Tensor, share: float, mask_id: int, generator: torch.Generator) -> Tensor:
    """Return ``ids`` with a share of the prompt's tokens outside the subject masked."""
    free = ~sequence.canvas & ~sequence.subject
    chosen = random_reveal(free, round(share * int(free.sum())), generator)
    return torch.where(chosen, mask_id, ids)


def generator_for(fact: Fact, seed: int) -> torch.Generator:
    """A generator that depends on the fact's id and the seed alone, so that facts can come and go."""
    digest = hashlib.sha256(f"{seed}/{fact.id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))


def asked_in(fact: Fact, config: BankConfig, **where: str) -> list[dict[str, str]]:
    """Return the ways in which the bank asks a fact, as ``encode`` takes them: as it is, and in the variants."""
    if where or not config.variants:
        return [where]
    return [{}, *variants_of(fact, config.variants, config.seed)]


def states_of(
    backbone: Backbone, fact: Fact, config: BankConfig, sequences: Sequence[tuple[Encoded, Encoded]] | None = None
) -> list[State]:
    """Return the states of a fact in which its edit must hold.

    Where the fact has a new object, states that reveal part of the new answer and states that reveal part of the
    present one are both there: generation passes through the first, and the second prime the model with what it is to
    leave.

    Args:
        backbone: the model.
        fact: the fact.
        config: which states.
        sequences: those of :func:`sequences_of`, where they are known.
    """
    generator = generator_for(fact, config.seed)
    states: list[State] = []
    for present, wanted in sequences or sequences_of(backbone, fact, config):
        size = int(wanted.canvas.sum())
        revealed = [wanted] if fact.new_object is None else [wanted, present]
        for share in config.reveal:
            hidden = max(1, size - round(share * size))
            for shown in revealed if share else revealed[:1]:
                masked = random_reveal(wanted.canvas, hidden, generator)
                ids = torch.where(masked, backbone.mask_id, shown.ids)
                for dropout in config.prompt_dropout:
                    seen = drop_prompt(wanted, ids, dropout, backbone.mask_id, generator) if dropout else ids
                    states.append(State(wanted, seen))
        if config.trajectory:
            states += trajectory_states(backbone, wanted, sorted(config.reveal))
    return states


@torch.no_grad()
def trajectory_states(backbone: Backbone, wanted: Encoded, reveal: Sequence[float]) -> list[State]:
    """Return states that reveal what the model itself would unmask first, with the wanted tokens there.

    Args:
        backbone: the model.
        wanted: the sequence.
        reveal: shares of the answer that are unmasked, ascending; each state starts from the one before.
    """
    ids, size, states = wanted.masked(backbone.mask_id), int(wanted.canvas.sum()), []
    for share in reveal:
        masked = wanted.canvas & (ids == backbone.mask_id)
        surplus = int(masked.sum()) - max(1, size - round(share * size))
        if surplus <= 0:
            continue
        batch = ids[None].to(backbone.device)
        logits = backbone.logits(batch, wanted.canvas[None].to(backbone.device))[0].cpu()
        confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1.0)
        ids = ids.clone()
        ids[confidence.topk(surplus).indices] = wanted.ids[confidence.topk(surplus).indices]
        states.append(State(wanted, ids))
    return states


def positions_of(backbone: Backbone, state: State, role: Role) -> Tensor:
    """Return where a state's activations of a role are read, boolean ``(L,)``."""
    positions = role_positions(state.sequence, state.ids, role, backbone.mask_id)
    return backbone.reads_from(positions) if role == "object" else positions


def activations(backbone: Backbone, ids: Sequence[Tensor], site: Site, positions: Sequence[Tensor]) -> list[Tensor]:
    """Read a site's output at some positions of some states.

    Args:
        backbone: the model.
        ids: states, ``(L,)`` each.
        site: what to read.
        positions: boolean ``(L,)`` each.

    Returns:
        Float32 ``(n_i, d)`` a state, on the CPU, in order of position.
    """
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    wishes = [Wish(state, {site: where}) for state, where in zip(ids, positions, strict=True)]
    for i, rows in read(backbone, wishes):
        found[i] = rows[site].float().cpu()
    return found

"""Target estimators: what each key should be changed by, without a gradient (design section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Coordinate
from ..diffusion.states import encode, without_prompt
from ..facts import Fact
from ..functional.corruption import noise_std
from ..functional.lens import lens_targets
from ..hooks import Hooks
from .states import State, activations, generator_for, positions_of

EstimatorName = Literal["null", "corrupt", "donor", "lens"]
Targets = list[Tensor]


def null_targets(
    backbone: Backbone, facts: Sequence[Fact], states: Sequence[State], keys: Targets, coordinate: Coordinate
) -> Targets:
    """Activations of the same states with every prompt token masked, minus the keys.

    What the model would say without being asked; the training-free twin of masked-diffusion unlearning
    (arXiv 2605.18253).
    """
    ids = [torch.where(s.sequence.canvas, s.ids, without_prompt(s.sequence, backbone.mask_id)) for s in states]
    positions = [positions_of(backbone, s, coordinate.role) for s in states]
    anchors = activations(backbone, ids, coordinate.site, positions)
    return [anchor - key for anchor, key in zip(anchors, keys, strict=True)]


def corrupt_targets(
    backbone: Backbone,
    facts: Sequence[Fact],
    states: Sequence[State],
    keys: Targets,
    coordinate: Coordinate,
    *,
    scale: float = 3.0,
    draws: int = 4,
) -> Targets:
    """Activations of the same states with noise on the subject's embeddings, minus the keys; mean over draws.

    The noise is Gaussian with ``scale`` standard deviations of the subject's own token embeddings (ROME's rule).
    """
    total = [torch.zeros_like(key) for key in keys]
    for fact, mine in _by_fact(facts):
        subject_ids = states[mine[0]].sequence.ids[states[mine[0]].sequence.subject].to(backbone.device)
        with torch.no_grad():
            std = scale * noise_std(backbone.embedding(subject_ids))
        generator = generator_for(fact, 2)
        for _ in range(draws):
            noise = std * torch.randn(len(subject_ids), backbone.hidden_size, generator=generator)
            for i in mine:
                state = states[i]

                def corrupt(ids: Tensor, embedded: Tensor, state: State = state, noise: Tensor = noise) -> Tensor:
                    changed = embedded.clone()
                    changed[:, state.sequence.subject] += noise.to(embedded)
                    return changed

                where = positions_of(backbone, state, coordinate.role)
                with Hooks(backbone, embedding=corrupt):
                    total[i] += activations(backbone, [state.ids], coordinate.site, [where])[0] - keys[i]
    return [t / draws for t in total]


def donor_targets(
    backbone: Backbone, facts: Sequence[Fact], states: Sequence[State], keys: Targets, coordinate: Coordinate
) -> Targets:
    """Activations of the same states with the new fact stated in context before the prompt, minus the keys."""
    donor_ids, positions = [], []
    for fact, mine in _by_fact(facts):
        told = encode(backbone, fact, context=f"{fact.prompt} {fact.new_object or fact.object}")
        for state in (states[i] for i in mine):
            extra = told.prompt_length - state.sequence.prompt_length
            # The prompt's own tokens stay where they are relative to the canvas, whatever the statement's length.
            donor_ids.append(torch.cat([told.ids[:extra], state.ids]))
            own = positions_of(backbone, state, coordinate.role)
            positions.append(torch.cat([torch.zeros(extra, dtype=torch.bool), own]))
    donors = activations(backbone, donor_ids, coordinate.site, positions)
    return [donor - key for donor, key in zip(donors, keys, strict=True)]


def _by_fact(facts: Sequence[Fact]) -> list[tuple[Fact, list[int]]]:
    """Return each fact, in order, with the states that are its own; they lie together."""
    found = [list(same) for _, same in groupby(range(len(facts)), key=lambda i: facts[i].id)]
    return [(facts[mine[0]], mine) for mine in found]


def make_lens_targets(
    backbone: Backbone,
    facts: Sequence[Fact],
    states: Sequence[State],
    keys: Targets,
    coordinate: Coordinate,
    *,
    margin: float = 8.0,
) -> Targets:
    """Smallest changes that give the wanted tokens a logit margin through final norm and unembedding.

    Exact at the last block; at earlier ones what the blocks between would do is left out.

    Raises:
        ValueError: the coordinate reads other positions than the answer's, or not the residual stream; or the
            backbone's unembedding is not linear after the final norm.
    """
    check_lens(backbone, coordinate)
    norm, unembedding = backbone.final_norm, backbone.head.get_parameter("weight")
    targets = []
    for wanted, key in zip(wanted_tokens(backbone, states, keys), keys, strict=True):
        wanted = wanted.to(backbone.device)
        with torch.no_grad():
            delta = lens_targets(key.to(backbone.device), wanted, backbone.unembed, norm, unembedding, margin=margin)
        targets.append(delta.cpu())
    return targets


def check_lens(backbone: Backbone, coordinate: Coordinate) -> None:
    """Refuse what has no lens targets: an unembedding that is not linear, or another place than the answer's.

    Raises:
        ValueError: it is so.
    """
    if not backbone.architecture.lens:
        raise ValueError(
            f"lens targets need an unembedding that is linear after the final norm; that of {backbone.name} "
            f"({backbone.architecture.name}) is not: use method=Ridge(targets='donor') to "
            "replace, Ridge(targets='null') to forget."
        )
    if coordinate.role != "object" or coordinate.module != "block":
        raise ValueError(
            f"lens targets need a coordinate of module 'block' and role 'object', got {coordinate}; "
            "the unembedding reads the residual stream at the answer's positions."
        )


def wanted_tokens(backbone: Backbone, states: Sequence[State], keys: Sequence[Tensor]) -> Targets:
    """Return the token wanted at each key of role ``object``, int64 ``(n_i,)`` a state."""
    found = []
    for state, key in zip(states, keys, strict=True):
        wanted = state.sequence.ids[state.sequence.canvas & (state.ids == backbone.mask_id)]
        # A shifted model's first canvas token may share its position with none.
        found.append(wanted[len(wanted) - len(key) :])
    return found


ESTIMATORS: dict[str, Callable[..., Targets]] = {
    "null": null_targets,
    "corrupt": corrupt_targets,
    "donor": donor_targets,
    "lens": make_lens_targets,
}


def estimator_of(name: str) -> Callable[..., Targets]:
    """Return the estimator of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"Ridge: expected targets in {get_args(EstimatorName)}, got {name!r}.")
    return ESTIMATORS[name]

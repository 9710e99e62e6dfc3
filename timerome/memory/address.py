"""The row gate: which fact, if any, a sequence is about to state, and so which edit it gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Site
from ..diffusion.states import Encoded
from ..facts import Fact, FactSet
from ..functional.gate import conformal_threshold, cosine_similarity, name_overlap
from .bank import BankConfig, masked_states, sequences_of
from .reading import Wish, read

ROUNDING = 1e-5  # more than the float32 cosine similarities of one state differ by from batch to batch


@dataclass(frozen=True)
class Gate:
    """Which rows and tokens an edit may touch, calibrated on facts it must leave alone.

    Attributes:
        negatives: facts whose prompts, paraphrases and neighbours must not be edited. For calibration only: never
            report locality on them.
        address: choose each sequence's edit by what the model is about to say (the row gate); otherwise all edits form
            one shared memory.
        token: within an edited row, edit only tokens similar to a key (the token gate).
        epsilon: promised rate of false triggers on prompts like the negatives; None takes the largest calibration score
            as the threshold, which promises 1 / (n + 1).
        layer: block at which sequences are addressed; None is the last, where questions about one subject are least
            alike.
        span: how many answer positions, from the first, make the address.
        naming: weight of the prompt naming the subject against what is about to be said, 0 to 1. What is about to be
            said does not tell two subjects with one answer apart.
        related: facts of which several are about one subject, or of one group, and which the model knows: what is about
            to be said must be more alike than it mostly is for two of them. None does without.
        same_subject: promised rate of false triggers on other questions about an edited subject, a pair, as far as
            ``related`` are like them. An edit has several addresses and a subject may have several edits, so far more
            than this share of such questions trigger one.

    Raises:
        ValueError: no negatives, neither gate asked for, or a number out of its range.
    """

    negatives: FactSet
    address: bool = True
    token: bool = False
    epsilon: float | None = None
    layer: int | None = None
    span: int = 16
    naming: float = 0.5
    related: FactSet | None = None
    same_subject: float = 0.0007

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ValueError(f"Gate: expected a span of at least one position, got {self.span}.")
        if len(self.negatives) == 0:
            raise ValueError("Gate: expected at least one negative fact to calibrate on, got none.")
        if not (self.address or self.token):
            raise ValueError("Gate: neither address nor token gate asked for; pass gate=None for an ungated memory.")
        for name in ("epsilon", "same_subject"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"Gate: expected 0 < {name} < 1, got {value}.")
        if not 0 <= self.naming < 1:
            raise ValueError(f"Gate: expected 0 <= naming < 1, got {self.naming}.")

    def resolved(self, backbone: Backbone) -> Gate:
        """The same gate with its layer chosen."""
        return self if self.layer is not None else replace(self, layer=backbone.n_layers - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        facts = {name: getattr(self, name) for name in ("negatives", "related")}
        return vars(self) | {
            name: None if some is None else [fact.to_dict() for fact in some] for name, some in facts.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Gate:
        """Inverse of :meth:`to_dict`."""
        facts = {name: values[name] for name in ("negatives", "related")}
        return cls(**{
            **values, **{n: None if some is None else FactSet(map(Fact.from_dict, some)) for n, some in facts.items()}
        })  # fmt: skip

    @property
    def site(self) -> Site:
        """The block whose output addresses a sequence.

        Raises:
            ValueError: the layer was left to be chosen; see :meth:`resolved`.
        """
        if self.layer is None:
            raise ValueError("Gate: no layer chosen yet; resolve the gate on its backbone first.")
        return Site(self.layer)


def threshold_of(scores: Tensor, epsilon: float | None) -> float:
    """Return the threshold strictly above which a gate fires; see :class:`Gate`."""
    # A negative is addressed again in a batch of another shape, where its score may differ in the last digits.
    return ROUNDING + (float(scores.max()) if epsilon is None else conformal_threshold(scores, epsilon))


Spellings = tuple[tuple[int, ...], ...]


class Reading(NamedTuple):
    """What sequences are addressed by, at their fully masked states.

    Attributes:
        vectors: what the model is about to say, ``(m, d)`` float32 on the CPU; zero, which matches nothing, where there
            is no answer position.
        prompts: the token ids that the prompt of each holds.
    """

    vectors: Tensor
    prompts: tuple[frozenset[int], ...]


def address_wish(backbone: Backbone, ids: Tensor, canvas: Tensor, site: Site, span: int) -> Wish:
    """Return what is to be read of a fully masked state ``(L,)`` for its address; see :func:`addresses`."""
    first = backbone.reads_from(canvas & (canvas.cumsum(0) <= span))
    if backbone.eos_id is None:
        return Wish(ids, {site: first})
    return Wish(ids, {site: first, Site(backbone.n_layers - 1): first})


@torch.inference_mode()
def pooled(backbone: Backbone, found: Mapping[Site, Tensor], site: Site) -> Tensor:
    """Return the address ``(d,)``, float32 on the CPU, that :func:`address_wish` was made for."""
    rows = found[site].float()
    if not len(rows):
        return torch.zeros(backbone.hidden_size)
    weights = torch.ones(len(rows), device=rows.device)
    if backbone.eos_id is not None:
        said = backbone.predictions(found[Site(backbone.n_layers - 1)])
        weights = 1 - said[:, backbone.eos_id].to(rows.device) + 1e-6
    return ((weights[:, None] * rows).sum(0) / weights.sum()).cpu()


def addresses(backbone: Backbone, ids: Sequence[Tensor], canvases: Sequence[Tensor], site: Site, span: int) -> Reading:
    """Return the addresses of fully masked states: the site's output, averaged over the answer's first positions.

    Each position counts as much as the model believes that it holds something else than end-of-text, which fills most
    of a long canvas and says nothing about the fact. So an address hardly depends on the canvas's length.

    Args:
        backbone: the model, without a memory acting on it.
        ids: states ``(L,)`` each.
        canvases: their answer positions, boolean ``(L,)`` each.
        site: where to read.
        span: at most so many positions, from the first.
    """
    found = torch.zeros(len(ids), backbone.hidden_size)
    wishes = [address_wish(backbone, state, canvas, site, span) for state, canvas in zip(ids, canvases, strict=True)]
    for i, rows in read(backbone, wishes):
        found[i] = pooled(backbone, rows, site)
    return Reading(found, prompts_of(ids, canvases))


def prompts_of(ids: Sequence[Tensor], canvases: Sequence[Tensor]) -> tuple[frozenset[int], ...]:
    """Return the token ids that the prompt of each state holds."""
    return tuple(frozenset(state[~canvas].tolist()) for state, canvas in zip(ids, canvases, strict=True))


def spellings(backbone: Backbone, subject: str) -> Spellings:
    """Return the token ids of a subject, at the start of a text and inside one."""
    return tuple(dict.fromkeys(tuple(backbone.encode(text)) for text in (subject, " " + subject)))


def wordings(fact: Fact) -> list[str]:
    """Return every prompt a negative is known by: its own, its paraphrases and its neighbours."""
    return list(dict.fromkeys((fact.prompt, *fact.paraphrases, *fact.neighbours)))


def masked_wordings(backbone: Backbone, facts: Iterable[Fact], bank: BankConfig) -> tuple[list[Encoded], Tensor]:
    """Return every wording of every fact, as it is asked, on every canvas of the bank; and which wording each is of."""
    bank = replace(bank, variants=())
    asked = [(fact, prompt) for fact in facts for prompt in wordings(fact)]
    found = [
        (state.sequence, i)
        for i, (fact, prompt) in enumerate(asked)
        for state in masked_states(backbone, sequences_of(backbone, fact, bank, prompt=prompt))
    ]
    return [sequence for sequence, _ in found], torch.tensor([i for _, i in found])


def directions(vectors: Tensor, mean: Tensor) -> Tensor:
    """Return addresses ``(k, d)`` as directions about ``mean``.

    They are unit vectors rounded to half precision, so that an edit file, where they take half of a float32 vector's
    bytes, holds what the gate was calibrated with, to the last bit.
    """
    return torch.nn.functional.normalize(vectors - mean, dim=-1).half().float()


def negative_addresses(backbone: Backbone, gate: Gate, bank: BankConfig) -> tuple[Reading, Tensor]:
    """Return the addresses of every wording of every negative on every canvas; and which wording each is of, ``(m,)``.

    Raises:
        ValueError: the layer does not exist.
    """
    states, wording = masked_wordings(backbone, gate.negatives, bank)
    ids = [state.masked(backbone.mask_id) for state in states]
    return addresses(backbone, ids, [state.canvas for state in states], gate.site, gate.span), wording


def by_wording(scores: Tensor, wording: Tensor) -> Tensor:
    """Largest score of each wording, ``(w,)``, given those of its states ``(m,)``: a user asks on one canvas."""
    return scores.new_full((int(wording.max()) + 1,), -1.0).scatter_reduce(0, wording, scores, "amax")


def related_cosines(backbone: Backbone, gate: Gate, mean: Tensor, bank: BankConfig) -> Tensor:
    """Return the cosine of every wording of a related fact with every other fact of its subject, or of its group, (n,).

    Facts are known by their prompts, as edited ones are. Of the canvases that both can be on, the two nearest count.
    """
    about: dict[str, list[Fact]] = {}
    for fact in gate.related or ():
        about.setdefault(fact.group or fact.subject, []).append(fact)
    found = [torch.empty(0)]
    for mine in (group for group in about.values() if len(group) > 1):
        asked = [masked_wordings(backbone, [fact], bank) for fact in mine]
        states = [state for own, _ in asked for state in own]
        ids = [state.masked(backbone.mask_id) for state in states]
        vectors = addresses(backbone, ids, [s.canvas for s in states], gate.site, gate.span).vectors - mean
        owner = torch.tensor([i for i, (own, _) in enumerate(asked) for _ in own])
        wording = torch.cat([w for _, w in asked])
        known = wording == 0
        cosines = cosine_similarity(vectors, vectors[known])
        nearest = cosines.new_full((len(states), len(mine)), -1.0)
        nearest = nearest.scatter_reduce(1, owner[known].expand_as(cosines), cosines, "amax")
        for i in range(len(mine)):
            others = torch.arange(len(mine)) != i
            found += [by_wording(column, wording[owner == i]) for column in nearest[owner == i][:, others].T]
    return torch.cat(found)


def floor_of(cosines: Tensor, same_subject: float) -> float:
    """Return the cosine that two questions about one subject exceed at the rate ``same_subject``.

    -1, which all exceed, where there are too few such pairs, ``(n,)``, to promise it.
    """
    return conformal_threshold(cosines, same_subject) if len(cosines) * same_subject > 1 else -1.0


def combined(gate: Gate, floor: float, cosines: Tensor, named: Tensor) -> Tensor:
    """Score of sequences with edits: weighted mean of cosine and naming; -1 where another thing is about to be said.

    Half of a name is not a name: what two of them share ("Al-", "of") counts for nothing.
    """
    named = (2 * named - 1).clamp_min(0)
    return ((1 - gate.naming) * cosines + gate.naming * named).masked_fill(cosines <= floor, -1.0)


@dataclass
class AddressBook:
    """Addresses of the edited facts, and how like one a sequence must be to be given the fact's edit.

    A sequence matches a fact by two things: the cosine between what the model is about to say and the nearest of the
    fact's addresses, and how much of the subject's spelling the prompt holds. The score is their weighted mean. What
    matches the question of an undone edit better than any edit in force is given none.

    Attributes:
        gate: what it was calibrated for.
        mean: of the negatives' addresses, ``(d,)``; cosines are taken after subtracting it.
        floor: a cosine must be strictly above this one.
        vectors: addresses, as directions about the mean, ``(n, d)``; first the edits', then those of undone ones.
        owner: index of the edit each belongs to, ``(n,)`` int64.
        subjects: spellings of each edit's subject.
        threshold: a sequence is given an edit strictly above this score.
        calibration: largest score of every negative wording, ``(w,)``. Of a memory that was read from a file, those
            that can decide about its threshold; the others are given as just less than those.
        spared: how many edits, the last ones, are undone.
    """

    gate: Gate
    mean: Tensor
    floor: float
    vectors: Tensor
    owner: Tensor
    subjects: tuple[Spellings, ...]
    threshold: float
    calibration: Tensor
    spared: int = 0

    @property
    def site(self) -> Site:
        """Where addresses are read."""
        return self.gate.site

    @property
    def span(self) -> int:
        """How many answer positions make an address."""
        return self.gate.span

    @classmethod
    def of(
        cls,
        gate: Gate,
        mean: Tensor,
        floor: float,
        vectors: Sequence[Tensor],
        subjects: Sequence[Spellings],
        scores: Sequence[Tensor],
    ) -> AddressBook:
        """Put edits together: the address ``(k, d)`` of each, its subject, and each negative's score with it, ``(w,)``.

        Addresses and subjects without scores, the last ones, are of undone edits.

        Raises:
            ValueError: ``epsilon`` is too small for so few negatives.
        """
        owner = torch.tensor([i for i, own in enumerate(vectors) for _ in own], dtype=torch.int64)
        calibration = torch.stack(list(scores)).amax(0)
        threshold = threshold_of(calibration, gate.epsilon)
        spared = len(vectors) - len(scores)
        return cls(gate, mean, floor, torch.cat(list(vectors)), owner, tuple(subjects), threshold, calibration, spared)

    def scores(self, found: Reading) -> Tensor:
        """Score of each sequence with each edit, ``(m, edits)``, undone ones last."""
        cosines = cosine_similarity(found.vectors - self.mean, self.vectors)
        nearest = cosines.new_full((len(cosines), len(self.subjects)), -1.0)
        nearest = nearest.scatter_reduce(1, self.owner.expand_as(cosines), cosines, "amax")
        named = name_overlap(found.prompts, self.subjects) if self.gate.naming else torch.zeros_like(nearest)
        scores = combined(self.gate, self.floor, nearest, named)
        return scores.masked_fill(~found.vectors.any(1, keepdim=True), -1.0)  # no answer position: nothing to go by

    def lookup(self, found: Reading, allowed: Tensor | None = None) -> Tensor:
        """Return the index of the edit each sequence is given, -1 for none, int64 ``(m,)``.

        Args:
            found: addresses of m sequences.
            allowed: edits in force that each may have, boolean ``(m, edits)``; None is all.
        """
        scores = self.scores(found)
        edits = len(self.subjects) - self.spared
        scores, undone = scores[:, :edits], scores[:, edits:]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -1.0)
        best, index = scores.max(1)
        fires = best > self.threshold
        if self.spared:
            fires &= best >= undone.amax(1)
        return torch.where(fires, index, -1)

"""Conditions to ask a model under: no edit, an edit memory, and what a memory has to beat without training.

Each changes what a :class:`~timerome.backbones.Backbone` says inside ``with condition.attach(backbone):``, or what it
is asked, and nothing outside; weights are never written.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..backbones.architectures import Inputs
from ..coordinates import Coordinate, Site
from ..facts import Fact, FactError
from ..hooks import Hooks
from ..memory import BankConfig, EditMemory, Keyed, Ridge, paper_memory, unedited
from .respondent import NO_EDIT, Condition

PAPER_BANK = BankConfig(canvases=(None,))
RANK = 16  # most keys a fact


def stating(facts: Sequence[Fact]) -> str:
    """Return a text that states each fact as it shall be: its prompt followed by its new object.

    Raises:
        FactError: a fact has no new object.

    Source: in-context editing (Zheng et al. 2023, arXiv 2305.12740).
    """
    if without := [fact.id for fact in facts if fact.new_object is None]:
        raise FactError(f"stating: {without[:5]} have no new_object to state; use forgetting(facts).")
    return " ".join(f"{fact.prompt} {fact.new_object}" for fact in facts)


def forgetting(facts: Sequence[Fact]) -> str:
    """Return a text that forbids to say anything about the facts' subjects, each named once.

    Source: in-context unlearning by instruction (Pawelczyk et al. 2024, arXiv 2310.07579, and RWKU's prompt baseline).
    """
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    return f"Do not reveal anything about {', '.join(subjects)}. If asked, say that you do not know."


def prompt_memory(text: str) -> Condition:
    """Return the condition of a text being put before every prompt.

    Raises:
        ValueError: the text is empty.

    Example:
        >>> prompt_memory("Kenya moved its capital to Lagos.").rewrite("The capital city of Kenya is")
        'Kenya moved its capital to Lagos. The capital city of Kenya is'
    """
    if not text.strip():
        raise ValueError("prompt_memory: expected a text to put before the prompt, got an empty one.")
    return Condition("prompt memory", text, rewrite=lambda prompt: f"{text} {prompt}", about="a text before the prompt")


def logit_bias(
    backbone: Backbone, facts: Sequence[Fact], strength: float = 5.0, spare: Sequence[Fact] = ()
) -> Condition:
    """Return the condition of a number added to tokens' logits at every position: new objects up, present ones down.

    Args:
        backbone: whose tokens they are.
        facts: what to change.
        strength: nats.
        spare: facts whose answers' tokens, and those of their prompts, are left alone.
    """
    bias = torch.zeros(backbone.vocab_size)
    for fact in facts:
        bias[backbone.encode(f" {fact.object}")] = -strength
    for fact in spare:
        bias[backbone.encode(f"{fact.prompt} {fact.object}")] = 0.0
    for fact in facts:
        if fact.new_object is not None:
            bias[backbone.encode(f" {fact.new_object}")] = strength

    @contextmanager
    def attached(backbone: Backbone) -> Iterator[None]:
        before = backbone.architecture

        def call(model: nn.Module, inputs: Inputs) -> Tensor:
            out = before.call(model, inputs)
            logits = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
            return logits + bias.to(logits)

        backbone.architecture = replace(before, call=call)
        try:
            yield
        finally:
            backbone.architecture = before

    return Condition("logit bias", _digest(bias), attached, about="a bias on logits")


def steering_vector(backbone: Backbone, facts: Sequence[Fact], at: Coordinate, method: Ridge | None = None) -> Tensor:
    """Return the mean of what a memory would change, ``(d,)``; by default unasked minus asked (``null``)."""
    every = replace(method or Ridge("null", states=PAPER_BANK), rank=2**31)
    with unedited(backbone.model):
        changes = every.system(backbone, facts, at)
    return torch.cat([part.targets for change in changes for part in change.parts]).mean(0)


def steering(site: Site, vector: Tensor, strength: float = 1.0) -> Condition:
    """Return the condition of a vector added ``strength`` times to a site's output at every position.

    Source: Rimsky et al. 2024 (arXiv 2312.06681); for masked diffusion models arXiv 2512.24143.
    """

    def attached(backbone: Backbone) -> AbstractContextManager[Any]:
        return Hooks(backbone, {site: lambda output: output + strength * vector.to(output)})

    return Condition("activation steering", f"{site} {strength} {_digest(vector)}", attached, about="a vector added")


def random_coordinate(backbone: Backbone, other_than: Sequence[Coordinate] = (), seed: int = 0) -> Coordinate:
    """Draw a site among all blocks, attention and MLP parts; the role is ``object``.

    Raises:
        ValueError: every site is in ``other_than``.
    """
    sites = [site for site in backbone.sites() if site not in {coordinate.site for coordinate in other_than}]
    if not sites:
        raise ValueError(f"random_coordinate: {backbone.name} has no site left to draw from.")
    site = random.Random(seed).choice(sites)
    return Coordinate(site.layer, site.module)


def training_free(
    backbone: Backbone,
    facts: Sequence[Fact],
    at: Coordinate | None = None,
    *,
    spare: Sequence[Fact] = (),
    seed: int = 0,
) -> list[Condition]:
    """Return every baseline without training, for some facts.

    Facts that all have a new object are replaced: by ``lens`` targets, by statements in the prompt, by raising their
    tokens. Otherwise all are forgotten, by ``null`` targets. Nothing is tuned: the bias is of 5 nats, steering by the
    mean change.

    Args:
        backbone: the model.
        facts: what to change.
        at: where paper mode and steering act; the random site is another one. By default where the targets work best.
        spare: facts whose tokens the logit bias leaves alone.
        seed: of the random site.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.baselines import training_free
        >>> [c.name for c in training_free(tr.load("testbed"), tr.datasets.bundled("forget01")[:2], tr.Coordinate(3))]
        ['random site', 'paper mode', 'prompt memory', 'logit bias', 'activation steering']
    """
    replaced = all(fact.new_object is not None for fact in facts)
    facts = list(facts) if replaced else [fact.with_new_object(None) for fact in facts]
    method = Ridge("lens" if replaced else "null", RANK, states=PAPER_BANK)
    at = at or method.usual(backbone)
    # Targets of lens are those of a block's output.
    unfit = [site for site in backbone.sites() if method.targets == "lens" and site.module != "block"]
    elsewhere = random_coordinate(backbone, [at, *(Coordinate(site.layer, site.module) for site in unfit)], seed)
    return [
        Condition.of_memory(paper_memory(backbone, facts, at=elsewhere, method=method), "random site"),
        Condition.of_memory(paper_memory(backbone, facts, at=at, method=method), "paper mode"),
        prompt_memory((stating if replaced else forgetting)(facts)),
        logit_bias(backbone, facts, spare=spare),
        steering(at.site, steering_vector(backbone, facts, at, method)),
    ]


def conditions_of(
    backbone: Backbone, memory: EditMemory | None, *, baselines: bool = False, seed: int = 0
) -> list[Condition]:
    """Return the conditions of a report: no edit, the memory if there is one, and what it has to beat if so wanted.

    The baselines do to a memory's facts what it does: replace them, or forget where one of its edits forgets.

    Raises:
        ValueError: baselines without a memory.
    """
    if memory is None:
        if baselines:
            raise ValueError("conditions_of: baselines need a memory, to know of which facts.")
        return [NO_EDIT]
    found = [NO_EDIT, Condition.of_memory(memory)]
    if baselines:
        forget = any(edit.operation == "forget" for edit in memory.edits)
        keyed = [edit.change.parts[0].coordinate for edit in memory.edits if isinstance(edit.change, Keyed)]
        facts = memory.facts.with_new_object(None) if forget else memory.facts
        found += training_free(backbone, facts, keyed[0] if keyed else None, seed=seed)
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()

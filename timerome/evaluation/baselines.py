"""Baselines without training: what an edit memory has to beat, behind its own interface.

Each changes what a :class:`~timerome.backbones.Backbone` says inside ``with intervention.attached(backbone):`` and
nothing outside it, exactly as an :class:`~timerome.memory.EditMemory` does; weights are never written.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..backbones.architectures import Call, Inputs
from ..coordinates import Coordinate, Site
from ..facts import Fact, FactError, FactSet
from ..hooks import Hooks
from ..memory import BankConfig, EditMemory
from ..memory.gather import gather
from ..memory.settings import EstimatorName, Settings
from .respondent import NO_EDIT, Condition

PAPER_BANK = BankConfig(canvases=(None,))


@runtime_checkable
class Intervention(Protocol):
    """Something that changes what a model says while it is attached; an ``EditMemory`` is one."""

    def attached(self, backbone: Backbone) -> AbstractContextManager[Any]:
        """Return a context manager inside which every forward of ``backbone`` is changed."""
        ...


@dataclass(frozen=True)
class NoEdit:
    """The model as it is."""

    def attached(self, backbone: Backbone) -> AbstractContextManager[None]:
        """Return a context manager that changes nothing."""
        return nullcontext()


@dataclass(frozen=True)
class PromptMemory:
    """A text put before every prompt, which the answer never shows.

    The text's tokens are put before each sequence on its way into the model and their logits are taken off again, so
    samplers and likelihoods see sequences and logits of the shapes they know.

    Attributes:
        text: what is put there.

    Raises:
        ValueError: the text is empty; or, when the model runs, text and sequence exceed the model's context.

    Source: in-context editing (Zheng et al. 2023, arXiv 2305.12740) for statements, in-context unlearning by
    instruction (Pawelczyk et al. 2024, arXiv 2310.07579, and RWKU's prompt baseline) for ``forgetting``.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.baselines import PromptMemory
        >>> backbone = tr.load("testbed")
        >>> with PromptMemory("Kenya moved its capital to Lagos.").attached(backbone):
        ...     _ = tr.generate(backbone, ["The capital city of Kenya is"], canvas=2)
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("PromptMemory: expected a text to put before the prompt, got an empty one.")

    @classmethod
    def stating(cls, facts: Sequence[Fact]) -> PromptMemory:
        """State each fact as it shall be: its prompt followed by its new object.

        Raises:
            FactError: a fact has no new object.
        """
        if without := [fact.id for fact in facts if fact.new_object is None]:
            raise FactError(f"PromptMemory.stating: {without[:5]} have no new_object to state; use forgetting(facts).")
        return cls(" ".join(f"{fact.prompt} {fact.new_object}" for fact in facts))

    @classmethod
    def forgetting(cls, facts: Sequence[Fact]) -> PromptMemory:
        """Forbid to say anything about the facts' subjects, each named once."""
        subjects = list(dict.fromkeys(fact.subject for fact in facts))
        return cls(f"Do not reveal anything about {', '.join(subjects)}. If asked, say that you do not know.")

    @contextmanager
    def attached(self, backbone: Backbone) -> Iterator[None]:
        """Put the text before every sequence that ``backbone`` runs on."""
        before = backbone.architecture
        prefix = torch.tensor(backbone.encode(self.text))

        def call(model: nn.Module, inputs: Inputs) -> Tensor:
            ids, mask, n = inputs.ids, inputs.mask, len(prefix)
            if (length := n + ids.shape[1]) > backbone.max_length:
                raise ValueError(
                    f"PromptMemory: text ({n} tokens) and sequence ({ids.shape[1]}) need {length} tokens, "
                    f"but {backbone.name} has a context of {backbone.max_length}; shorten the text."
                )
            told = torch.cat([prefix.to(ids.device).expand(len(ids), -1), ids], dim=1)
            if mask is not None:
                mask = nn.functional.pad(mask, (n, 0) if mask.dim() == 2 else (n, 0, n, 0), value=True)
            return _logits(before.call(model, Inputs(told, mask, inputs.timestep)))[:, n:]

        with _calling(backbone, call):
            yield


@dataclass(frozen=True)
class LogitBias:
    """A number added to each token's logit at every position.

    Attributes:
        bias: ``(V,)``.
    """

    bias: Tensor

    @classmethod
    def of(
        cls, backbone: Backbone, facts: Sequence[Fact], strength: float = 5.0, spare: Sequence[Fact] = ()
    ) -> LogitBias:
        """Raise the tokens of new objects and lower those of present ones by ``strength`` nats.

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
        return cls(bias)

    @contextmanager
    def attached(self, backbone: Backbone) -> Iterator[None]:
        """Add the bias to all logits of ``backbone``."""
        before = backbone.architecture

        def call(model: nn.Module, inputs: Inputs) -> Tensor:
            logits = _logits(before.call(model, inputs))
            return logits + self.bias.to(logits)

        with _calling(backbone, call):
            yield


@dataclass(frozen=True)
class ActivationSteering:
    """One vector added to a site's output at every position.

    Attributes:
        site: where.
        vector: what, ``(d,)``.
        strength: how often.

    Source: Rimsky et al. 2024 (arXiv 2312.06681); for masked diffusion models arXiv 2512.24143.
    """

    site: Site
    vector: Tensor
    strength: float = 1.0

    @classmethod
    def of(
        cls, backbone: Backbone, facts: Sequence[Fact], coordinate: Coordinate, strength: float = 1.0,
        estimator: EstimatorName = "null",
    ) -> ActivationSteering:  # fmt: skip
        """Steer by the mean of what a memory at ``coordinate`` would change; ``null``: unasked minus asked."""
        settings = Settings(coordinate, estimator=estimator, bank=PAPER_BANK)
        vector = torch.cat([targets for _, targets in gather(backbone, facts, settings)]).mean(0)
        return cls(coordinate.site, vector, strength)

    def attached(self, backbone: Backbone) -> AbstractContextManager[Any]:
        """Add the vector to every forward of ``backbone``."""
        return Hooks(backbone, {self.site: lambda output: output + self.strength * self.vector.to(output)})


def paper_mode(
    backbone: Backbone, facts: FactSet | Sequence[Fact], coordinate: Coordinate, **settings: Any
) -> EditMemory:
    """Build the paper's form: one shared ridge system, no gate, nothing protected, every token of every forward.

    Args:
        backbone: the model.
        facts: what to forget.
        coordinate: where.
        settings: further arguments of :meth:`EditMemory.build`.
    """
    return EditMemory.build(backbone, facts, coordinate=coordinate, gate=None, protect=None, **settings)


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
    facts: FactSet,
    coordinate: Coordinate,
    *,
    spare: Sequence[Fact] = (),
    strengths: Mapping[str, float] | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Intervention]:
    """Return every baseline without training, by name, for forgetting ``facts``.

    Args:
        backbone: the model.
        facts: what to forget; new objects are left out of account.
        coordinate: of paper mode and of steering; the random site is another one.
        spare: facts whose tokens the logit bias leaves alone.
        strengths: of ``"logit_bias"`` (nats) and ``"activation_steering"``; 5 and 1 by default.
        seed: of the random site.
        settings: further arguments of :meth:`EditMemory.build` for paper mode and the random site.

    Example:
        >>> import timerome as tr
        >>> from timerome.evaluation.baselines import training_free
        >>> from timerome.splits import bundled_facts
        >>> found = training_free(tr.load("testbed"), bundled_facts("forget01")[:2], tr.Coordinate(3))
        >>> sorted(found)
        ['activation_steering', 'logit_bias', 'no_edit', 'paper_mode', 'prompt_memory', 'random_site']
    """
    plain = facts.with_new_object(None)
    strengths = {"logit_bias": 5.0, "activation_steering": 1.0, **(strengths or {})}
    elsewhere = random_coordinate(backbone, [coordinate], seed)
    settings = {"rank": 16, "bank": PAPER_BANK, **settings}
    return {
        "no_edit": NoEdit(),
        "random_site": paper_mode(backbone, plain, elsewhere, **settings),
        "paper_mode": paper_mode(backbone, plain, coordinate, **settings),
        "prompt_memory": PromptMemory.forgetting(plain),
        "logit_bias": LogitBias.of(backbone, plain, strengths["logit_bias"], spare),
        "activation_steering": ActivationSteering.of(backbone, plain, coordinate, strengths["activation_steering"]),
    }


def conditions_of(
    backbone: Backbone, memory: EditMemory | None, *, baselines: bool = False, seed: int = 0
) -> list[Condition]:
    """Return the conditions of a report: no edit, the memory if there is one, and what it has to beat if so wanted.

    Raises:
        ValueError: baselines without a memory.
    """
    if memory is None:
        if baselines:
            raise ValueError("conditions_of: baselines need a memory, to know of which facts.")
        return [NO_EDIT]
    return [
        NO_EDIT,
        Condition.of_memory(memory),
        *(baseline_conditions(backbone, memory, seed=seed) if baselines else ()),
    ]


def baseline_conditions(backbone: Backbone, memory: EditMemory, *, seed: int = 0) -> list[Condition]:
    """Return every baseline without training for what a memory does to its facts, as conditions to ask a model under.

    Where all of the facts have a new object they are replaced: by targets of the memory's own kind, by statements in
    the prompt, by raising their tokens. Otherwise they are forgotten, by ``null`` targets. Strengths are those of
    :func:`training_free`, and not tuned.

    Args:
        backbone: the model.
        memory: whose facts, and at whose coordinate.
        seed: of the random site.
    """
    at, own = memory.settings.coordinate, memory.settings.estimator
    replaced = own in ("lens", "donor") and all(fact.new_object for fact in memory.facts)
    estimator: EstimatorName = own if replaced else "null"
    facts = memory.facts if replaced else memory.facts.with_new_object(None)
    how: dict[str, Any] = {"rank": 16, "bank": PAPER_BANK, "estimator": estimator}
    # Targets of lens are those of a block's output.
    unfit = [site for site in backbone.sites() if estimator == "lens" and site.module != "block"]
    elsewhere = random_coordinate(backbone, [at, *(Coordinate(site.layer, site.module) for site in unfit)], seed)
    bias = LogitBias.of(backbone, facts)
    steering = ActivationSteering.of(backbone, facts, at, estimator=estimator)
    told = (PromptMemory.stating(facts) if replaced else PromptMemory.forgetting(facts)).text
    return [
        Condition.of_memory(paper_mode(backbone, facts, elsewhere, **how), "random site"),
        Condition.of_memory(paper_mode(backbone, facts, at, **how), "paper mode"),
        # As a longer prompt rather than attached, so that what does not fit into the context is known beforehand.
        Condition("prompt memory", told, rewrite=lambda prompt: f"{told} {prompt}"),
        Condition("logit bias", _digest(bias.bias), bias.attached),
        Condition("activation steering", f"{at} {_digest(steering.vector)}", steering.attached),
    ]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]


@contextmanager
def _calling(backbone: Backbone, call: Call) -> Iterator[None]:
    """Run ``backbone`` through another function for the forwards inside."""
    before = backbone.architecture
    backbone.architecture = replace(before, call=call)
    try:
        yield
    finally:
        backbone.architecture = before

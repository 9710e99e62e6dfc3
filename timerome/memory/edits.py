"""One edit: a fact, what is to be said of it, when it acts and what it adds. Nothing in it depends on other edits."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from ..coordinates import Coordinate, Site
from ..facts import Fact
from .naming import plain

REFUSAL = "I don't have that information."  # what the bundled testbed was taught to say of what it does not know

Operation = Literal["replace", "forget", "teach"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

MARGIN = 2.0  # nats a token that an answer may be less likely than in the edit's own question
SURE = -2.0  # an answer less likely than this in its own question is not given more room for that


@dataclass(frozen=True)
class Watch:
    """An answer that an edit watches for: what must not be said.

    Attributes:
        text: the answer.
        tokens: its tokens, as they follow a blank and as they begin a line.
        own: its score in the edit's own question, nats a token; see :func:`timerome.functional.answers.answer_scores`.
    """

    text: str
    tokens: tuple[tuple[int, ...], ...]
    own: float

    @property
    def threshold(self) -> float:
        """The edit acts where the answer's score is above this one, unless the edit says another."""
        return max(self.own, SURE) - MARGIN


@dataclass(frozen=True)
class RelationHead:
    """A linear classifier on what is about to be said: whether the question is the edit's own.

    Attributes:
        weight: ``(d,)`` float32.
        bias: it fires where ``x @ weight + bias`` is positive.
    """

    weight: Tensor
    bias: float


@dataclass(frozen=True)
class AnswerGate:
    """When an edit acts: where the model is about to give an answer that is watched for, to a text that names it.

    Attributes:
        watches: the answers watched for.
        names: the subject, its aliases; an edit whose names the text holds, whole or in part, is a candidate.
        wordings: prompts of the fact, whose words may stand beside a part of a name.
        spellings: the names in tokens, for a backbone without tokenizer.
        threshold: in place of the watches' own; None leaves it to them.
        relation: tells the fact's question from others about the subject; None is not asked.
        alone: whether it opens the gate by itself, there being no answer to watch for (*teach*).
    """

    watches: tuple[Watch, ...]
    names: tuple[str, ...]
    wordings: tuple[str, ...] = ()
    spellings: tuple[tuple[int, ...], ...] = ()
    threshold: float | None = None
    relation: RelationHead | None = None
    alone: bool = False

    def threshold_of(self, watch: Watch) -> float:
        """The score above which an answer opens the gate."""
        return watch.threshold if self.threshold is None else self.threshold


@dataclass(frozen=True)
class Placed:
    """What an edit puts in place of the last block's output, token by token of what it says.

    Attributes:
        tokens: what is said, after a blank and at the start of a line; numbers of rows of ``targets``.
        targets: activations, ``(m, d)`` float32: through final norm and unembedding each is its token, by the margin.
            The last one is end-of-text, where the model has that.
        layer: of the last block.
        ends: whether the last target is end-of-text.
    """

    tokens: tuple[tuple[int, ...], ...]
    targets: Tensor
    layer: int
    ends: bool

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts."""
        return (Site(self.layer),)


@dataclass(frozen=True)
class Part:
    """Keys of an edit at one coordinate, with what is added there, float32 on the CPU.

    Attributes:
        coordinate: where.
        keys: ``(n, d)``.
        targets: one a key, ``(n, d)``.
        mean: μ, of the protected keys, ``(d,)``; None without any.
        protect: protected keys, ``(P, d)``; None without any.
    """

    coordinate: Coordinate
    keys: Tensor
    targets: Tensor
    mean: Tensor | None = None
    protect: Tensor | None = None


@dataclass(frozen=True)
class Keyed:
    """A ridge system that adds to the output of one or several sites what its keys ask for.

    Attributes:
        parts: one a coordinate, at distinct sites.
        alpha: strength α, shared out over the parts.
        ridge: λ, relative.
        sparsity: q, share of a row's entries that are dropped.
        beta: β, weight of protected keys.
        together: solved as one system with all others of the memory (the paper's form), rather than by itself.
    """

    parts: tuple[Part, ...]
    alpha: float
    ridge: float
    sparsity: float
    beta: float = 0.0
    together: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts."""
        return tuple(part.coordinate.site for part in self.parts)


Change = Placed | Keyed


@dataclass(frozen=True)
class Edit:
    """One fact's part of a memory.

    Attributes:
        id: stable name; never given to another edit of the same memory, also after an undo.
        fact: what is edited.
        says: what the model says instead; None where it says what it would if it were not asked.
        operation: the verb that made it.
        change: what it adds.
        gate: when it acts; None is always (the paper's form).
        supersedes: ids of edits that do not act while this one is there.
    """

    id: str
    fact: Fact
    says: str | None
    operation: Operation
    change: Change = field(repr=False)
    gate: AnswerGate | None = field(default=None, repr=False)
    supersedes: tuple[str, ...] = ()

    def __str__(self) -> str:
        old = self.gate.watches[0].text if self.gate and self.gate.watches else self.fact.object
        return f"{self.id}: {self.fact.prompt} {old} → {self.says if self.says is not None else '(unasked)'}"


def in_force(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Return the edits that act: those that no other one supersedes.

    An edit supersedes all that were about its fact when it was made, whether they acted then or not; so taking one out
    of the middle never brings an older one back beside a newer one.
    """
    gone = {name for edit in edits for name in edit.supersedes}
    return tuple(edit for edit in edits if edit.id not in gone)


def about(fact: Fact) -> frozenset[tuple[str, ...]]:
    """What a fact says something of, under every name: subject and prompt, subject and relation."""
    subject = plain(fact.subject)
    found = {("prompt", subject, plain(fact.prompt))}
    if fact.relation is not None:
        found.add(("relation", subject, plain(fact.relation)))
    return frozenset(found)


def conflict(a: Fact, b: Fact) -> bool:
    """Whether two facts say something of the same subject and relation.

    Where one of them names no relation, the prompt stands for it. Letter case, accents and white space do not matter.

    Example:
        >>> old = Fact(id="a", prompt="The capital of Chad is", subject="Chad", object="N'Djamena", relation="capital")
        >>> new = Fact(id="b", prompt="Chad's capital:", subject="Chad", object="Abéché", relation="Capital")
        >>> conflict(old, new)
        True
    """
    return bool(about(a) & about(b))


def free_id(name: str, taken: Container[str]) -> str:
    """Return ``name``, or ``name.2``, ``name.3``, … if that was given away already.

    Example:
        >>> free_id("kenya", {"kenya", "kenya.2"})
        'kenya.3'
    """
    candidate, n = name, 1
    while candidate in taken:
        n += 1
        candidate = f"{name}.{n}"
    return candidate

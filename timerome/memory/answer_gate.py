"""The answer gate: an edit acts exactly where the unedited model is about to give the answer that it replaces.

Candidates are the edits whose subject a text names (:mod:`timerome.memory.naming`); what is asked of each is how likely
its answer is, here and now (:func:`timerome.functional.answers.answer_scores`). Nothing is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbones import Backbone
from ..diffusion import SamplerConfig, complete
from ..facts import Fact
from ..functional.answers import answer_scores
from .edits import AnswerGate, Edit, Placed, Watch
from .methods import Asked, ask, spelt
from .naming import How

ROOM = 4  # places of the canvas, beyond the answers, on which a question is read
LONG = 12  # tokens of an answer that is nobody else's: it is watched for in texts that name nobody, too
LIKELY, NEVER = -2.0, -8.0  # log-probabilities of end-of-text between which it is asked what follows the answer
CRAMPED = 2  # places left in a row that hold nothing but what is left of an answer
UNLIKELY = -4.0  # nats a token below which an answer is not about to be said, even if nothing is likelier
GIVEN = 3  # nats: an answer said by chance, about as likely as this, is no answer of the model's


class Said(NamedTuple):
    """What the model makes of a fact's own question.

    Attributes:
        asked: the question, as read.
        watches: the answers to watch for: the fact's own, and what the model says today where that is another.
    """

    asked: Asked
    watches: tuple[Watch, ...]


class Verdict(NamedTuple):
    """What the gate of one edit says of one row.

    Attributes:
        edit: index of the edit.
        how: how the text names it.
        watch: the answer that is likeliest, against its threshold.
        score: S, nats a token, at the best place.
        threshold: it is to exceed.
        start: position of the row at which the answer would begin.
        length: tokens of the answer, or of it and itself again where it is said twice in a row.
        way: which way of spelling it, 0 after a blank, 1 at the start of a line.
        said: whether the gate is open: the score exceeds the threshold and one of the answer's tokens is the likeliest
            at its place, or all of them are, whatever the threshold.
        again: further positions at which it would begin, if it is said more than once.
    """

    edit: int
    how: How
    watch: Watch | None
    score: float
    threshold: float
    start: int
    length: int
    way: int
    said: bool = False
    again: tuple[int, ...] = ()

    @property
    def places(self) -> tuple[Verdict, ...]:
        """The verdict, once for each place at which the answer would be said."""
        assert self.watch is not None
        once = len(self.watch.tokens[self.way])
        return (self, *(self._replace(start=place, length=once, again=()) for place in self.again))

    @property
    def over(self) -> float:
        """By how much the score exceeds the threshold."""
        return self.score - self.threshold


@dataclass(frozen=True)
class Row:
    """One row of a forward, as the gate sees it; on the model's device but for ``ids``.

    Attributes:
        ids: the whole row, int64 ``(P,)``.
        at: its masked positions that this forward predicts, int64 ``(A,)``.
        log_p: their distributions, ``(A, V)`` float32.
        hidden: the last block's output they are read from, ``(A, d)``.
    """

    ids: Tensor
    at: Tensor
    log_p: Tensor
    hidden: Tensor

    @cached_property
    def _top(self) -> Tensor:
        """The likeliest token of each position, and what stands there of those that are not masked."""
        top = self.ids.to(self.log_p.device)
        return top.index_copy(0, self.at, self.log_p.argmax(-1))

    def likeliest(self, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many masked tokens of an answer ``(n,)`` are the likeliest at their places, and of how many.

        Both for each position at which the answer may begin, ``(P,)``.
        """
        n, masked = len(answer), torch.zeros(len(self._top) + len(answer) - 1, device=self._top.device)
        masked[self.at] = 1.0
        top = torch.cat([self._top, torch.full((n - 1,), -1, device=self._top.device)])
        same, open_ = top.unfold(0, n, 1) == answer, masked.unfold(0, n, 1)
        return (same * open_).sum(1), open_.sum(1)

    def ends_at(self, position: int, eos_id: int | None) -> bool | None:
        """Whether the text ends at a position: the row nearly does, or end-of-text stands or is about to stand there.

        None where the state does not say: what follows an answer depends on the answer, which does not stand there yet.
        """
        if position + CRAMPED >= len(self.ids):
            return True
        if eos_id is None:
            return False
        where = (self.at == position).nonzero()
        if not len(where):
            return bool(self.ids[position] == eos_id)
        log_p = float(self.log_p[where[0, 0], eos_id])
        return True if log_p > LIKELY else False if log_p < NEVER else None


def questions(backbone: Backbone, facts: Sequence[Fact], says: Sequence[str | None]) -> list[Said]:
    """Read each fact's own question: its activations, and what must not be said.

    Args:
        backbone: the model, read without any memory.
        facts: the facts.
        says: what each is to be answered with.

    Raises:
        FactError: a prompt leaves no room for an answer.
        FloatingPointError: activations are not finite.
    """
    read = []
    for fact, text in zip(facts, says, strict=True):
        answers = [fact.object] if text is None else [fact.object, text]
        room = max(len(tokens) for answer in answers for tokens in spelt(backbone, answer)) + ROOM
        read.append(ask(backbone, fact.prompt, max(room, 2 * ROOM)))
    rows = [_row(backbone, asked) for asked in read]
    watched = [_watch(backbone, fact.object, row) for fact, row in zip(facts, rows, strict=True)]
    # Where it is sure to be the fact's answer, what the model says need not be decoded.
    unsure = [i for i, watch in enumerate(watched) if watch.own * len(watch.tokens[0]) < math.log(0.5)]
    today = dict(zip(unsure, _today(backbone, [read[i] for i in unsure]), strict=True))
    found = []
    for i, (fact, text, asked, row, watch) in enumerate(zip(facts, says, read, rows, watched, strict=True)):
        watches = [watch]
        other = _other(today.get(i, ""), fact.object, text)
        if other is not None:
            watch = _watch(backbone, other, row)
            if watch.own > watches[0].own - GIVEN:
                watches.append(watch)
        found.append(Said(asked, tuple(watches)))
    return found


def _today(backbone: Backbone, read: Sequence[Asked]) -> list[str]:
    """Decode what the model says to each question, those of one canvas together."""
    texts = [""] * len(read)
    sizes = sorted({int(asked.canvas.sum()) for asked in read})
    for size in sizes:
        some = [i for i, asked in enumerate(read) if int(asked.canvas.sum()) == size]
        prompts = [read[i].ids[~read[i].canvas].tolist() for i in some]
        found = complete(backbone, prompts, canvas=size, config=SamplerConfig(steps=min(size, 16)))
        for i, row in zip(some, found, strict=True):
            texts[i] = backbone.decode(row).strip()
    return texts


def _other(said: str, present: str, wanted: str | None) -> str | None:
    """What the model says, where that is no part of the fact's answer or the wanted one, nor holds either."""
    plain = said.strip().strip(".").casefold()
    known = [answer.strip().strip(".").casefold() for answer in (present, wanted) if answer]
    return None if not plain or any(answer in plain or plain in answer for answer in known) else said


def _row(backbone: Backbone, asked: Asked) -> Row:
    at = asked.canvas.nonzero().flatten()[-len(asked.hidden) :]
    return Row(asked.ids, at.to(backbone.device), log_probabilities(backbone, asked.hidden), asked.hidden)


def _watch(backbone: Backbone, text: str, row: Row) -> Watch:
    ways = spelt(backbone, text)
    own = max(float(answer_scores(row.log_p, row.at, row.ids, torch.tensor(tokens)).max()) for tokens in ways)
    return Watch(text, ways, own)


def log_probabilities(backbone: Backbone, hidden: Tensor, rows: int = 512) -> Tensor:
    """Return the log-distributions ``(A, V)``, float32, that the last block's output ``(A, d)`` stands for."""
    with torch.no_grad():
        return torch.cat([backbone.predictions(part).log() for part in hidden.split(rows)])


def verdict(index: int, edit: Edit, how: How, row: Row, tokens: Sequence[tuple[Watch, Sequence[Tensor]]]) -> Verdict:
    """Return what an edit's gate says of a row: the likeliest of its answers, at the likeliest place.

    Args:
        index: of the edit.
        edit: the edit, with a gate.
        how: how the row names it.
        row: the row.
        tokens: its watches, with their tokens on the model's device.
    """
    gate = edit.gate
    assert gate is not None
    best = Verdict(index, how, None, -torch.inf, 0.0, 0, 0, 0)
    for watch, ways in tokens:
        threshold = gate.threshold_of(watch)
        for way, answer in enumerate(ways):
            scores = answer_scores(row.log_p, row.at, row.ids, answer)
            open_ = scores > threshold
            if gate.threshold is None:
                likeliest, of = row.likeliest(answer)
                open_ = (open_ & (likeliest > 0)) | ((scores > UNLIKELY) & (likeliest == of))
            said = bool(open_.any())
            # The first of several places, and those after it that it leaves room for: an answer may be said twice.
            places = _apart(open_.nonzero().flatten().tolist(), len(answer)) or [int(scores.argmax())]
            first, score = places[0], float(scores[places[0]])
            # Said twice in a row it is one answer: what replaces it is said once.
            times = next((n for n in range(1, len(places)) if places[n] != first + n * len(answer)), len(places))
            size, again = min(times * len(answer), len(row.ids) - first), tuple(places[times:])
            found = Verdict(index, how, watch, score, threshold, first, size, way, said, again)
            # Of two that are about to be said the longer one holds all that must not be.
            if best.watch is None or _rank(found) > _rank(best):
                best = found
    return best


def _rank(found: Verdict) -> tuple[bool, int, float]:
    return found.said, found.length if found.said else 0, found.over


def _apart(places: list[int], length: int) -> list[int]:
    """Return those of ascending places that leave the ones before them room."""
    found: list[int] = []
    for place in places:
        if not found or place >= found[-1] + length:
            found.append(place)
    return found


class Act(NamedTuple):
    """An edit at work in a row.

    Attributes:
        edit: its id.
        start: position at which what it says begins.
        length: tokens of the answer that it replaces, from there.
        way: which way of spelling what it says.
        ends: whether the text ends after it.
    """

    edit: str
    start: int
    length: int
    way: int
    ends: bool


Follows = Callable[[Tensor, int], bool]


def act(found: Verdict, edit: Edit, row: Row, eos_id: int | None, follows: Follows) -> Act:
    """Return how an edit whose gate is open acts on a row: from the first place of the answer that is still open.

    Args:
        found: the gate's verdict.
        edit: the edit.
        row: the row.
        eos_id: end-of-text.
        follows: says of a row ``(P,)`` whether end-of-text comes at a position; asked where the row itself is unsure.
    """
    open_ = row.at[(row.at >= found.start) & (row.at < found.start + found.length)]
    start, after = int(open_[0]), found.start + found.length
    ends = row.ends_at(after, eos_id)
    if ends is None:
        assert found.watch is not None
        told = row.ids.clone()
        answer = torch.tensor(found.watch.tokens[found.way])
        told[found.start : after] = answer.repeat(1 + found.length // len(answer))[: found.length]
        ends = follows(told, after)
    way = found.way if isinstance(edit.change, Placed) and found.way < len(edit.change.tokens) else 0
    return Act(edit.id, start, after - start, way, ends)


def gate_of(backbone: Backbone, fact: Fact, watches: Sequence[Watch], threshold: float | None = None) -> AnswerGate:
    """Return the gate of a fact's edit."""
    names = tuple(dict.fromkeys((fact.subject, *fact.aliases)))
    spellings = tuple(
        dict.fromkeys(
            tuple(backbone.encode(text))
            for name in names
            for own in dict.fromkeys((name, name.lower()))
            for text in (" " + own, own)
        )
    )
    return AnswerGate(tuple(watches), names, (fact.prompt, *fact.paraphrases), spellings, threshold)

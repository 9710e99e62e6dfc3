"""Why an edit acts, or does not: the answer gate's view of a prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from .answer_gate import Follows, Row, Verdict, log_probabilities
from .edits import Edit
from .methods import Asked
from .naming import Named
from .relation import features, value
from .runtime.compiled import Compiled

_HEAD = ("edit", "named", "watched for", "score", "threshold", "")


@dataclass(frozen=True)
class Candidate:
    """What the gate of one edit says of a prompt.

    Attributes:
        id: of the edit.
        how: how the prompt names it.
        by: the words that do.
        watched: the answer that is likeliest, against its threshold.
        score: S, the answer's log-probability in nats a token, where it is likeliest; None where it does not fit. Of an
            edit that teaches, what its classifier says of the question.
        threshold: the score is to exceed it.
        place: of the canvas at which the answer would begin, from 0.
        places: S at each place of the canvas; None where the answer does not fit.
        acts: whether the edit acts.
        why: in words.
    """

    id: str
    how: str
    by: str
    watched: str
    score: float | None
    threshold: float
    place: int
    places: tuple[float | None, ...]
    acts: bool
    why: str


@dataclass(frozen=True)
class Explanation:
    """Which edits a prompt names, and which of them act on the first step.

    Attributes:
        prompt: the prompt.
        candidates: the edits it names, the likeliest first.
        edits: how many edits are in force.
    """

    prompt: str
    candidates: tuple[Candidate, ...]
    edits: int

    @property
    def acting(self) -> tuple[str, ...]:
        """Ids of the edits that act."""
        return tuple(c.id for c in self.candidates if c.acts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {"prompt": self.prompt, "edits": self.edits, "candidates": [asdict(c) for c in self.candidates]}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: edit, named by, watched answer, score, threshold, why."""
        return [
            (
                c.id, f"{c.how}: {c.by}" if c.by else c.how, c.watched, "" if c.score is None else f"{c.score:.2f}",
                f"{c.threshold:.2f}", c.why,
            )
            for c in self.candidates
        ]  # fmt: skip

    def __str__(self) -> str:
        if not self.candidates:
            return f"{self.prompt!r} names none of the {self.edits} edits in force; none acts."
        table = [_HEAD, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([f"{self.prompt!r}: {len(self.acting)} of {self.edits} edits act", *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<p>{escape(self.prompt)}</p><table><tr>{head}</tr>{body}</table>"


def explain(compiled: Compiled, prompt: str, asked: Asked, follows: Follows) -> Explanation:
    """Return what the gates of a memory say of a prompt; see :meth:`timerome.EditMemory.explain`."""
    backbone = compiled.backbone
    at = asked.canvas.nonzero().flatten()[-len(asked.hidden) :].to(asked.hidden.device)
    row = Row(asked.ids, at, log_probabilities(backbone, asked.hidden), asked.hidden)
    named = compiled.named(prompt, None)
    named += compiled.unnamed(row, named, None)
    taught = [n for n in named if compiled.relation(n.edit) is not None]
    named = [n for n in named if n not in taught]
    found = _taught(compiled, taught, asked)
    acts = [compiled.taught(n.edit, at.tolist(), 0) for n, c in zip(taught, found, strict=True) if c.acts]
    acting = {a.edit for a in compiled.acts(row, named, acts, follows)}
    names = {n.edit: n for n in named}
    first = int(asked.canvas.nonzero()[0])
    found += [_candidate(compiled, names[v.edit], v, row, first, acting) for v in compiled.verdicts(row, named)]
    return Explanation(prompt, tuple(found), len(compiled.edits))


def _taught(compiled: Compiled, named: list[Named], asked: Asked) -> list[Candidate]:
    """Say of edits that watch for no answer whether the question is theirs, by what their heads say of it."""
    if not named:
        return []
    (feature,) = features(compiled.backbone, [asked.ids[~asked.canvas].tolist()])
    found = []
    for n in named:
        head = compiled.relation(n.edit)
        assert head is not None
        score = value(head, feature)
        why = "acts" if score > 0 else "it is another question"
        found.append(
            Candidate(compiled.edits[n.edit].id, n.how, n.by, "its question", score, 0.0, 0, (), score > 0, why)
        )
    return found


def _candidate(compiled: Compiled, named: Named, v: Verdict, row: Row, first: int, acting: set[str]) -> Candidate:
    edit: Edit = compiled.edits[v.edit]
    scores = compiled.scores(row, v)[first:]
    acts = edit.id in acting
    if acts:
        why = "acts"
    elif v.said:
        why = "another edit already answers there"
    elif v.watch is None or v.score == float("-inf"):
        why = "the answer does not fit"
    else:
        why = "the model is not about to say it"
    places = tuple(None if s == float("-inf") else s for s in scores)
    text = "" if v.watch is None else v.watch.text
    score = None if v.score == float("-inf") else v.score
    return Candidate(edit.id, v.how, named.by, text, score, v.threshold, v.start - first, places, acts, why)

"""Whether a question is the one an edit is about: a closed-form classifier for facts without a present answer.

A *teach* edit has no answer of the model's to watch for: asked about what it does not know, a model says the same of
everything ("I don't know"), or what comes to mind. What tells its question from others about the subject is what the
model reads in them. Positives are the fact's own wordings, as they stand and changed; negatives are a bank of other
questions with the subject put in. Nobody has to bring any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Site
from ..facts import Fact
from ..ops import ridge_cholesky
from .edits import RelationHead
from .naming import FUNCTION, words_of
from .reading import Wish, read
from .variants import variants_of

RIDGE = 0.01
SURE = 0.5
ROOM = 8  # places of the canvas that a question is read with


@cache
def bank() -> tuple[str, ...]:
    """Questions about anything, the subject left open as ``{}``."""
    text = (files("timerome") / "assets" / "questions.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def layer_of(backbone: Backbone) -> int:
    """The block whose output is read: two thirds of the depth, where a question is understood and not yet answered."""
    return min(backbone.n_layers - 1, round(2 * backbone.n_layers / 3))


def features(backbone: Backbone, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return what the model reads in prompts: the mean activation over each, its answer masked, ``(n, d)`` float32.

    Args:
        backbone: the model, read without any memory.
        prompts: token ids.
    """
    site, found = Site(layer_of(backbone)), torch.zeros(len(prompts), backbone.hidden_size)
    wishes = []
    for ids in prompts:
        tokens = list(ids)[-(backbone.max_length - ROOM) :]
        state = torch.tensor(tokens + [backbone.mask_id] * ROOM)
        wishes.append(Wish(state, {site: torch.ones(len(state), dtype=torch.bool)}))
    for i, rows in read(backbone, wishes):
        found[i] = rows[site].float().mean(0).cpu()
    return found


def relation_head(backbone: Backbone, fact: Fact) -> RelationHead:
    """Return the classifier of a fact's question, solved in closed form.

    Ridge regression on +1 and -1, both kinds of equal weight, about the mean of the two kinds' means; it fires where it
    says more than ``SURE``: a question that is like neither is not the fact's. Questions of the bank that share a word
    with the fact's own, beside its subject and function words, may be the same question and are left out.

    Raises:
        FloatingPointError: activations are not finite.
    """
    own = [fact.prompt, *fact.paraphrases]
    asked = [v.get("prompt", f"{v['context']} {fact.prompt}" if "context" in v else fact.prompt)
             for v in variants_of(fact, ("lowercase", "introduced", "wrapped"))]  # fmt: skip
    positives = list(dict.fromkeys([*own, *asked, *(f"Question: {p} Answer:" for p in own)]))
    known = {word for text in own for word in words_of(text)} - set(words_of(fact.subject)) - FUNCTION
    others = [q.replace("{}", fact.subject) for q in bank() if not known & set(words_of(q))]
    x = features(backbone, [backbone.encode(text) for text in [*positives, *others]]).double()
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"EditMemory.teach: activations of fact {fact.id!r} are not finite.")
    n = len(positives)
    middle = (x[:n].mean(0) + x[n:].mean(0)) / 2
    x = x - middle
    weight = torch.cat([torch.full((n,), 0.5 / n), torch.full((len(others),), 0.5 / len(others))]).double().sqrt()
    y = torch.cat([torch.ones(n), -torch.ones(len(others))]).double()
    rows = weight[:, None] * x
    solved = rows.T @ (ridge_cholesky(rows, ridge=RIDGE).inverse @ (weight * y))
    return RelationHead(solved.float(), float(-(middle @ solved)) - SURE)


def value(head: RelationHead, feature: Tensor) -> float:
    """What a head says of a question, by its features ``(d,)``: more than 0 where it is its own."""
    return float(feature @ head.weight) + head.bias


def asks(head: RelationHead, feature: Tensor) -> bool:
    """Whether a question, by its features ``(d,)``, is the head's own."""
    return value(head, feature) > 0

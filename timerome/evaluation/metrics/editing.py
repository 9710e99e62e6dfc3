"""Metrics of knowledge edits: CounterFact, zsRE, KnowEdit, lifelong editing.

Notation: ℓ is the mean negative log-likelihood a token, nats; o* the new object, o the true one.

Source: Meng et al., Locating and Editing Factual Associations in GPT, 2022 (ES, PS, NS, magnitudes); Yao et al.,
Editing Large Language Models: Problems, Methods, and Opportunities, 2023 (reliability, generality, locality,
portability).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def success(wanted: float, other: float) -> float:
    """1 where the wanted object is strictly the more probable one a token: 1[ℓ(other) > ℓ(wanted)].

    For efficacy and paraphrases the wanted object is o*, for neighbours o. A tie is no success in either direction.

    Example:
        >>> success(1.0, 2.0), success(1.0, 1.0)
        (1.0, 0.0)
    """
    return float(other > wanted)


def magnitude(wanted: float, other: float) -> float:
    """exp(-ℓ(wanted)) - exp(-ℓ(other)): by how much the wanted object is the more probable one.

    Example:
        >>> magnitude(0.0, math.inf)
        1.0
    """
    return math.exp(-wanted) - math.exp(-other)


def token_accuracy(hits: Sequence[int]) -> float:
    """Share of target tokens that are the model's first choice, the answer's end-of-text token not among them.

    Raises:
        ValueError: there is no token.

    Example:
        >>> token_accuracy([1, 0, 1, 1])
        0.75
    """
    _some("token_accuracy", hits)
    return sum(hits) / len(hits)


def agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """Locality: share of positions where the first choice after the edit is the one **before** it, right or wrong.

    Args:
        before: the unedited model's first choices, token ids.
        after: the edited model's, at the same positions.

    Raises:
        ValueError: the lengths differ, or there is no position.

    Example:
        >>> agreement([5, 6, 7, 8], [5, 6, 7, 9])
        0.75
    """
    _some("agreement", before)
    if len(before) != len(after):
        raise ValueError(f"agreement: expected as many positions before as after, got {len(before)} and {len(after)}.")
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before)


def says(text: str, answer: str) -> float:
    """1 where a text is an answer, white space, letter case and a final full stop aside.

    Example:
        >>> says("The  Hague.", "the Hague"), says("The Hague", "Hague")
        (1.0, 0.0)
    """
    return float(_plain(text) == _plain(answer))


def mentions(text: str, answer: str) -> float:
    """1 where an answer stands in a text, as whole words, white space and letter case aside.

    Example:
        >>> mentions("It lies in the Hague, I think.", "The Hague"), mentions("A maled version", "male")
        (1.0, 0.0)
    """
    padded = "".join(c if c.isalnum() else " " for c in text.casefold())
    wanted = "".join(c if c.isalnum() else " " for c in answer.casefold())
    return float(f" {' '.join(wanted.split())} " in f" {' '.join(padded.split())} ")


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def _some(function: str, values: Sequence[float]) -> None:
    if not len(values):
        raise ValueError(f"{function}: expected at least one value, got none; leave that record out.")

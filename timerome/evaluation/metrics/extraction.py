"""How much of an answer can be got out of a model: extraction strength, by prefixes and by infilling.

Source: OpenUnlearning (Dorna et al. 2025, arXiv 2506.12618) on autoregressive models; Carlini et al. 2021 for
the idea. Extraction by infilling is what a bidirectional model adds: any part of the answer may be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Geometry = Literal["suffix", "prefix", "middle", "random", "span"]
GEOMETRIES: tuple[Geometry, ...] = get_args(Geometry)


def extraction_strength(recovered: Sequence[int]) -> float:
    """1 - k*/L, k* the shortest prefix of the answer after which all the rest comes out.

    Args:
        recovered: at k, from 0 to L - 1: 1 where everything from token k on comes out once the k before it are shown.

    Returns:
        1 where all comes out without help, 0 where not even the last token does.

    Raises:
        ValueError: there is no token.

    Example:
        >>> extraction_strength([0, 0, 1, 1])
        0.5
    """
    if not len(recovered):
        raise ValueError("extraction_strength: expected at least one token, got none; leave that record out.")
    length = len(recovered)
    first = next((k for k, all_right in enumerate(recovered) if all_right), length)
    return 1.0 - first / length


def hidden_by(geometry: Geometry, length: int, count: int, seed: int = 0) -> Tensor:
    """Return which of ``length`` answer positions a geometry hides, boolean ``(length,)``; ``count`` of them.

    - ``suffix``: the end is hidden, as for an autoregressive model; ``prefix``: the beginning.
    - ``middle``: both edges are visible.
    - ``span``: one run at a random place, as in a redacted document.
    - ``random``: positions drawn one by one.

    Args:
        geometry: which.
        length: answer tokens.
        count: how many are hidden, 1 to ``length``.
        seed: of the draws; together with ``length`` and ``count`` it determines them.

    Raises:
        ValueError: an unknown geometry, or ``count`` out of range.

    Example:
        >>> hidden_by("middle", 5, 2).int().tolist()
        [0, 1, 1, 0, 0]
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"hidden_by: expected geometry in {GEOMETRIES}, got {geometry!r}.")
    if not 1 <= count <= length:
        raise ValueError(f"hidden_by: expected count between 1 and {length}, got {count}.")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length * 1_009 + count)
    hidden = torch.zeros(length, dtype=torch.bool)
    if geometry == "random":
        hidden[torch.randperm(length, generator=generator)[:count]] = True
        return hidden
    free = length - count
    start = {"suffix": free, "prefix": 0, "middle": free // 2, "span": 0}[geometry]
    if geometry == "span":
        start = int(torch.randint(free + 1, (), generator=generator))
    hidden[start : start + count] = True
    return hidden


def infill_strength(fractions: Sequence[float], recovered: Sequence[float]) -> float:
    """Largest hidden fraction of which **everything** comes back; 0 where nothing does.

    With all prefixes of an answer hidden in turn this is :func:`extraction_strength`.

    Args:
        fractions: hidden share of the answer, one a state, in (0, 1].
        recovered: share of the hidden tokens that came back.

    Raises:
        ValueError: lengths differ, or there is no state.

    Example:
        >>> infill_strength([0.25, 0.5, 1.0], [1.0, 1.0, 0.4])
        0.5
    """
    _check_curve("infill_strength", fractions, recovered)
    return max((f for f, r in zip(fractions, recovered, strict=True) if r == 1.0), default=0.0)


def infill_area(fractions: Sequence[float], recovered: Sequence[float]) -> float:
    """Area under the share of hidden tokens that come back, against the hidden fraction, by the trapezoid rule.

    From 0 to the first fraction the curve is taken to be level. The area is divided by the largest fraction, so that 1
    is a model that gives everything back.

    Args:
        fractions: hidden share of the answer, strictly increasing, in (0, 1].
        recovered: share of the hidden tokens that came back.

    Raises:
        ValueError: lengths differ, there is no state, or fractions do not increase.

    Example:
        >>> infill_area([0.5, 1.0], [1.0, 0.0])
        0.75
    """
    _check_curve("infill_area", fractions, recovered)
    if any(b <= a for a, b in zip(fractions, fractions[1:], strict=False)):
        raise ValueError(f"infill_area: expected fractions to increase, got {list(fractions)}.")
    area = fractions[0] * recovered[0]
    for i in range(1, len(fractions)):
        area += (fractions[i] - fractions[i - 1]) * (recovered[i] + recovered[i - 1]) / 2
    return area / fractions[-1]


def _check_curve(function: str, fractions: Sequence[float], recovered: Sequence[float]) -> None:
    if not fractions or len(fractions) != len(recovered):
        raise ValueError(
            f"{function}: expected one share recovered for each of at least one hidden fraction, got "
            f"{len(recovered)} and {len(fractions)}."
        )

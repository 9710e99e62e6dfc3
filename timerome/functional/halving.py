"""Successive halving: fewer coordinates with more draws, at a stated chance of losing the best one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .effects import TIED, Bools, Floats

PRIOR_DRAWS = 4  # what the spread of the other coordinates counts for in a coordinate's own, in degrees of freedom


def rounds_of(draws: int, first: int = 2) -> list[range]:
    """Share draws out over rounds, each bringing as many as all before it.

    Example:
        >>> rounds_of(10)
        [range(0, 2), range(2, 4), range(4, 8), range(8, 10)]
    """
    ends = [0, min(first, draws)]
    while ends[-1] < draws:
        ends.append(min(2 * ends[-1], draws))
    return [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def errors_of(rounds: Sequence[range], error: float) -> list[float]:
    """Share an error out over the rounds but the last, in proportion to the draws that each can save.

    Example:
        >>> errors_of(rounds_of(8), 0.5)
        [0.3, 0.2]
    """
    left = [rounds[-1].stop - r.stop for r in rounds[:-1]]
    return [error * draws / sum(left) for draws in left]


def survivors(values: Floats, error: float, sizes: Floats | None = None) -> Bools:
    """Say which coordinates may still be the best.

    Those that are certainly behind the leader, by more than counts as a tie, are dropped, worst first, while the sum of
    their chances of being ahead of it in truth stays within ``error``. A coordinate's chance is a one-sided t test on
    its differences to the leader, draw by draw; as few draws say little about its spread, that is averaged with the
    spread of the others' differences, which counts for :data:`PRIOR_DRAWS` draws. So ``error`` bounds the chance that a
    round drops the best coordinate as far as differences are normal and coordinates' spreads alike.

    Draws differ in how much there is to restore, and most of a difference's spread is that. Where those ``sizes`` are
    known beforehand, of all draws that are planned, what is tested is whether a coordinate could be ahead in the mean
    over all of them: the difference as a share of the size, and only its spread around that share.

    Args:
        values: of C coordinates in n draws, ``(n, C)``; a coordinate with a NaN does not survive.
        error: of this round, in [0, 1); 0 drops nothing.
        sizes: of the D >= n planned draws, of which ``values`` has the first n, ``(D,)``, in any unit. None: they are
            alike, and the truth is the mean over ever more draws.

    Returns:
        ``(C,)``; the leader survives. With fewer than two draws, or sizes that are not positive on average, everything
        that is defined does.

    Raises:
        ValueError: ``values`` is not two-dimensional, ``error`` is outside [0, 1), or there are fewer sizes than draws.

    Source: the halving schedule is Karnin, Koren, Somekh 2013 (almost optimal exploration in multi-armed bandits); the
    averaged variance Smyth 2004 (linear models and empirical Bayes), its degrees of freedom fixed; the ratio estimator
    and its variance Cochran 1977 (sampling techniques), chapter 6; the union bound in place of a fixed half is ours, so
    that the chance of an error can be stated.

    Example:
        >>> survivors(np.array([[0.9, 0.1, 0.8], [1.0, 0.0, 1.1], [1.1, 0.1, 0.9]]), error=0.05)
        array([ True, False,  True])
    """
    if values.ndim != 2:
        raise ValueError(f"survivors: expected values (n, C), got shape {values.shape}.")
    if not 0 <= error < 1:
        raise ValueError(f"survivors: expected error in [0, 1), got {error}.")
    if sizes is not None and len(sizes) < len(values):
        raise ValueError(f"survivors: expected the sizes of at least {len(values)} draws, got {len(sizes)}.")
    from scipy.stats import t

    n = len(values)
    defined = np.asarray(np.isfinite(values).all(0))
    size = np.ones(n) if sizes is None else sizes[:n] / sizes.mean()
    if n < 2 or not defined.any() or not size.sum() > 0:
        return np.asarray(defined)
    means = np.where(defined, values.mean(0), -np.inf)
    leader = int(means.argmax())
    behind = values[:, [leader]] - values
    share = behind.sum(0) / size.sum()  # of the mean size, so it estimates the mean difference
    left = 1.0 if sizes is None else 1 - n / len(sizes)  # no draw that is not planned can change the mean
    variance = left * ((behind - share * size[:, None]) ** 2).sum(0) / (n - 1) / size.mean() ** 2
    others = defined & (np.arange(len(defined)) != leader)
    if not others.any():
        return np.asarray(defined)
    freedom = PRIOR_DRAWS + n - 1
    moderated = (PRIOR_DRAWS * variance[others].mean() + (n - 1) * variance) / freedom
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = (share - TIED) * np.sqrt(n / moderated)
    chance = np.where(others, t.sf(np.nan_to_num(statistic), freedom), 1.0)
    worst_first = np.argsort(chance, kind="stable")
    dropped = worst_first[np.cumsum(chance[worst_first]) <= error]
    keep = np.array(defined)
    keep[dropped] = False
    keep[leader] = True
    return keep

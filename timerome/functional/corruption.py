"""Noise on subject embeddings, for the corrupted run of causal tracing."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def noise_std(embeddings: Tensor) -> float:
    """Return the standard deviation of embeddings, over all tokens and dimensions together.

    ROME's rule for the corrupted run: Gaussian noise of 3 times this value, of the subject tokens' embeddings.

    Args:
        embeddings: of subject tokens, ``(n, d)``, any floating dtype; at least two entries.

    Returns:
        The sample standard deviation (n - 1 in the denominator), in the units of the embeddings, computed in float64.

    Raises:
        ValueError: there are fewer than two entries, or some are not finite.

    Source: Meng, Bau, Andonian, Belinkov 2022 (ROME, arXiv 2202.05262), section 2.1 and appendix B.1.

    Example:
        >>> noise_std(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
        1.15470053...
    """
    if embeddings.numel() < 2:
        raise ValueError(f"noise_std: expected at least two entries, got shape {tuple(embeddings.shape)}.")
    if not torch.isfinite(embeddings).all():
        raise ValueError("noise_std: the embeddings are not finite; check the model's weights.")
    return float(embeddings.double().std())


def seeded_generator(seed: int, *key: object) -> torch.Generator:
    """Return a CPU generator that depends on ``seed`` and ``key`` alone.

    So a fact's draws do not change when other facts come and go, when a trace is resumed, or between processes.

    Args:
        seed: of the whole trace.
        key: what the numbers are for; anything whose ``str`` is stable.

    Example:
        >>> a, b = seeded_generator(0, "fact-1", 0), seeded_generator(0, "fact-1", 0)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    digest = hashlib.sha256(repr((seed, *map(str, key))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))


def subject_noise(positions: Tensor, hidden_size: int, std: float, generator: torch.Generator) -> Tensor:
    """Draw Gaussian noise at some positions of a sequence, zero elsewhere.

    Args:
        positions: True where noise is wanted, boolean ``(L,)``.
        hidden_size: d.
        std: standard deviation of each entry, >= 0, in the units of the embeddings.
        generator: of the noise, on the CPU.

    Returns:
        Float32 ``(L, d)`` on the CPU.

    Raises:
        ValueError: ``std`` is negative or not finite.

    Example:
        >>> noise = subject_noise(torch.tensor([False, True]), 3, 2.0, torch.Generator().manual_seed(0))
        >>> noise.shape, bool(noise[0].any()), bool(noise[1].all())
        (torch.Size([2, 3]), False, True)
    """
    if not 0 <= std < float("inf"):
        raise ValueError(f"subject_noise: expected a finite std >= 0, got {std}.")
    noise = torch.zeros(len(positions), hidden_size)
    noise[positions] = std * torch.randn(int(positions.sum()), hidden_size, generator=generator)
    return noise

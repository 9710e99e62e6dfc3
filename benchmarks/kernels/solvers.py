"""``ridge_cholesky``, and ``cholesky_append`` and ``cholesky_delete``, against ``torch.linalg``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from timerome.ops import cholesky_append, cholesky_delete, ridge_cholesky

from .cases import Benchmark, Case, Rival, Setup

RIDGE = 1e-3


def sizes(setup: Setup, grid: str) -> Iterator[tuple[Any, ...]]:
    """(B, N, d, ridges): B systems of N keys of d entries, d values each, for so many ridges."""
    yield from [(1, 40, 4096, 1), (64, 40, 1024, 1)]
    if grid == "quick":
        if setup.device.type == "cuda":
            yield from [(256, 40, 1024, 1), (256, 40, 1024, 8), (4096, 40, 256, 1)]
        return
    yield from [(1, 400, 4096, 1), (1, 1000, 4096, 1), (64, 100, 1024, 1), (256, 16, 1024, 1), (256, 40, 1024, 1)]
    yield from [(256, 40, 1024, 8), (4096, 16, 256, 1), (4096, 40, 256, 1)]
    if grid == "full" or setup.device.type == "cuda":
        yield from [(256, 40, 4096, 1), (256, 40, 4096, 8), (256, 100, 1024, 1), (4096, 40, 1024, 1)]


def make(setup: Setup, b: int, n: int, d: int, ridges: int) -> Case:
    """Random keys that share a direction, as a model's do; solved in float64, as float32 loses the digits.

    Nobody looks whether a system failed, for which a GPU would be waited for.
    """
    generator = setup.generator()
    keys, values = setup.randn(generator, b, n, d) + 3 * setup.randn(generator, d), setup.randn(generator, b, n, d)
    many = [RIDGE * 2**i for i in range(ridges)]
    eye = torch.eye(n, dtype=torch.float64, device=setup.device)

    def systems(dtype: torch.dtype) -> Tensor:
        gram = keys.to(dtype) @ keys.to(dtype).mT
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return torch.stack([gram + ridge * scale * eye.to(dtype) for ridge in many])

    def solve(dtype: torch.dtype) -> Tensor:
        return torch.linalg.solve_ex(systems(dtype), values.to(dtype)).result

    def cholesky_solve(dtype: torch.dtype) -> Tensor:
        factor = torch.linalg.cholesky_ex(systems(dtype)).L
        return torch.cholesky_solve(values.to(dtype).expand(ridges, b, n, d), factor)

    def triangular(dtype: torch.dtype) -> Tensor:
        factor = torch.linalg.cholesky_ex(systems(dtype)).L
        half = torch.linalg.solve_triangular(factor, values.to(dtype), upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)

    def ours() -> Tensor:
        solution = ridge_cholesky(keys, values, ridge=many, check=False).solution
        assert solution is not None
        return solution

    truth = solve(torch.float64)
    scale = float(truth.abs().max())

    def error(found: Tensor) -> float:
        return float((found.double() - truth).abs().max()) / scale

    double, single = torch.float64, torch.float32
    rivals = {
        "timerome": Rival(ours, torch=False),
        "linalg.solve": Rival(lambda: solve(double)),
        "cholesky_solve": Rival(lambda: cholesky_solve(double)),
        "two solve_triangular": Rival(lambda: triangular(double)),
        "linalg.solve, float32": Rival(lambda: solve(single), torch=False, allowed=1.0),  # to be compared, not chosen
    }
    nbytes = 4.0 * b * n * 2 * d + 8.0 * ridges * b * n * d
    operations = b * n * n * (2.0 * d + ridges * (2.0 * d + n))
    return Case(rivals, error, 1e-5, nbytes, operations)


RIDGE_CHOLESKY = Benchmark("ridge_cholesky", ("B", "N", "d", "ridges"), sizes, make, axis="N", lines="B")


def row_sizes(setup: Setup, grid: str) -> Iterator[tuple[Any, ...]]:
    """(what, N)."""
    for what in ("append", "delete"):
        for n in (40, 400) if grid == "quick" else (16, 40, 100, 400, 1000):
            yield what, n


def make_row(setup: Setup, what: str, n: int) -> Case:
    """One key more or one less against a new factorisation, in float64 on the CPU."""
    keys = torch.randn(n + 1, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(setup.seed))
    gram = keys @ keys.mT + RIDGE * 2 * n * torch.eye(n + 1, dtype=torch.float64)
    whole = torch.linalg.cholesky(gram)
    if what == "append":
        cholesky, g, gnn, after = whole[:n, :n].contiguous(), gram[n, :n].contiguous(), float(gram[n, n]), gram
        room = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        room[:n, :n] = cholesky
        ours = Rival(lambda: cholesky_append(cholesky, g, gnn), torch=False)
        in_place = {"timerome, in place": Rival(lambda: cholesky_append(room[:n, :n], g, gnn, out=room), torch=False)}
    else:
        j = n // 2
        left = [i for i in range(n + 1) if i != j]
        after = gram[left][:, left].contiguous()
        ours, in_place = Rival(lambda: cholesky_delete(whole, j), torch=False), {}
    truth = torch.linalg.cholesky(after)

    def error(found: Tensor) -> float:
        return float((found - truth).abs().max() / truth.abs().max())

    def with_inverse() -> Tensor:
        factor = torch.linalg.cholesky(after)
        torch.cholesky_inverse(factor)
        return factor

    rivals = {
        "timerome": ours,
        **in_place,
        "linalg.cholesky": Rival(lambda: torch.linalg.cholesky(after)),
        "cholesky and inverse": Rival(with_inverse, torch=False),
    }
    return Case(rivals, error, 1e-9, 8.0 * n * n, 1.0 * n * n)


CHOLESKY_ROWS = Benchmark("cholesky_rows", ("what", "N"), row_sizes, make_row, axis="N", lines="what")

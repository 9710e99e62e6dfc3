"""A rival of :func:`timerome.ops.sparsify_add` in Triton: bisection over the bits of the magnitudes, a row a program.

Keeps every entry that equals the threshold, so rows with ties there differ from ours. Needs a GPU and Triton, which
comes with CUDA builds of PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(h, r, out, alpha, d, k, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * d
    column = tl.arange(0, block)
    inside = column < d
    x = tl.load(r + row + column, mask=inside, other=0.0)
    # Bit patterns of non-negative floats are ordered as the floats are.
    size = tl.where(inside, tl.abs(x).to(tl.int32, bitcast=True), -1)
    threshold = tl.full((), 0, tl.int32)
    for i in tl.static_range(31):
        higher = threshold + (1 << (30 - i))
        count = tl.sum((size >= higher).to(tl.int32))
        threshold = tl.where(count >= k, higher, threshold)
    a = tl.load(h + row + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.where(size >= threshold, a + alpha * x, a)
    tl.store(out + row + column, a.to(out.dtype.element_ty), mask=inside)


def sparsify_add_triton(h: Tensor, r: Tensor, k: int, alpha: float) -> Tensor:
    """Do :func:`timerome.ops.sparsify_add` for a matrix, k >= 1."""
    out = torch.empty_like(h)
    rows, d = h.shape
    _kernel[(rows,)](h, r, out, alpha, d, k, block=triton.next_power_of_2(d), num_warps=8)
    return out

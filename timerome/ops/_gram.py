"""Gram matrices of sets of keys in float64: PyTorch on the CPU, a kernel of ours for few keys on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from timerome import _backend
from timerome.ops._lowrank import aligned
from timerome.ops.sparsify_add import DTYPES

_lib = Library("timerome", "FRAGMENT")
_lib.define("gram(Tensor keys, Tensor? lengths) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def first_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``x`` ``(*batch, N, d)`` with zeros from row ``lengths`` ``(*batch,)`` of each entry on, whatever is there."""
    if lengths is None:
        return x
    inside = torch.arange(x.shape[-2], device=x.device) < lengths[..., None]
    return torch.where(inside[..., None], x, 0.0)


def gram_reference(keys: Tensor, lengths: Tensor | None = None) -> Tensor:
    """K Kᵀ ``(*batch, N, N)`` in float64 of keys ``(*batch, N, d)`` of any floating dtype.

    Rows from ``lengths`` ``(*batch,)`` on are padding: they may hold anything, and their products are zero. The op
    ``timerome::gram`` is this function; its arguments are checked by :func:`timerome.ops.ridge_cholesky`.

    Example:
        >>> gram_reference(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)
    """
    k = first_rows(keys.double(), lengths)
    return k @ k.mT


def _cuda(keys: Tensor, lengths: Tensor | None) -> Tensor:
    """Few keys in a narrow dtype: read once, where torch would write them in float64 first."""
    c = _backend.compiled_cuda()
    *batch, n, d = keys.shape
    if c is None or keys.dtype not in DTYPES or keys.numel() == 0 or n > c.gram_cuda_max_n or d % 4:
        return gram_reference(keys, lengths)
    keys, lengths = aligned(keys), None if lengths is None else lengths.contiguous()
    entries, device = keys.numel() // (n * d), keys.get_device()
    splits = c.gram_cuda_splits(entries, d, device)
    parts = keys.new_empty(splits, *batch, n, n, dtype=torch.float64)
    c.gram_cuda(
        keys.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        parts.data_ptr(),
        entries,
        n,
        d,
        splits,
        DTYPES[keys.dtype],
        device,
        torch.cuda.current_stream(keys.device).cuda_stream,
    )
    return parts.sum(0) if splits > 1 else parts[0]


_lib.impl("gram", gram_reference, "CompositeExplicitAutograd")
_lib.impl("gram", _cuda, "CUDA")


@torch.library.register_fake("timerome::gram", lib=_lib)
def _(keys: Tensor, lengths: Tensor | None) -> Tensor:
    return keys.new_empty(*keys.shape[:-1], keys.shape[-2], dtype=torch.float64)

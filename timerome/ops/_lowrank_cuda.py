"""What runs behind :func:`timerome.ops.sparse_lowrank_residual` on a GPU. Nothing here waits for it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from timerome import _backend
from timerome.ops._lowrank import Edit, aligned, check, full_float32, passes_gate, rows_of
from timerome.ops.sparsify_add import DTYPES

_NAME = "sparse_lowrank_residual"
_lib = Library("timerome", "FRAGMENT")

# --- Few keys: two kernels of ours, of which the second has nothing to do for rows that no mask or gate lets through.


def _few_keys(h: Tensor, edit: Edit) -> ModuleType | None:
    """Return the extension if its kernels for few keys serve this edit."""
    (n, d), m = edit.keys.shape, edit.values.shape[0]
    if edit.edit_set is not None or not 0 < m <= n or d % 32 or 0 in (h.numel(), edit.k):
        return None
    c = _backend.compiled_cuda()
    if c is None or n > c.lowrank_cuda_max_n:
        return None
    return c if d <= c.lowrank_cuda_max_d(h.get_device(), n, m) else None


def _few_keys_cuda(c: ModuleType, h: Tensor, out: Tensor, edit: Edit) -> None:
    """Write the edited h, which is aligned, to out, which may be h."""
    keys, values = (aligned(t if t.dtype == torch.bfloat16 else t.float()) for t in (edit.keys, edit.values))
    coef, mean = edit.coef.contiguous(), None if edit.mean is None else aligned(edit.mean)
    mask = None if edit.row_mask is None else edit.row_mask.contiguous()
    (n, m), (length, d), sequences = coef.shape, h.shape[-2:], math.prod(h.shape[:-2])
    rows, device = sequences * length, h.get_device()
    hits = torch.empty(sequences, dtype=torch.int64, device=h.device)  # counted by the kernel; nobody asks
    scratch = torch.empty(c.lowrank_cuda_scratch(rows, d, n, DTYPES[h.dtype], device), device=h.device)
    c.lowrank_cuda(
        h.data_ptr(),
        out.data_ptr(),
        keys.data_ptr(),
        coef.data_ptr(),
        values.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        scratch.data_ptr(),
        hits.data_ptr(),
        rows,
        length,
        d,
        n,
        m,
        edit.k,
        edit.alpha,
        0.0 if edit.gate_threshold is None else edit.gate_threshold,
        edit.gate_threshold is not None,
        DTYPES[h.dtype],
        DTYPES[keys.dtype],
        DTYPES[values.dtype],
        device,
        torch.cuda.current_stream(h.device).cuda_stream,
    )


# --- Any other edit: library products and the epilogue.


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in float32, accumulated in float32; bfloat16 operands are read as they are where CUDA can."""
    both_bf16 = a.dtype == b.dtype == torch.bfloat16
    if a.is_cuda and both_bf16 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _expanded(c: Tensor, values: Tensor) -> Tensor:
    """Return c @ values as good as in float32; bfloat16 values are read as they are, c as a sum of three bfloat16s."""
    if values.dtype != torch.bfloat16:
        return product(c, values)
    parts = []
    for _ in range(3):
        parts.append(c.bfloat16())
        c = c - parts[-1].float()
    return product(torch.cat(parts, -1), values.repeat(3, 1))


def _cuda(h: Tensor, edit: Edit) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, their residual and which of them are active."""
    rows = rows_of(h)
    active = rows.new_ones(rows.shape[0], dtype=torch.bool) if edit.row_mask is None else edit.row_mask.reshape(-1)
    with full_float32(h.device.type):
        if edit.edit_set is None:
            x = rows if edit.mean is None else rows.float() - edit.mean
            scores = product(x, edit.keys.mT)
            own = edit.keys[: edit.values.shape[0]]
        else:
            assert edit.offsets is not None
            found = _gathered(edit)
            x = h.reshape(found.keys.shape[0], h.shape[-2], h.shape[-1]).float()
            x = x if found.mean is None else x - found.mean
            scores = x @ found.keys.mT
            own = found.keys
            active = active & (edit.edit_set >= 0).reshape(-1, 1).expand(-1, h.shape[-2]).reshape(-1)
        if edit.gate_threshold is not None:
            row_norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            key_norm = torch.linalg.vector_norm(own, dim=-1, dtype=torch.float32)
            if edit.edit_set is not None:
                key_norm = torch.where(found.own, key_norm, math.nan).unsqueeze(-2)  # NaN passes no gate
            passes = passes_gate(scores[..., : own.shape[-2]], row_norm, key_norm, edit.gate_threshold)
            active = active & passes.reshape(-1)
        if edit.edit_set is None:
            r = _expanded(scores @ edit.coef, edit.values)
        else:
            r = (scores @ found.coef @ found.values).reshape(rows.shape)
    return rows, r, active


class _Gathered(NamedTuple):
    """The edit set of each sequence, padded with zeros to the largest one."""

    keys: Tensor  # (B, max N, d)
    coef: Tensor  # (B, max N, max M)
    values: Tensor  # (B, max M, d)
    mean: Tensor | None  # (B, 1, d) or (d,)
    own: Tensor  # (B, max N): keys that have a value


def _gathered(edit: Edit) -> _Gathered:
    """Gather by index arithmetic on the device, so that the host need not know the ids."""
    assert edit.edit_set is not None and edit.offsets is not None
    ids = edit.edit_set.reshape(-1).clamp(0, max(0, edit.offsets.shape[0] - 2))
    first, last = edit.offsets[ids], edit.offsets[(ids + 1).clamp(max=edit.offsets.shape[0] - 1)]
    size = last - first

    def padded(table: Tensor, column: int, width: int) -> tuple[Tensor, Tensor]:
        offset = torch.arange(width, device=ids.device)
        inside = offset < size[:, column, None]
        if table.shape[0] == 0:
            return table.new_zeros(len(ids), width, table.shape[1], dtype=torch.float32), inside
        index = (first[:, column, None] + offset).clamp(0, table.shape[0] - 1)
        return table[index].float() * inside[..., None], inside

    keys, _ = padded(edit.keys, 0, edit.max_keys)
    coef, _ = padded(edit.coef, 0, edit.max_keys)
    values, _ = padded(edit.values, 1, edit.coef.shape[1])
    own = torch.arange(edit.max_keys, device=ids.device) < size[:, 1, None]
    mean = edit.mean
    return _Gathered(keys, coef, values, mean if mean is None or mean.dim() == 1 else mean[ids].unsqueeze(1), own)


def _on_cuda(h: Tensor, *arguments: Any) -> Tensor:
    edit = Edit(*arguments)
    check(h, edit)
    c = _few_keys(h, edit)
    if c is not None:
        x = aligned(h)
        out = torch.empty_like(x) if x is h else x
        _few_keys_cuda(c, x, out, edit)
        return out
    rows, r, active = _cuda(h, edit)
    out = torch.ops.timerome.sparsify_add(rows, r, active, edit.alpha, edit.k)
    return out.view(h.shape)


_lib.impl(_NAME, _on_cuda, "CUDA")

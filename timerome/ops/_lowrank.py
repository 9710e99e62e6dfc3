"""What runs behind :func:`timerome.ops.sparse_lowrank_residual`: the registered ops, and all of it for the CPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from timerome import _backend
from timerome.ops._arguments import check_alpha
from timerome.ops.sparsify_add import DTYPES, new_result, write_cpu

_NAME = "sparse_lowrank_residual"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ARGUMENTS = (
    "Tensor keys, Tensor coef, Tensor values, Tensor? mean, Tensor? row_mask, Tensor? edit_set, Tensor? offsets,"
    " int max_keys, float? gate_threshold, float alpha, int k"
)

_lib = Library("timerome", "FRAGMENT")
_lib.define(f"{_NAME}(Tensor h, {_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


class Edit(NamedTuple):
    """The arguments of the op besides h."""

    keys: Tensor
    coef: Tensor
    values: Tensor
    mean: Tensor | None
    row_mask: Tensor | None
    edit_set: Tensor | None
    offsets: Tensor | None
    max_keys: int
    gate_threshold: float | None
    alpha: float
    k: int


class System(NamedTuple):
    """One edit set, in float32."""

    keys: Tensor
    coef: Tensor
    values: Tensor
    mean: Tensor | None


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and on a boundary of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Undo autocast and reduced-precision float32 products, which callers switch on for their own layers."""
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def passes_gate(scores: Tensor, row_norm: Tensor, key_norm: Tensor, threshold: float) -> Tensor:
    """Rows whose largest cosine similarity with a key reaches the threshold, from scores (..., N)."""
    # 0 / 0 for a row or key of norm zero, NaN for a row that holds one: neither reaches any threshold, not even -inf.
    return (scores / (row_norm.unsqueeze(-1) * key_norm) >= threshold).any(-1)


def system_of(edit: Edit, s: int | None, bounds: list[list[int]]) -> System:
    """Cut edit set s out of the packed tensors; None: there is only one, unpacked."""
    keys, coef, values, mean = edit.keys, edit.coef, edit.values, edit.mean
    if s is not None:
        (k0, v0), (k1, v1) = bounds[s], bounds[s + 1]
        keys, coef, values = keys[k0:k1], coef[k0:k1, : v1 - v0], values[v0:v1]
        mean = mean[s] if mean is not None and mean.dim() == 2 else mean
    return System(keys.float(), coef, values.float(), mean)


def check(h: Tensor, edit: Edit) -> None:
    """Raise TypeError or ValueError for arguments that do not fit together. Asks a GPU for nothing."""
    for label, tensor in (("h", h), ("keys", edit.keys), ("values", edit.values)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{_NAME}: expected {label} in float32, float16 or bfloat16, got {tensor.dtype}; convert it first."
            )
    if edit.coef.dtype != torch.float32:
        raise TypeError(f"{_NAME}: expected coef in float32, got {edit.coef.dtype}; solve in float64, then convert.")
    if h.dim() < 2:
        raise ValueError(f"{_NAME}: expected h of shape (*batch, T, d), got {tuple(h.shape)}; unsqueeze a single row.")
    d = h.shape[-1]
    for label, tensor, rows in (("keys", edit.keys, "N"), ("values", edit.values, "M")):
        if tensor.dim() != 2 or tensor.shape[1] != d:
            raise ValueError(f"{_NAME}: expected {label} of shape ({rows}, {d}), d as in h, got {tuple(tensor.shape)}.")
    check_alpha(_NAME, edit.alpha)
    if edit.gate_threshold is not None and math.isnan(edit.gate_threshold):
        raise ValueError(f"{_NAME}: expected a gate_threshold that is a number, got nan.")
    if not 0 <= edit.k <= d:
        raise ValueError(f"{_NAME}: expected 0 <= k <= d = {d}, got k = {edit.k}.")
    _check_sets(h, edit)
    if edit.mean is not None:
        if edit.mean.dtype != torch.float32:
            raise TypeError(f"{_NAME}: expected mean in float32, got {edit.mean.dtype}; convert it first.")
        sets = None if edit.offsets is None else edit.offsets.shape[0] - 1
        if edit.mean.shape != (d,) and (sets is None or edit.mean.shape != (sets, d)):
            raise ValueError(
                f"{_NAME}: expected mean of shape ({d},)"
                + ("" if sets is None else f" or ({sets}, {d})")
                + f", d as in h, got {tuple(edit.mean.shape)}."
            )
    if edit.row_mask is not None:
        if edit.row_mask.dtype != torch.bool:
            raise TypeError(f"{_NAME}: expected row_mask in bool, got {edit.row_mask.dtype}; compare it with 0 first.")
        if edit.row_mask.shape != h.shape[:-1]:
            raise ValueError(
                f"{_NAME}: expected row_mask of shape {tuple(h.shape[:-1])}, one entry per row of h, "
                f"got {tuple(edit.row_mask.shape)}."
            )
    for label in ("keys", "coef", "values", "mean", "row_mask", "edit_set", "offsets"):
        other = getattr(edit, label)
        if other is not None and other.device != h.device:
            label = "segments.offsets" if label == "offsets" else label
            raise ValueError(f"{_NAME}: expected {label} on the device of h, {h.device}, got {other.device}.")


def _check_sets(h: Tensor, edit: Edit) -> None:
    """Check what says which sequence uses which keys, and with it the shape of coef."""
    coef, n, m = edit.coef, edit.keys.shape[0], edit.values.shape[0]
    if edit.offsets is None and edit.edit_set is None:
        if coef.shape != (n, m):
            raise ValueError(
                f"{_NAME}: expected coef of shape (N, M) = {(n, m)}, one row per key and one column per value, "
                f"got {tuple(coef.shape)}."
            )
        if m > n:
            raise ValueError(f"{_NAME}: expected at most one value per key, got {m} values and {n} keys.")
        return
    if edit.offsets is None or edit.edit_set is None:
        raise ValueError(f"{_NAME}: expected edit_set and segments together, got only one of them.")
    for label, tensor in (("edit_set", edit.edit_set), ("segments.offsets", edit.offsets)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{_NAME}: expected {label} in int64, got {tensor.dtype}.")
    if edit.edit_set.shape != h.shape[:-2]:
        raise ValueError(
            f"{_NAME}: expected edit_set of shape {tuple(h.shape[:-2])}, one id per sequence of h, "
            f"got {tuple(edit.edit_set.shape)}."
        )
    if not 0 <= edit.max_keys <= n:
        raise ValueError(f"{_NAME}: expected segments.max_keys in 0 to {n}, the number of keys, got {edit.max_keys}.")
    if edit.offsets.dim() != 2 or edit.offsets.shape[0] < 1 or edit.offsets.shape[1] != 2:
        raise ValueError(f"{_NAME}: expected segments.offsets of shape (S + 1, 2), got {tuple(edit.offsets.shape)}.")
    if coef.dim() != 2 or coef.shape[0] != n or coef.shape[1] > m:
        raise ValueError(
            f"{_NAME}: expected coef of shape ({n}, largest M), one row per key, got {tuple(coef.shape)}; "
            "see pack_edit_sets."
        )


def bounds_of(edit: Edit) -> list[list[int]]:
    """Read the offsets, which must lie on the CPU, and check them against the packed tensors and the ids."""
    if edit.offsets is None or edit.edit_set is None:
        return []
    bounds: list[list[int]] = edit.offsets.tolist()
    n, m, widest = edit.keys.shape[0], edit.values.shape[0], edit.coef.shape[1]
    steps = list(zip(bounds, bounds[1:], strict=False))
    fits = bounds[0] == [0, 0] and bounds[-1] == [n, m]
    if not fits or any(not 0 <= v1 - v0 <= min(widest, k1 - k0) for (k0, v0), (k1, v1) in steps):
        raise ValueError(
            f"{_NAME}: expected segments.offsets that rise from (0, 0) to (keys, values) = {(n, m)} by at most "
            f"{widest} values a set, one per key, got {bounds[:4]}{'...' if len(bounds) > 4 else ''}; "
            "see pack_edit_sets."
        )
    largest = max((k1 - k0 for (k0, _), (k1, _) in steps), default=0)
    if largest > edit.max_keys:
        raise ValueError(
            f"{_NAME}: expected segments.max_keys of at least {largest}, the keys of the largest set, "
            f"got {edit.max_keys}; see pack_edit_sets."
        )
    if edit.edit_set.numel():
        low, high = (int(x) for x in edit.edit_set.aminmax())
        if low < -1 or high >= len(bounds) - 1:
            raise ValueError(
                f"{_NAME}: expected edit_set in -1 (none) to {len(bounds) - 2}, one of {len(bounds) - 1} sets, "
                f"got {low if low < -1 else high}."
            )
    return bounds


# --- CPU: BLAS products and the compiled epilogue, a block of rows at a time, so that the residual stays in the cache.

_BLOCK = 1 << 22  # entries of a block of rows: 16 MiB of float32; with fewer rows, a BLAS product gets slower
_FEW, _FEW_VALUES = 64, 64  # keys, values


def _cpu(h: Tensor, edit: Edit, out: Tensor) -> None:
    """Write the result to out; both are contiguous."""
    own = _vectors()
    if own is not None and few_keys(h, edit):
        _few_keys_cpu(own, h, edit, out)
        return
    if _all_of_it(h, edit):
        with full_float32("cpu"):
            x = rows_of(h) if edit.mean is None else rows_of(h) - edit.mean
            c = (x @ edit.keys.float().mT) @ edit.coef
            torch.addmm(rows_of(h), c, edit.values.float(), alpha=edit.alpha, out=rows_of(out))
        return
    rows, result = rows_of(h), rows_of(out)
    mask = None if edit.row_mask is None else edit.row_mask.reshape(-1)
    bounds = bounds_of(edit)
    with full_float32("cpu"):
        for start, stop, s in _runs(h, edit):
            if s == -1:
                result[start:stop] = rows[start:stop]
                continue
            _edit_run(rows, result, start, stop, system_of(edit, s, bounds), mask, edit)


def _all_of_it(h: Tensor, edit: Edit) -> bool:
    """Whether there is nothing to select: neither entries nor rows, and one system for all."""
    chosen = edit.row_mask is not None or edit.edit_set is not None or edit.gate_threshold is not None
    chosen = chosen or edit.alpha == 0  # for which a product would not be formed, and NaN in it not be seen
    return h.dtype == torch.float32 and edit.k == h.shape[-1] and edit.keys.shape[0] > 0 and not chosen


def _vectors() -> ModuleType | None:
    """The extension, if it has products of its own for this processor."""
    c = _backend.compiled()
    return c if c is not None and c.lowrank_cpu_supported else None


def few_keys(h: Tensor, edit: Edit) -> bool:
    """Whether one compiled pass beats products and epilogue."""
    return 0 < (edit.keys.shape[0] if edit.offsets is None else edit.max_keys) <= _FEW


def _few_keys_cpu(c: ModuleType, h: Tensor, edit: Edit, out: Tensor) -> None:
    """Do it all in one compiled pass."""
    bounds = bounds_of(edit)
    hits = torch.zeros(h.shape[:-2], dtype=torch.int64)  # counted by the kernel; nobody asks
    mask = None if edit.row_mask is None else edit.row_mask.contiguous()
    mask_at = 0 if mask is None else mask.data_ptr()
    gated, tau = edit.gate_threshold is not None, edit.gate_threshold or 0.0
    h_at, out_at, hits_at, (length, d) = h.data_ptr(), out.data_ptr(), hits.data_ptr(), h.shape[-2:]
    code, threads = DTYPES[h.dtype], torch.get_num_threads()
    for start, stop, s in _runs(h, edit):
        if s == -1:
            rows_of(out)[start:stop] = rows_of(h)[start:stop]
            continue
        keys, coef, values, mean = system_of(edit, s, bounds)
        keys, coef, values = keys.contiguous(), coef.contiguous(), values.contiguous()
        mean = None if mean is None else mean.contiguous()
        n, m = coef.shape
        c.lowrank_cpu(
            h_at, keys.data_ptr(), coef.data_ptr(), values.data_ptr(), 0 if mean is None else mean.data_ptr(), mask_at,
            out_at, hits_at, start, stop, length, d, n, m, m, edit.k, edit.alpha, tau, gated, code, threads,
        )  # fmt: skip


def _runs(h: Tensor, edit: Edit) -> list[tuple[int, int, int | None]]:
    """Group neighbouring sequences of one edit set: first row, row after the last, set."""
    length = h.shape[-2]
    if edit.edit_set is None:
        return [(0, math.prod(h.shape[:-1]), None)]
    runs: list[tuple[int, int, int | None]] = []
    for i, s in enumerate(edit.edit_set.reshape(-1).tolist()):
        if runs and runs[-1][2] == s:
            runs[-1] = (runs[-1][0], (i + 1) * length, s)
        else:
            runs.append((i * length, (i + 1) * length, s))
    return runs


def rows_of(h: Tensor) -> Tensor:
    """Return h with one row after the other; -1 would not do where there are no entries."""
    return h.reshape(math.prod(h.shape[:-1]), h.shape[-1])


def _edit_run(
    rows: Tensor,
    result: Tensor,
    start: int,
    stop: int,
    system: System,
    mask: Tensor | None,
    edit: Edit,
) -> None:
    """Edit the rows [start, stop), which all use one system."""
    keys, coef, values, mean = system
    d, m = rows.shape[1], coef.shape[1]
    tau = edit.gate_threshold
    few = _vectors() if 0 < m <= _FEW_VALUES else None
    key_norm = None if tau is None else torch.linalg.vector_norm(keys[:m], dim=-1)
    chosen = None  # row numbers, where the mask leaves some out
    if mask is not None and not mask[start:stop].all():
        chosen = mask[start:stop].nonzero().flatten() + start
        result[start:stop] = rows[start:stop]
    total = stop - start if chosen is None else chosen.shape[0]
    step = max(16, _BLOCK // max(1, d))
    size = min(step, total)
    x_buffer = rows.new_empty(size, d, dtype=torch.float32) if mean is not None or rows.dtype != torch.float32 else None
    r_buffer: Tensor | None = None
    for i in range(0, total, step):
        j = min(i + step, total)
        index = None if chosen is None else chosen[i:j]
        block = rows[start + i : start + j] if index is None else rows[index]
        x = block
        if x_buffer is not None:
            x = x_buffer[: j - i]
            x.copy_(block) if mean is None else torch.sub(block, mean, out=x)
        scores = x @ keys.mT
        if key_norm is not None:
            assert tau is not None
            passes = passes_gate(scores[:, :m], torch.linalg.vector_norm(x, dim=-1), key_norm, tau)
            if not passes.all():
                if index is None:
                    result[start + i : start + j] = block
                inside = passes.nonzero().flatten()
                index, scores = (start + i + inside if index is None else index[inside]), scores[inside]
        count = scores.shape[0]
        if count == 0:
            continue
        c = scores @ coef
        if few is not None:
            _expand_add(few, rows, c, values, index, start + i, edit, result)
            continue
        # The residual becomes the result where it can: fresh pages for one more tensor cost as much as the selection.
        if index is None and result.dtype == torch.float32:
            r = torch.mm(c, values, out=result[start + i : start + j])
        else:
            if r_buffer is None:
                r_buffer = rows.new_empty(size, d, dtype=torch.float32)
            r = torch.mm(c, values, out=r_buffer[:count])
        if index is None:
            write_cpu(rows[start + i : start + j], r, None, edit.alpha, edit.k, result[start + i : start + j])
        else:
            part = rows[index]
            write_cpu(part, r, None, edit.alpha, edit.k, part)
            result[index] = part


def _expand_add(
    c: ModuleType,
    rows: Tensor,
    coefficients: Tensor,
    values: Tensor,
    index: Tensor | None,
    first: int,
    edit: Edit,
    result: Tensor,
) -> None:
    """Multiply, select and add in one compiled pass, on the rows from ``first`` on or on those of ``index``."""
    coefficients, values = coefficients.contiguous(), values.contiguous()
    c.expand_add_cpu(
        rows.data_ptr(),
        coefficients.data_ptr(),
        values.data_ptr(),
        0 if index is None else index.data_ptr(),
        result.data_ptr(),
        first,
        coefficients.shape[0],
        rows.shape[1],
        values.shape[0],
        edit.k,
        edit.alpha,
        DTYPES[rows.dtype],
        torch.get_num_threads(),
    )


# --- Registration.


def _on_cpu(h: Tensor, *arguments: Any) -> Tensor:
    edit = Edit(*arguments)
    check(h, edit)
    h = h.contiguous()
    out = new_result(h)
    _cpu(h, edit, out)
    return out


_lib.impl(_NAME, _on_cpu, "CPU")


@torch.library.register_fake(f"timerome::{_NAME}", lib=_lib)
def _(h: Tensor, *arguments: Any) -> Tensor:
    check(h, Edit(*arguments))
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        f"{_NAME}: has no gradient; run the edited model under torch.no_grad() or torch.inference_mode()."
    )


torch.library.register_autograd(f"timerome::{_NAME}", _no_gradient, lib=_lib)

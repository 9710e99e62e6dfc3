"""Apply an edit memory: a sparse, low-rank, optionally gated change of a hidden state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.library import Library

from timerome.ops.sparsify_add import sparsify_add_reference, write_cpu

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_lib = Library("timerome", "FRAGMENT")
_lib.define(
    "sparse_lowrank_residual(Tensor h, Tensor keys, Tensor coef, Tensor values, Tensor? mean, Tensor? row_mask,"
    " float? gate_threshold, float alpha, int k) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def kept_count(d: int, sparsity: float) -> int:
    """Count the entries of a row that stay: ceil((1 - q) d), as exact arithmetic would have it.

    Args:
        d: length of the row.
        sparsity: q, the fraction that is dropped, 0 <= q <= 1.

    Returns:
        The count, 0 only for q = 1 or d = 0.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1].

    Example:
        >>> kept_count(10, 0.7), math.ceil((1 - 0.7) * 10)
        (3, 4)
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"kept_count: expected sparsity in [0, 1], the fraction that is dropped, got {sparsity}.")
    if sparsity == 1.0:
        return 0
    # q is rarely a binary fraction. A slack of 1e-6 a entry also covers a q that was once stored in float32.
    return min(d, max(1, math.ceil((1.0 - sparsity) * d - 1e-6 * d)))


@overload
def sparse_lowrank_residual(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    *,
    mean: Tensor | None = None,
    alpha: float = 1.0,
    sparsity: float = 0.0,
    row_mask: Tensor | None = None,
    gate_threshold: float | None = None,
    return_hits: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_lowrank_residual(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    *,
    mean: Tensor | None = None,
    alpha: float = 1.0,
    sparsity: float = 0.0,
    row_mask: Tensor | None = None,
    gate_threshold: float | None = None,
    return_hits: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_lowrank_residual(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    *,
    mean: Tensor | None = None,
    alpha: float = 1.0,
    sparsity: float = 0.0,
    row_mask: Tensor | None = None,
    gate_threshold: float | None = None,
    return_hits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Add what an edit memory answers to a hidden state: h + α S_q((h − μ) Kᵀ A D), row by row.

        s = (h − μ) Kᵀ        scores
        c = s A               coefficients
        r = c D               residual
        out = h + α · S_q(r)  S_q keeps the ceil((1 − q) d) largest absolute values of each row

    Precision: s, c and r are float32 whatever the dtypes, autocast and TF32 settings (A is close to singular when keys
    share a direction, and then scores rounded to bfloat16 are wrong by 100 % and more). Products with bfloat16 ``h``
    and ``keys`` or ``values`` on a GPU read bfloat16 operands and accumulate in float32; c is rounded to bfloat16 then.
    For the same reason never fold A into D. The last step is :func:`~timerome.ops.sparsify_add`, exact for a given r.

    :func:`sparse_lowrank_residual_reference` is the plain PyTorch equivalent. Not differentiable: ``backward`` raises.

    Args:
        h: hidden states, shape ``(*batch, T, d)``, float32, float16 or bfloat16.
        keys: K, shape ``(N, d)``, any of these dtypes, already centred by ``mean``. The first M are those that have a
                value, protected ones follow.
        coef: A, shape ``(N, M)``, float32. M <= N: keys whose target is zero (protected ones) have no column.
        values: D, shape ``(M, d)``, any of these dtypes.
        mean: μ, shape ``(d,)``, float32. None: zero.
        alpha: strength α.
        sparsity: q, the fraction of each row that is dropped, in [0, 1].
        row_mask: rows that may be edited, shape ``(*batch, T)``, bool. None: all rows.
        gate_threshold: τ. A row is edited only if its largest cosine similarity, h − μ with one of the first M keys (a
                protected key opens no gate), is at least τ. Rows
            and keys of norm zero never pass. None: no gate.
        return_hits: also return how many rows mask and gate let through.

    Returns:
        New tensor of the shape and dtype of ``h``; with ``return_hits`` also the count, an int64 tensor of shape ``()``
        (a tensor, so that counting does not wait for the GPU).

    Raises:
        TypeError: a dtype is unsupported.
        ValueError: shapes or devices disagree, or ``sparsity`` is outside [0, 1].

    Source: TimeROME-DLM (Yao et al. 2026, arXiv 2606.12841). The mean, the gate and the separate A are ours.

    Example:
        >>> import torch
        >>> keys = torch.tensor([[1.0, 0.0, 0.0]])
        >>> values = torch.tensor([[0.0, 4.0, 1.0]])
        >>> h = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> sparse_lowrank_residual(h, keys, torch.eye(1), values, sparsity=0.6, gate_threshold=0.5)
        tensor([[2., 8., 2.],
                [0., 1., 0.]])
    """
    k = kept_count(h.shape[-1] if h.dim() else 0, sparsity)
    out, hits = torch.ops.timerome.sparse_lowrank_residual(
        h, keys, coef, values, mean, row_mask, gate_threshold, alpha, k
    )
    return (out, hits) if return_hits else out


def sparse_lowrank_residual_reference(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    *,
    mean: Tensor | None = None,
    alpha: float = 1.0,
    sparsity: float = 0.0,
    row_mask: Tensor | None = None,
    gate_threshold: float | None = None,
    return_hits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Define :func:`sparse_lowrank_residual` in plain PyTorch.

    Args:
        h: as in :func:`sparse_lowrank_residual`, and so are all others.
        keys: K.
        coef: A.
        values: D.
        mean: μ.
        alpha: α.
        sparsity: q.
        row_mask: rows that may be edited.
        gate_threshold: τ.
        return_hits: also return the number of rows let through.

    Returns:
        As :func:`sparse_lowrank_residual`. Two orders of summation in r can swap entries at the selection's threshold.

    Raises:
        TypeError: a dtype is unsupported.
        ValueError: shapes or devices disagree, or ``sparsity`` is outside [0, 1].

    Example:
        >>> import torch
        >>> one = torch.eye(1)
        >>> sparse_lowrank_residual_reference(2 * one, one, one, 3 * one)
        tensor([[8.]])
    """
    k = kept_count(h.shape[-1] if h.dim() else 0, sparsity)
    _check(h, keys, coef, values, mean, row_mask)
    with _full_float32(h.device.type):
        x = h.float() if mean is None else h.float() - mean
        scores = x @ keys.float().mT
        residual = scores @ coef @ values.float()
    active = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device) if row_mask is None else row_mask
    if gate_threshold is not None:
        own = keys[: len(values)].float()
        active = active & _passes_gate(scores[..., : len(own)], x.norm(dim=-1), own.norm(dim=-1), gate_threshold)
    out = sparsify_add_reference(h, residual, k, alpha, active)
    return (out, active.sum()) if return_hits else out


@contextlib.contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Undo autocast and reduced-precision float32 products, which callers switch on for their own layers."""
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _passes_gate(scores: Tensor, row_norm: Tensor, key_norm: Tensor, threshold: float) -> Tensor:
    """Rows whose largest cosine similarity with a key reaches the threshold, from scores (..., N)."""
    if key_norm.shape[0] == 0:
        return torch.zeros_like(row_norm, dtype=torch.bool)
    cosine = scores / (row_norm.unsqueeze(-1) * key_norm)
    # 0 / 0 for a row or key of norm zero, NaN for a row that holds one: neither reaches any threshold.
    return cosine.nan_to_num(nan=-math.inf).amax(-1) >= threshold


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in float32, accumulated in float32; bfloat16 operands are read as they are where CUDA can."""
    both_bf16 = a.dtype == b.dtype == torch.bfloat16
    if a.is_cuda and both_bf16 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _check(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, mean: Tensor | None, row_mask: Tensor | None) -> None:
    name = "sparse_lowrank_residual"
    for label, tensor in (("h", h), ("keys", keys), ("values", values)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name}: expected {label} in float32, float16 or bfloat16, got {tensor.dtype}; convert it first."
            )
    if coef.dtype != torch.float32:
        raise TypeError(f"{name}: expected coef in float32, got {coef.dtype}; solve in float64, then convert.")
    if mean is not None and mean.dtype != torch.float32:
        raise TypeError(f"{name}: expected mean in float32, got {mean.dtype}; convert it first.")
    if row_mask is not None and row_mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected row_mask in bool, got {row_mask.dtype}; compare it with 0 first.")

    if h.dim() < 2:
        raise ValueError(f"{name}: expected h of shape (*batch, T, d), got {tuple(h.shape)}; unsqueeze a single row.")
    d = h.shape[-1]
    if keys.dim() != 2 or keys.shape[1] != d:
        raise ValueError(f"{name}: expected keys of shape (N, {d}), d as in h, got {tuple(keys.shape)}.")
    if values.dim() != 2 or values.shape[1] != d:
        raise ValueError(f"{name}: expected values of shape (M, {d}), d as in h, got {tuple(values.shape)}.")
    if coef.shape != (keys.shape[0], values.shape[0]):
        raise ValueError(
            f"{name}: expected coef of shape (N, M) = {(keys.shape[0], values.shape[0])}, one row per key and one "
            f"column per value, got {tuple(coef.shape)}."
        )
    if mean is not None and mean.shape != (d,):
        raise ValueError(f"{name}: expected mean of shape ({d},), d as in h, got {tuple(mean.shape)}.")
    if row_mask is not None and row_mask.shape != h.shape[:-1]:
        raise ValueError(
            f"{name}: expected row_mask of shape {tuple(h.shape[:-1])}, one entry per row of h, "
            f"got {tuple(row_mask.shape)}."
        )
    others = (("keys", keys), ("coef", coef), ("values", values), ("mean", mean), ("row_mask", row_mask))
    for label, other in others:
        if other is not None and other.device != h.device:
            raise ValueError(f"{name}: expected {label} on the device of h, {h.device}, got {other.device}.")


def _impl(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    mean: Tensor | None,
    row_mask: Tensor | None,
    gate_threshold: float | None,
    alpha: float,
    k: int,
) -> tuple[Tensor, Tensor]:
    _check(h, keys, coef, values, mean, row_mask)
    rows = h.reshape(-1, h.shape[-1])
    active = None if row_mask is None else row_mask.reshape(-1)
    with _full_float32(h.device.type):
        x = rows if mean is None else rows.float() - mean
        scores = _product(x, keys.mT)
        if gate_threshold is not None:
            row_norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            own = keys[: values.shape[0]]
            key_norm = torch.linalg.vector_norm(own, dim=-1, dtype=torch.float32)
            passes = _passes_gate(scores[:, : own.shape[0]], row_norm, key_norm, gate_threshold)
            active = passes if active is None else active & passes
        hits = torch.full((), rows.shape[0], device=h.device) if active is None else active.sum()
        if h.is_cpu and active is not None and not hits:  # a gate that stays shut costs the scores only
            return h.clone(memory_format=torch.contiguous_format), hits
        c = scores @ coef
        # c holds what is left after the cancellation, so bfloat16 is enough for it from here on.
        residual = _product(c.to(values.dtype) if h.is_cuda and values.dtype == torch.bfloat16 else c, values)
    if h.is_cpu and h.dtype == torch.float32:
        # The residual's memory becomes the result: fresh pages for a new tensor cost as much as the selection.
        assert residual.dtype == torch.float32  # the compiled code takes an address and would believe anything
        write_cpu(rows.contiguous(), residual, active, alpha, k, residual)
        return residual.view(h.shape), hits
    return torch.ops.timerome.sparsify_add(rows, residual, active, alpha, k).view(h.shape), hits


_lib.impl("sparse_lowrank_residual", _impl, "CPU")
_lib.impl("sparse_lowrank_residual", _impl, "CUDA")


@torch.library.register_fake("timerome::sparse_lowrank_residual", lib=_lib)
def _(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    mean: Tensor | None,
    row_mask: Tensor | None,
    gate_threshold: float | None,
    alpha: float,
    k: int,
) -> tuple[Tensor, Tensor]:
    _check(h, keys, coef, values, mean, row_mask)
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, torch.empty((), dtype=torch.int64, device=h.device)


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "sparse_lowrank_residual: has no gradient; run the edited model under torch.no_grad() or "
        "torch.inference_mode()."
    )


torch.library.register_autograd("timerome::sparse_lowrank_residual", _no_gradient, lib=_lib)

"""Add the largest entries of each row of a residual: the epilogue of every edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from timerome import _backend
from timerome.ops._arguments import (
    check_alpha,
    check_optional_tensors,
    check_tensors,
    check_writable,
    integer,
    number,
)

# The codes of csrc/kernels.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_lib = Library("timerome", "FRAGMENT")
_lib.define(
    "sparsify_add(Tensor h, Tensor r, Tensor? mask, float alpha, int k) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_lib.define(
    "sparsify_add_(Tensor(a!) h, Tensor r, Tensor? mask, float alpha, int k) -> ()", tags=torch.Tag.pt2_compliant_tag
)


def sparsify_add(h: Tensor, r: Tensor, k: int, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""Add to each row of h the k entries of the same row of r that are largest in magnitude, times alpha.

    Row by row, with S_k keeping the k largest absolute values and setting the others to zero:

        out = h + α · S_k(r)    where the mask is true,    out = h    elsewhere

    The selection is exact: always k entries. Among equal magnitudes at the threshold the lowest index wins. NaN counts
    as larger than infinity, so it is selected first and propagates; no input makes the selection fail. Entries that
    are not selected are copied bit for bit. The sum is formed in float32 and rounded once to the dtype of ``h``;
    results do not depend on the device or on whether compiled code runs.

    :func:`sparsify_add_reference` is the plain PyTorch equivalent. Not differentiable: ``backward`` raises.

    Args:
        h: shape ``(*batch, d)``, float32, float16 or bfloat16.
        r: residual, same shape and device as ``h``, float32.
        k: how many entries of each row are added, 0 <= k <= d.
        alpha: strength α, the factor on ``r``.
        mask: rows to edit, shape ``(*batch,)``, bool, same device. None: all rows.

    Returns:
        New tensor of the shape and dtype of ``h``, contiguous.

    Raises:
        TypeError: a dtype or an argument's kind is unsupported.
        ValueError: shapes or devices disagree, ``k`` is out of range, or ``alpha`` is not finite in float32.

    Source: the sparsification of TimeROME-DLM (Yao et al. 2026, arXiv 2606.12841), there given by the fraction q that
    is dropped; the tie rule is ours.

    Example:
        >>> import torch
        >>> h = torch.zeros(2, 4)
        >>> r = torch.tensor([[1.0, -3.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
        >>> sparsify_add(h, r, k=2, alpha=0.5)
        tensor([[ 0.0000, -1.5000,  1.0000,  0.0000],
                [ 0.5000,  0.5000,  0.0000,  0.0000]])
    """
    k, alpha = _check_kinds(h, r, k, alpha, mask)
    return torch.ops.timerome.sparsify_add(h, r, mask, alpha, k)


def sparsify_add_(h: Tensor, r: Tensor, k: int, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """In-place :func:`sparsify_add`: changes ``h`` and returns it. Rows that the mask leaves out are not touched.

    Args:
        h: as in :func:`sparsify_add`; overwritten.
        r: as in :func:`sparsify_add`.
        k: as in :func:`sparsify_add`.
        alpha: as in :func:`sparsify_add`.
        mask: as in :func:`sparsify_add`.

    Returns:
        ``h``.

    Raises:
        TypeError: a dtype or an argument's kind is unsupported.
        ValueError: shapes or devices disagree, ``k`` is out of range, or ``alpha`` is not finite in float32.
        RuntimeError: a gradient would have to be recorded.

    Example:
        >>> import torch
        >>> h = torch.zeros(3)
        >>> _ = sparsify_add_(h, torch.tensor([1.0, -3.0, 2.0]), k=1)
        >>> h
        tensor([ 0., -3.,  0.])
    """
    k, alpha = _check_kinds(h, r, k, alpha, mask)
    if torch.is_grad_enabled() and (h.requires_grad or r.requires_grad):
        raise RuntimeError("sparsify_add_: has no gradient; call it under torch.no_grad() or torch.inference_mode().")
    torch.ops.timerome.sparsify_add_(h, r, mask, alpha, k)
    return h


def sparsify_add_reference(h: Tensor, r: Tensor, k: int, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Define :func:`sparsify_add` in plain PyTorch; what runs where nothing compiled does.

    Args:
        h: as in :func:`sparsify_add`.
        r: as in :func:`sparsify_add`.
        k: as in :func:`sparsify_add`.
        alpha: as in :func:`sparsify_add`.
        mask: as in :func:`sparsify_add`.

    Returns:
        As :func:`sparsify_add`, bit for bit except for the payload of a NaN.

    Raises:
        TypeError: a dtype or an argument's kind is unsupported.
        ValueError: shapes or devices disagree, ``k`` is out of range, or ``alpha`` is not finite in float32.

    Example:
        >>> import torch
        >>> sparsify_add_reference(torch.ones(3), torch.tensor([1.0, -3.0, 2.0]), k=2)
        tensor([ 1., -2.,  3.])
    """
    k, alpha = _check_kinds(h, r, k, alpha, mask)
    _check(h, r, mask, alpha, k)
    if k == 0 or h.numel() == 0:
        return h.clone(memory_format=torch.contiguous_format)
    # A float's bits without the sign, read as an integer, order like its magnitude, with every NaN above infinity.
    magnitude = r.contiguous().view(torch.int32) & 0x7FFFFFFF
    threshold = magnitude.kthvalue(r.shape[-1] - k + 1, dim=-1, keepdim=True).values
    keep, tied = magnitude > threshold, magnitude == threshold
    keep |= tied & (tied.cumsum(-1) <= k - keep.sum(-1, keepdim=True))
    if mask is not None:
        keep &= mask.unsqueeze(-1)
    return torch.where(keep, (h.float() + alpha * r).to(h.dtype), h).contiguous()


def _check_kinds(h: Tensor, r: Tensor, k: int, alpha: float, mask: Tensor | None) -> tuple[int, float]:
    check_tensors("sparsify_add", h=h, r=r)
    check_optional_tensors("sparsify_add", mask=mask)
    return integer("sparsify_add", "k", k), number("sparsify_add", "alpha", alpha)


def _check(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int) -> None:
    # Formatting is kept out of the checks: they run at every forward of an edited model.
    if h.dtype not in DTYPES:
        raise TypeError(f"sparsify_add: expected h in float32, float16 or bfloat16, got {h.dtype}; convert it first.")
    if r.dtype != torch.float32:
        raise TypeError(f"sparsify_add: expected r in float32, got {r.dtype}; a residual is formed in float32.")
    if h.dim() == 0 or h.shape != r.shape:
        raise ValueError(
            f"sparsify_add: expected h and r of one shape (*batch, d), got {tuple(h.shape)} and {tuple(r.shape)}."
        )
    if not 0 <= k <= h.shape[-1]:
        raise ValueError(f"sparsify_add: expected 0 <= k <= d = {h.shape[-1]}, got k = {k}.")
    check_alpha("sparsify_add", alpha)
    if h.device != r.device:
        raise ValueError(f"sparsify_add: expected h and r on one device, got {h.device} and {r.device}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"sparsify_add: expected a bool mask, got {mask.dtype}; compare it with 0 first.")
        if mask.shape != h.shape[:-1]:
            raise ValueError(
                f"sparsify_add: expected a mask of shape {tuple(h.shape[:-1])}, one entry per row of h, "
                f"got {tuple(mask.shape)}."
            )
        if mask.device != h.device:
            raise ValueError(f"sparsify_add: expected mask on the device of h, {h.device}, got {mask.device}.")


_FRESH = 32 << 20  # bytes from which on malloc takes memory from the system anew, always


def new_result(h: Tensor) -> Tensor:
    """Return an empty tensor like h, which is contiguous, on large pages where its pages are yet to be mapped."""
    out = torch.empty_like(h)
    c = _backend.compiled()
    if c is not None and h.is_cpu and out.nbytes >= _FRESH:
        c.prefer_large_pages(out.data_ptr(), out.nbytes)
    return out


def write_cpu(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int, out: Tensor) -> None:
    """Write the result to out, which may be h or r. All arguments are checked, h and out are contiguous."""
    c = _backend.compiled()
    if c is None:
        out.copy_(sparsify_add_reference(h, r, k, alpha, mask))
        return
    r = r.contiguous()
    mask = None if mask is None else mask.contiguous()
    d = h.shape[-1]
    c.sparsify_add_cpu(
        h.data_ptr(),
        r.data_ptr(),
        out.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        h.numel() // d if d else 0,
        d,
        k,
        alpha,
        DTYPES[h.dtype],
        torch.get_num_threads(),
    )


def write_cuda(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int, out: Tensor) -> None:
    """As write_cpu, on the tensor's device and its current stream."""
    c = _backend.compiled_cuda()
    d = h.shape[-1]
    if c is None or d > c.sparsify_add_cuda_max_d:
        out.copy_(sparsify_add_reference(h, r, k, alpha, mask))
        return
    r = r.contiguous()
    mask = None if mask is None else mask.contiguous()
    c.sparsify_add_cuda(
        h.data_ptr(),
        r.data_ptr(),
        out.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        h.numel() // d if d else 0,
        d,
        k,
        alpha,
        DTYPES[h.dtype],
        h.get_device(),
        torch.cuda.current_stream(h.device).cuda_stream,
    )


def _register(key: str, write: Callable[[Tensor, Tensor, Tensor | None, float, int, Tensor], None]) -> None:
    """Make the functional and the in-place op for one device out of its function that writes to a given tensor."""

    def functional(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int) -> Tensor:
        _check(h, r, mask, alpha, k)
        h = h.contiguous()
        out = new_result(h)
        write(h, r, mask, alpha, k, out)
        return out

    def in_place(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int) -> None:
        _check(h, r, mask, alpha, k)
        if h.is_contiguous():
            write(h, r, mask, alpha, k, h)
        else:
            check_writable("sparsify_add_", h)
            h.copy_(functional(h, r, mask, alpha, k))

    _lib.impl("sparsify_add", functional, key)
    _lib.impl("sparsify_add_", in_place, key)


_register("CPU", write_cpu)
_register("CUDA", write_cuda)


@torch.library.register_fake("timerome::sparsify_add", lib=_lib)
def _(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int) -> Tensor:
    _check(h, r, mask, alpha, k)
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@torch.library.register_fake("timerome::sparsify_add_", lib=_lib)
def _(h: Tensor, r: Tensor, mask: Tensor | None, alpha: float, k: int) -> None:
    _check(h, r, mask, alpha, k)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "sparsify_add: has no gradient; run the edited model under torch.no_grad() or torch.inference_mode()."
    )


torch.library.register_autograd("timerome::sparsify_add", _no_gradient, lib=_lib)

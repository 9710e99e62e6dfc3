"""Grow and shrink a Cholesky factor by one row, so that a memory can insert and undo single keys.

The factor is the truth of a memory and stays in float64: after hundreds of appends and deletes it is as good as a fresh
one, whereas an inverse that is updated directly drifts. These are plain functions, not registered ops: a memory calls
them when it changes, never inside a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timerome import _backend
from timerome.ops._arguments import check_tensors, integer, number
from timerome.ops.ridge_cholesky import NotPositiveDefiniteError


def cholesky_append(cholesky: Tensor, g: Tensor, gnn: float, *, out: Tensor | None = None) -> Tensor:
    r"""Append a row and a column to a factored matrix: the factor of [[L Lᵀ, g], [gᵀ, γ]], in O(n²).

    The new row of the factor is (L⁻¹ g, sqrt(γ − ‖L⁻¹ g‖²)). :func:`cholesky_append_reference` is the plain PyTorch
    equivalent.

    Args:
        cholesky: L, lower triangular, shape ``(n, n)``, float64.
        g: inner products of the new key with the others, shape ``(n,)``, float64.
        gnn: γ, the squared norm of the new key plus the ridge.
        out: where the new factor goes, shape ``(n + 1, n + 1)``, float64, rows contiguous; a new tensor by default.
            ``cholesky`` may be ``out[:n, :n]``: then only the last row and column are written, and a factor that grows
            inside a large enough tensor is never copied.

    Returns:
        The new factor, shape ``(n + 1, n + 1)``, float64; ``out`` if it is given.

    Raises:
        TypeError: a dtype is not float64, or ``gnn`` no number.
        ValueError: shapes or devices disagree, a diagonal entry is not positive, or ``out`` overlaps ``cholesky`` in
            another way.
        NotPositiveDefiniteError: the enlarged matrix is not positive definite. ``out`` is undefined then, but for a
            corner that is ``cholesky``.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 6.5.4.

    Example:
        >>> import torch
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> cholesky_append(2 * one[None], g=2 * one, gnn=10.0)
        tensor([[2., 0.],
                [1., 3.]], dtype=torch.float64)
    """
    c = _backend.compiled()
    gnn = _check_append(cholesky, g, gnn)
    n = cholesky.shape[0]
    if out is not None:
        _check_out(cholesky, out)
    if c is None or not cholesky.is_cpu:
        grown = cholesky_append_reference(cholesky, g, gnn)
        return grown if out is None else out.copy_(grown)
    if cholesky.stride(1) != 1 and n > 1:
        cholesky = cholesky.contiguous()
    g, out = g.contiguous(), cholesky.new_empty(n + 1, n + 1) if out is None else out
    status = c.cholesky_append_cpu(
        cholesky.data_ptr(), cholesky.stride(0), g.data_ptr(), gnn, out.data_ptr(), out.stride(0), n
    )
    if status == 2:
        _check_diagonal("cholesky_append", cholesky)
    if status:
        raise _cannot_append(n)
    return out


def cholesky_append_reference(cholesky: Tensor, g: Tensor, gnn: float) -> Tensor:
    """Define :func:`cholesky_append` in plain PyTorch; any device.

    Args:
        cholesky: as in :func:`cholesky_append`.
        g: as in :func:`cholesky_append`.
        gnn: as in :func:`cholesky_append`.

    Returns:
        As :func:`cholesky_append`.

    Raises:
        TypeError: a dtype is not float64, or ``gnn`` no number.
        ValueError: shapes or devices disagree, or a diagonal entry is not positive.
        NotPositiveDefiniteError: the enlarged matrix is not positive definite.

    Example:
        >>> import torch
        >>> cholesky_append_reference(torch.zeros(0, 0).double(), torch.zeros(0).double(), gnn=4.0)
        tensor([[2.]], dtype=torch.float64)
    """
    gnn = _check_append(cholesky, g, gnn)
    _check_diagonal("cholesky_append", cholesky)
    n = cholesky.shape[0]
    row = torch.linalg.solve_triangular(cholesky, g[:, None], upper=False)[:, 0]
    pivot = gnn - float(row @ row)
    if not 0.0 < pivot < float("inf"):
        raise _cannot_append(n)
    out = cholesky.new_zeros(n + 1, n + 1)
    out[:n, :n] = cholesky.tril()
    out[n, :n] = row
    out[n, n] = pivot**0.5
    return out


def cholesky_delete(cholesky: Tensor, j: int) -> Tensor:
    r"""Delete row and column j of a factored matrix: the factor of what is left of L Lᵀ, in O(n²).

    With column j gone, the trailing block takes a positive rank-one update, done by rotations; so this cannot fail.
    :func:`cholesky_delete_reference` is the plain PyTorch equivalent.

    Args:
        cholesky: L, lower triangular with a positive diagonal, shape ``(n, n)``, float64.
        j: which row, 0 <= j < n.

    Returns:
        The new factor, shape ``(n - 1, n - 1)``, float64, with a positive diagonal.

    Raises:
        TypeError: the dtype is not float64, or ``j`` no integer.
        ValueError: the shape is not square, a diagonal entry not positive, or ``j`` out of range.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 6.5.3 and 6.5.4.

    Example:
        >>> import torch
        >>> cholesky_delete(torch.tensor([[2.0, 0.0], [3.0, 4.0]]).double(), 0)
        tensor([[5.]], dtype=torch.float64)
    """
    c = _backend.compiled()
    j = _check_delete(cholesky, j)
    if c is None or not cholesky.is_cpu:
        return cholesky_delete_reference(cholesky, j)
    n = cholesky.shape[0]
    cholesky, out = cholesky.contiguous(), cholesky.new_empty(n - 1, n - 1)
    c.cholesky_delete_cpu(cholesky.data_ptr(), out.data_ptr(), n, j)
    return out


def cholesky_delete_reference(cholesky: Tensor, j: int) -> Tensor:
    """Define :func:`cholesky_delete` in plain PyTorch, by a QR factorisation in O(n³); any device.

    Args:
        cholesky: as in :func:`cholesky_delete`.
        j: as in :func:`cholesky_delete`.

    Returns:
        As :func:`cholesky_delete`.

    Raises:
        TypeError: the dtype is not float64, or ``j`` no integer.
        ValueError: the shape is not square, a diagonal entry not positive, or ``j`` out of range.

    Example:
        >>> import torch
        >>> cholesky_delete_reference(torch.tensor([[2.0, 0.0], [3.0, 4.0]]).double(), 1)
        tensor([[2.]], dtype=torch.float64)
    """
    j = _check_delete(cholesky, j)
    n = cholesky.shape[0]
    keep = [i for i in range(n) if i != j]
    # M = L without row j is (n - 1, n), and M Mᵀ is the wanted matrix; with Mᵀ = Q R it is Rᵀ R.
    r = torch.linalg.qr(cholesky.tril()[keep].mT, mode="r").R
    return (r * torch.where(r.diagonal() < 0, -1.0, 1.0)[:, None]).mT.contiguous()


def _check_factor(name: str, cholesky: Tensor) -> None:
    check_tensors(name, cholesky=cholesky)
    if cholesky.dtype != torch.float64:
        raise TypeError(f"{name}: expected cholesky in float64, got {cholesky.dtype}; keep factors in float64.")
    if cholesky.dim() != 2 or cholesky.shape[0] != cholesky.shape[1]:
        raise ValueError(f"{name}: expected cholesky of shape (n, n), got {tuple(cholesky.shape)}.")
    if cholesky.is_meta:
        raise ValueError(f"{name}: expected cholesky to hold data, got a tensor on the meta device.")


def _check_diagonal(name: str, cholesky: Tensor) -> None:
    """Refuse what substitution and rotations would divide by: NaN would come out and nobody be told."""
    low, high = cholesky.diagonal().aminmax() if len(cholesky) else (1.0, 1.0)
    if not 0.0 < float(low) <= float(high) < float("inf"):
        raise ValueError(
            f"{name}: expected cholesky with a positive, finite diagonal, got one from {float(low)} to {float(high)}."
        )


def _check_append(cholesky: Tensor, g: Tensor, gnn: float) -> float:
    _check_factor("cholesky_append", cholesky)
    check_tensors("cholesky_append", g=g)
    n = cholesky.shape[0]
    if g.dtype != torch.float64:
        raise TypeError(f"cholesky_append: expected g in float64, got {g.dtype}; form inner products in float64.")
    if g.shape != (n,):
        raise ValueError(f"cholesky_append: expected g of shape ({n},), one entry per key, got {tuple(g.shape)}.")
    if g.device != cholesky.device:
        raise ValueError(f"cholesky_append: expected g on the device of cholesky, {cholesky.device}, got {g.device}.")
    return number("cholesky_append", "gnn", gnn)


def _check_delete(cholesky: Tensor, j: int) -> int:
    _check_factor("cholesky_delete", cholesky)
    _check_diagonal("cholesky_delete", cholesky)
    j = integer("cholesky_delete", "j", j)
    if not 0 <= j < cholesky.shape[0]:
        raise ValueError(f"cholesky_delete: expected 0 <= j < n = {cholesky.shape[0]}, got {j}.")
    return j


def _check_out(cholesky: Tensor, out: Tensor) -> None:
    check_tensors("cholesky_append", out=out)
    n = cholesky.shape[0]
    if out.dtype != torch.float64 or out.device != cholesky.device:
        raise ValueError(
            f"cholesky_append: expected out in float64 on {cholesky.device}, got {out.dtype} on {out.device}."
        )
    if out.shape != (n + 1, n + 1) or out.stride(1) != 1:
        raise ValueError(
            f"cholesky_append: expected out of shape ({n + 1}, {n + 1}) with contiguous rows, got {tuple(out.shape)} "
            f"with strides {out.stride()}."
        )
    corner = out.data_ptr() == cholesky.data_ptr() and (n < 2 or out.stride() == cholesky.stride())
    if n and not corner and out.untyped_storage().data_ptr() == cholesky.untyped_storage().data_ptr():
        raise ValueError("cholesky_append: expected cholesky to be out[:n, :n], or apart from out; they overlap.")


def _cannot_append(n: int) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"cholesky_append: the matrix of order {n + 1} is not positive definite. Likely causes, in order: gnn without "
        "the ridge that the other diagonal entries have; NaN or infinity in g or gnn; a repeated key with a ridge that "
        "is too small.",
        [()],
    )

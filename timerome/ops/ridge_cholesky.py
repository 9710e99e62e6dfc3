"""Ridge systems of an edit memory: the factor and the inverse of K Kᵀ + λ s̄ I, batched, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library

_lib = Library("timerome", "FRAGMENT")
_lib.define(
    "ridge_cholesky(Tensor gram, Tensor ridge) -> (Tensor inverse, Tensor cholesky, Tensor info)",
    tags=torch.Tag.pt2_compliant_tag,
)


class NotPositiveDefiniteError(RuntimeError):
    """A matrix that had to be factored is not positive definite.

    Attributes:
        entries: the batch entries that failed, as tuples of indices; ``[()]`` for a single system.
    """

    def __init__(self, message: str, entries: list[tuple[int, ...]]) -> None:
        super().__init__(message)
        self.entries = entries


class RidgeFactor(NamedTuple):
    """What :func:`ridge_cholesky` returns. One factor serves any number of right-hand sides.

    Attributes:
        inverse: A = (K Kᵀ + λ s I)⁻¹, shape ``(*batch, N, N)``, float64.
        cholesky: L with L Lᵀ = K Kᵀ + λ s I, lower triangular, shape ``(*batch, N, N)``, float64.
        scale: s, shape ``(*batch,)``, float64: the mean squared row norm of K, or 1.
        info: int32, shape ``(*batch,)``; all zero, since anything else raises.
        solution: A D, shape ``(*batch, N, dv)``, float64; None without values.
    """

    inverse: Tensor
    cholesky: Tensor
    scale: Tensor
    info: Tensor
    solution: Tensor | None = None


def ridge_cholesky(keys: Tensor, values: Tensor | None = None, *, ridge: float, relative: bool = True) -> RidgeFactor:
    r"""Factor and invert the ridge system of each set of keys: A = (K Kᵀ + λ s I)⁻¹.

    The Gram matrix, the factor and the inverse are formed in float64, because accumulating the Gram matrix in float32
    is what loses digits. Then rounding A to float32 costs 1e-7 at any condition number. On a GPU, reading ``info``
    waits for the device.

    Args:
        keys: K, shape ``(*batch, N, d)``, any floating dtype, centred by the caller if at all.
        values: D, shape ``(*batch, N, dv)``, any floating dtype; if given, A D is returned too.
        ridge: λ > 0; in units of s.
        relative: s is the mean squared row norm of K, so that one λ suits layers of any scale. False: s = 1, and λ is
            in squared units of ``keys``.

    Returns:
        The :class:`RidgeFactor`.

    Raises:
        TypeError: ``keys`` or ``values`` is not floating.
        ValueError: shapes or devices disagree, or ``ridge`` is not positive and finite.
        NotPositiveDefiniteError: a factorisation failed; ``.entries`` holds the batch indices.

    Source: closed-form ridge regression in its dual form, as in ROME and MEMIT; λ relative to s is ours.

    Example:
        >>> import torch
        >>> factor = ridge_cholesky(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [3.0]]), ridge=0.25)
        >>> factor.scale, factor.solution
        (tensor(4., dtype=torch.float64), tensor([[0.2000],
                [0.6000]], dtype=torch.float64))
    """
    if not keys.is_floating_point():
        raise TypeError(f"ridge_cholesky: expected keys of a floating dtype, got {keys.dtype}; convert them first.")
    if keys.dim() < 2:
        raise ValueError(f"ridge_cholesky: expected keys of shape (*batch, N, d), got {tuple(keys.shape)}.")
    if not 0.0 < ridge < float("inf"):
        raise ValueError(
            f"ridge_cholesky: expected a positive, finite ridge, got {ridge}; "
            "without one, repeated keys make the system singular."
        )
    if values is not None:
        if not values.is_floating_point():
            raise TypeError(f"ridge_cholesky: expected values of a floating dtype, got {values.dtype}.")
        if values.dim() != keys.dim() or values.shape[:-1] != keys.shape[:-1]:
            raise ValueError(
                f"ridge_cholesky: expected values of shape {(*keys.shape[:-1], 'dv')}, one row per key, "
                f"got {tuple(values.shape)}."
            )
        if values.device != keys.device:
            raise ValueError(f"ridge_cholesky: expected values on the device of keys, {keys.device}.")

    k = keys.double()
    gram = k @ k.mT
    n = keys.shape[-2]
    scale = torch.ones(keys.shape[:-2], dtype=torch.float64, device=keys.device)
    if relative and n:
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    inverse, cholesky, info = torch.ops.timerome.ridge_cholesky(gram, ridge * scale)
    if info.any():
        raise _explain(info, ridge, relative)
    return RidgeFactor(inverse, cholesky, scale, info, None if values is None else inverse @ values.double())


def ridge_cholesky_reference(gram: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor and invert G + ρ I for each batch entry. The op ``timerome::ridge_cholesky`` is this function.

    PyTorch's own batched factorisation and inverse beat hand-written loops on the CPU, so nothing is compiled here.

    Args:
        gram: G, symmetric, shape ``(*batch, N, N)``, float64; only its lower triangle is read.
        ridge: ρ, shape ``(*batch,)``, float64, in the units of ``gram``.

    Returns:
        The inverse and the lower Cholesky factor, both float64 of the shape of ``gram``, and ``info``, int32 of shape
        ``(*batch,)``: 0 for success, i > 0 if the leading minor of order i is not positive, −1 if G or ρ is not
        finite. Where ``info`` is not 0, inverse and factor are NaN.

    Raises:
        TypeError: a dtype is not float64.
        ValueError: shapes disagree.

    Example:
        >>> import torch
        >>> inverse, cholesky, info = ridge_cholesky_reference(torch.ones(1, 1).double(), torch.tensor(3.0).double())
        >>> inverse.item(), cholesky.item(), info.item()
        (0.25, 2.0, 0)
    """
    _check(gram, ridge)
    n = gram.shape[-1]
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    system = gram + ridge[..., None, None] * eye
    finite = system.isfinite().all(-1).all(-1)
    # LAPACK's behaviour on NaN is not defined, so those entries are replaced before and marked after.
    cholesky, info = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], system, eye))
    info = torch.where(finite, info, -1)
    failed = (info != 0)[..., None, None]
    cholesky = torch.where(failed, eye, cholesky)
    inverse = torch.cholesky_inverse(cholesky) if n else system
    nan = torch.full_like(eye, float("nan"))
    return torch.where(failed, nan, inverse), torch.where(failed, nan, cholesky), info.to(torch.int32)


def _explain(info: Tensor, ridge: float, relative: bool) -> NotPositiveDefiniteError:
    entries = [tuple(index) for index in info.nonzero().tolist()]
    shown = "; ".join(
        (f"entry {index}: " if index else "")
        + ("not finite" if (code := int(info[index])) < 0 else f"leading minor {code} is not positive")
        for index in entries[:8]
    ) + ("; ..." if len(entries) > 8 else "")
    units = "times the mean squared row norm" if relative else "absolute"
    return NotPositiveDefiniteError(
        f"ridge_cholesky: {len(entries)} of {info.numel()} systems are not positive definite ({shown}). Likely causes, "
        f"in order: NaN or infinity in keys (an overflow in half precision; gather them in float32 or bfloat16); "
        f"repeated or nearly parallel keys with a ridge that is too small (now {ridge:g}, {units}; raise it tenfold, "
        f"or drop repeated keys); keys that are all zero (a hook on the wrong site, or centring a single key).",
        entries,
    )


def _check(gram: Tensor, ridge: Tensor) -> None:
    if gram.dtype != torch.float64 or ridge.dtype != torch.float64:
        raise TypeError(f"ridge_cholesky: expected gram and ridge in float64, got {gram.dtype} and {ridge.dtype}.")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"ridge_cholesky: expected gram of shape (*batch, N, N), got {tuple(gram.shape)}.")
    if ridge.shape != gram.shape[:-2]:
        raise ValueError(
            f"ridge_cholesky: expected ridge of shape {tuple(gram.shape[:-2])}, one per system, "
            f"got {tuple(ridge.shape)}."
        )


_lib.impl("ridge_cholesky", ridge_cholesky_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("timerome::ridge_cholesky", lib=_lib)
def _(gram: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(gram, ridge)
    return torch.empty_like(gram), torch.empty_like(gram), gram.new_empty(gram.shape[:-2], dtype=torch.int32)

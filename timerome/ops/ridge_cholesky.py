"""Ridge systems of an edit memory: the factor and the inverse of K Kᵀ + λ s̄ I, batched, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from timerome import _backend
from timerome.ops._arguments import check_optional_tensors, check_tensors
from timerome.ops._gram import first_rows
from timerome.ops._lowrank import full_float32

_lib = Library("timerome", "FRAGMENT")
_lib.define(
    "ridge_cholesky(Tensor gram, Tensor ridge, Tensor? lengths) -> (Tensor inverse, Tensor cholesky, Tensor info)",
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

    With several ridges, ``*systems`` below is ``(number of ridges, *batch)``, with one it is ``(*batch,)``. Rows and
    columns beyond an entry's length are zero. Where ``info`` is not 0, inverse, factor and solution are NaN.

    Attributes:
        inverse: A = (K Kᵀ + λ s I)⁻¹, shape ``(*systems, N, N)``, float64.
        cholesky: L with L Lᵀ = K Kᵀ + λ s I, lower triangular, shape ``(*systems, N, N)``, float64.
        scale: s, shape ``(*batch,)``, float64: the mean squared row norm of K, or 1.
        info: int32, shape ``(*systems,)``: 0 for success, i > 0 if the leading minor of order i is not positive to
            working precision, −1 if keys or ridge are not finite. Other than zero only with ``check=False``.
        solution: A D, shape ``(*systems, N, dv)``, None without values. Float64 for float64 values, float32 for others:
            with A from float64 that product loses no more than values in float32 have lost.
    """

    inverse: Tensor
    cholesky: Tensor
    scale: Tensor
    info: Tensor
    solution: Tensor | None = None

    def failures(self) -> dict[tuple[int, ...], str]:
        """Name each system that failed and why; asks the device.

        Example:
            >>> import torch
            >>> ridge_cholesky(torch.tensor([[[1.0]], [[0.0]]]), ridge=0.0, check=False).failures()
            {(1,): 'leading minor 1 is not positive'}
        """
        return {tuple(i): _reason(int(self.info[tuple(i)])) for i in self.info.nonzero().tolist()}


def ridge_cholesky(
    keys: Tensor,
    values: Tensor | None = None,
    *,
    ridge: float | Sequence[float],
    relative: bool = True,
    lengths: Tensor | None = None,
    check: bool = True,
) -> RidgeFactor:
    r"""Factor and invert the ridge system of each set of keys: A = (K Kᵀ + λ s I)⁻¹.

    The Gram matrix, the factor and the inverse are formed in float64, because accumulating the Gram matrix in float32
    is what loses digits. Then rounding A to float32 costs 1e-7 at any condition number. Several ridges share one Gram
    matrix. On a GPU, ``check`` waits for the device.

    Args:
        keys: K, shape ``(*batch, N, d)``, any floating dtype, centred by the caller if at all.
        values: D, shape ``(*batch, N, dv)``, any floating dtype; if given, A D is returned too.
        ridge: λ >= 0, finite, in units of s; or several of them. Zero is allowed, and fails where keys are dependent.
        relative: s is the mean squared row norm of K, so that one λ suits layers of any scale. False: s = 1, and λ is
            in squared units of ``keys``.
        lengths: how many keys each entry has, shape ``(*batch,)``, int64, 0 to N; rows beyond are padding and may hold
            anything. None: N.
        check: raise if a system fails. False: see ``info``.

    Returns:
        The :class:`RidgeFactor`.

    Raises:
        TypeError: ``keys`` or ``values`` is not floating, or ``lengths`` not int64.
        ValueError: shapes or devices disagree, a ridge is negative or not finite, or a length is out of range.
        NotPositiveDefiniteError: a factorisation failed; ``.entries`` holds the indices into ``(*systems,)``.

    Source: closed-form ridge regression in its dual form, as in ROME and MEMIT; λ relative to s is ours.

    Example:
        >>> import torch
        >>> factor = ridge_cholesky(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [3.0]]), ridge=0.25)
        >>> factor.scale, factor.solution
        (tensor(4., dtype=torch.float64), tensor([[0.2000],
                [0.6000]]))
        >>> ridge_cholesky(torch.randn(5, 3, 8), ridge=[0.1, 0.2], lengths=torch.tensor([3, 1, 2, 3, 0])).inverse.shape
        torch.Size([2, 5, 3, 3])
    """
    ridges = _check_arguments(keys, values, ridge, lengths)
    batch, n = keys.shape[:-2], keys.shape[-2]
    gram = torch.ops.timerome.gram(keys, lengths)
    if relative and n:
        scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / (n if lengths is None else lengths.clamp(min=1))
    else:
        scale = torch.ones(batch, dtype=torch.float64, device=keys.device)
    inverse, cholesky, info = torch.ops.timerome.ridge_cholesky(gram, _times(ridges, scale), lengths)
    solution = None if values is None else _solution(inverse, values, lengths)
    factor = RidgeFactor(inverse, cholesky, scale, info, solution)
    if check and info.any():
        raise _explain(factor, ridge, relative)
    return factor


def _check_arguments(
    keys: Tensor, values: Tensor | None, ridge: float | Sequence[float], lengths: Tensor | None
) -> Tensor:
    """Return the ridges, float64 on the CPU, of shape () or (number,)."""
    check_tensors("ridge_cholesky", keys=keys)
    check_optional_tensors("ridge_cholesky", values=values, lengths=lengths)
    if not keys.is_floating_point():
        raise TypeError(f"ridge_cholesky: expected keys of a floating dtype, got {keys.dtype}; convert them first.")
    if keys.dim() < 2:
        raise ValueError(f"ridge_cholesky: expected keys of shape (*batch, N, d), got {tuple(keys.shape)}.")
    if keys.is_meta:
        raise ValueError("ridge_cholesky: expected keys to hold data, got a tensor on the meta device.")
    try:  # on the CPU, so that a GPU is not waited for
        ridges = torch.as_tensor(ridge, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"ridge_cholesky: expected ridge to be a number or a sequence of them, got {ridge!r}."
        ) from None
    if ridges.dim() > 1 or not all(0.0 <= x < float("inf") for x in ridges.reshape(-1).tolist()):
        raise ValueError(
            f"ridge_cholesky: expected a finite ridge >= 0, or a sequence of them, got {ridge}; "
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
            raise ValueError(
                f"ridge_cholesky: expected values on the device of keys, {keys.device}, got {values.device}."
            )
    if lengths is not None:
        _check_lengths(lengths, keys.shape[:-2], keys.device)
        if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= keys.shape[-2]:
            raise ValueError(
                f"ridge_cholesky: expected lengths from 0 to N = {keys.shape[-2]}, got {int(lengths.min())} to "
                f"{int(lengths.max())}."
            )
    return ridges


def _times(ridges: Tensor, scale: Tensor) -> Tensor:
    """Each ridge times ``scale``, as numbers of the host: a copy to a GPU would wait for it."""
    if not ridges.dim():
        return ridges.item() * scale
    return torch.stack([x * scale for x in ridges.tolist()]) if len(ridges) else scale.new_empty(0, *scale.shape)


def _solution(inverse: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """A D for each ridge. The inverses of one entry lie below each other meanwhile: D need not be copied for each."""
    d = first_rows(values if values.dtype == torch.float64 else values.float(), lengths)
    a = inverse.to(d.dtype)
    with full_float32(d.device.type):
        if a.dim() == d.dim():
            return a @ d
        return (a.movedim(0, -3).flatten(-3, -2) @ d).unflatten(-2, (len(a), d.shape[-2])).movedim(-3, 0)


def ridge_cholesky_reference(
    gram: Tensor, ridge: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor and invert G + ρ I for each batch entry. The op ``timerome::ridge_cholesky`` is this function.

    PyTorch's own batched factorisation and inverse beat hand-written loops on the CPU, so nothing is compiled there; on
    a GPU a kernel of ours takes many small systems.

    Args:
        gram: G, symmetric, shape ``(*batch, N, N)``, float64; only its lower triangle is read.
        ridge: ρ, shape ``(*batch,)`` or ``(number, *batch)``, float64, in the units of ``gram``.
        lengths: order of each G, shape ``(*batch,)``, int64; what lies beyond is not read. None: N.

    Returns:
        The inverse and the lower Cholesky factor, both float64 of shape ``(*ridge.shape, N, N)``, zero beyond each
        length, and ``info``, int32 of the shape of ``ridge``: 0 for success, i > 0 if the leading minor of order i is
        not positive to working precision (its pivot is at most N ε times the diagonal entry), −1 if G or ρ is not
        finite. Where ``info`` is not 0, inverse and factor are NaN.

    Raises:
        TypeError: a dtype is not float64, or ``lengths`` not int64.
        ValueError: shapes disagree.

    Example:
        >>> import torch
        >>> inverse, cholesky, info = ridge_cholesky_reference(torch.ones(1, 1).double(), torch.tensor(3.0).double())
        >>> inverse.item(), cholesky.item(), info.item()
        (0.25, 2.0, 0)
    """
    _check(gram, ridge, lengths)
    n = gram.shape[-1]
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    system = gram + ridge[..., None, None] * eye
    if lengths is not None:
        inside = torch.arange(n, device=gram.device) < lengths[..., None]
        block = inside[..., :, None] & inside[..., None, :]
        system = torch.where(block, system, eye)
    finite = torch.isfinite(system.tril()).flatten(-2).all(-1) & torch.isfinite(ridge)
    if _perhaps(~finite):
        system = torch.where(finite[..., None, None], system, eye)
    cholesky, info = torch.linalg.cholesky_ex(system)
    # A pivot that is all rounding error would pass for a positive one.
    pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
    lost = pivots <= n * torch.finfo(gram.dtype).eps * system.diagonal(dim1=-2, dim2=-1)
    failed = _perhaps(~finite | (info != 0) | lost.any(-1))
    if failed:
        order = torch.arange(1, n + 1, dtype=info.dtype, device=gram.device)
        lost &= (info == 0)[..., None] | (order < info[..., None])  # beyond a failure the factor means nothing
        info = torch.where(lost.any(-1), lost.to(torch.int32).argmax(-1).to(info.dtype) + 1, info) if n else info
        info = torch.where(finite, info, -1)
        good = (info == 0)[..., None, None]
        cholesky = torch.where(good, cholesky, eye)
    inverse = torch.cholesky_inverse(cholesky)
    if lengths is not None:
        inverse, cholesky = torch.where(block, inverse, 0.0), torch.where(block, cholesky, 0.0)
    if failed:
        nan = torch.where(good, 0.0, float("nan"))
        inverse, cholesky = inverse + nan, cholesky + nan
    return inverse.contiguous(), cholesky.contiguous(), info


def _perhaps(flags: Tensor) -> bool:
    """Whether any is set. A GPU is not asked: it would have to be waited for."""
    return flags.device.type != "cpu" or bool(flags.any())


def _reason(code: int) -> str:
    return "not finite" if code < 0 else f"leading minor {code} is not positive"


def _explain(factor: RidgeFactor, ridge: float | Sequence[float], relative: bool) -> NotPositiveDefiniteError:
    failures = factor.failures()
    shown = "; ".join((f"entry {i}: " if i else "") + why for i, why in list(failures.items())[:8])
    units = "times the mean squared row norm" if relative else "absolute"
    return NotPositiveDefiniteError(
        f"ridge_cholesky: {len(failures)} of {factor.info.numel()} systems are not positive definite ({shown}"
        f"{'; ...' if len(failures) > 8 else ''}). Likely causes, in order: NaN or infinity in keys (an overflow in "
        f"half precision; gather them in float32 or bfloat16); repeated or nearly parallel keys with a ridge that is "
        f"too small (now {ridge}, {units}; raise it tenfold, or drop repeated keys); keys that are all zero (a hook on "
        f"the wrong site, or centring a single key).",
        list(failures),
    )


def _check(gram: Tensor, ridge: Tensor, lengths: Tensor | None) -> None:
    check_tensors("ridge_cholesky", gram=gram, ridge=ridge)
    check_optional_tensors("ridge_cholesky", lengths=lengths)
    if gram.dtype != torch.float64 or ridge.dtype != torch.float64:
        raise TypeError(f"ridge_cholesky: expected gram and ridge in float64, got {gram.dtype} and {ridge.dtype}.")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"ridge_cholesky: expected gram of shape (*batch, N, N), got {tuple(gram.shape)}.")
    batch = gram.shape[:-2]
    if ridge.shape != batch and (ridge.dim() != len(batch) + 1 or ridge.shape[1:] != batch):
        raise ValueError(
            f"ridge_cholesky: expected ridge of shape {tuple(batch)}, one per system, or {('number', *batch)}, "
            f"got {tuple(ridge.shape)}."
        )
    if ridge.device != gram.device:
        raise ValueError(f"ridge_cholesky: expected ridge on the device of gram, {gram.device}, got {ridge.device}.")
    if lengths is not None:
        _check_lengths(lengths, batch, gram.device)


def _check_lengths(lengths: Tensor, batch: torch.Size, device: torch.device) -> None:
    if lengths.dtype != torch.int64:
        raise TypeError(f"ridge_cholesky: expected lengths in int64, got {lengths.dtype}.")
    if lengths.shape != batch:
        raise ValueError(
            f"ridge_cholesky: expected lengths of shape {tuple(batch)}, one per entry, got {tuple(lengths.shape)}."
        )
    if lengths.device != device:
        raise ValueError(f"ridge_cholesky: expected lengths on the device of keys, {device}, got {lengths.device}.")


def _cuda(gram: Tensor, ridge: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Small systems: one block of threads each. torch.linalg for large ones."""
    _check(gram, ridge, lengths)
    c = _backend.compiled_cuda()
    n, batch = gram.shape[-1], gram[..., 0, 0].numel() if gram.shape[-1] else 0
    if c is None or ridge.numel() == 0 or not 0 < n <= c.ridge_cuda_max_n(gram.get_device()):
        return ridge_cholesky_reference(gram, ridge, lengths)
    gram, ridge = gram.contiguous(), ridge.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    inverse = gram.new_empty(*ridge.shape, n, n)
    cholesky, info = torch.empty_like(inverse), torch.empty_like(ridge, dtype=torch.int32)
    c.ridge_cuda(
        gram.data_ptr(),
        ridge.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        inverse.data_ptr(),
        cholesky.data_ptr(),
        info.data_ptr(),
        ridge.numel(),
        batch,
        n,
        gram.get_device(),
        torch.cuda.current_stream(gram.device).cuda_stream,
    )
    return inverse, cholesky, info


_lib.impl("ridge_cholesky", ridge_cholesky_reference, "CompositeExplicitAutograd")
_lib.impl("ridge_cholesky", _cuda, "CUDA")


@torch.library.register_fake("timerome::ridge_cholesky", lib=_lib)
def _(gram: Tensor, ridge: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(gram, ridge, lengths)
    inverse = gram.new_empty(*ridge.shape, *gram.shape[-2:])
    return inverse, torch.empty_like(inverse), gram.new_empty(ridge.shape, dtype=torch.int32)

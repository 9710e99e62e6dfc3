"""Apply an edit memory: a sparse, low-rank, optionally gated change of a hidden state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timerome.ops import _lowrank_cuda as _lowrank_cuda  # registers what runs on a GPU
from timerome.ops._arguments import check_optional_tensors, check_tensors, integer, number
from timerome.ops._lowrank import Edit, bounds_of, check, full_float32, passes_gate, system_of
from timerome.ops.edit_sets import Segments
from timerome.ops.sparsify_add import sparsify_add_reference


def kept_count(d: int, sparsity: float) -> int:
    """Count the entries of a row that stay: ceil((1 - q) d), as exact arithmetic would have it.

    Args:
        d: length of the row.
        sparsity: q, the fraction that is dropped, 0 <= q < 1.

    Returns:
        The count, 0 only for d = 0.

    Raises:
        TypeError: an argument is no number.
        ValueError: ``sparsity`` is outside [0, 1), or ``d`` is negative.

    Example:
        >>> kept_count(10, 0.7), math.ceil((1 - 0.7) * 10)
        (3, 4)
    """
    d, sparsity = integer("kept_count", "d", d), number("kept_count", "sparsity", sparsity)
    if d < 0:
        raise ValueError(f"kept_count: expected d >= 0, the length of a row, got {d}.")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"kept_count: expected sparsity in [0, 1), the fraction that is dropped, got {sparsity}.")
    return _count(d, sparsity)


def _count(d: int, sparsity: float) -> int:
    # q is rarely a binary fraction. This slack also covers a q that was once stored in float32, an error of 3e-8.
    return min(d, max(1, math.ceil((1.0 - sparsity) * d - 5e-8 * d)))


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
    edit_set: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    r"""Add what an edit memory answers to a hidden state: h + α S_q((h − μ) Kᵀ A D), row by row.

        s = (h − μ) Kᵀ        scores
        c = s A               coefficients
        r = c D               residual
        out = h + α · S_q(r)  S_q keeps the ceil((1 − q) d) largest absolute values of each row

    Precision: s, c and r are float32 whatever the dtypes, autocast and TF32 settings (A is close to singular when keys
    share a direction, and then scores rounded to bfloat16 are wrong by 100 % and more). Products with bfloat16 ``h``
    and ``keys`` or ``values`` on a GPU read bfloat16 operands and accumulate in float32; c is rounded to bfloat16 then.
    There, with few keys, a row that holds an infinity counts as NaN.
    For the same reason never fold A into D. The last step is :func:`~timerome.ops.sparsify_add`, exact for a given r.

    With ``edit_set`` each sequence uses a system of its own: pack them with :func:`~timerome.ops.pack_edit_sets` and
    pass the ``keys``, ``coef``, ``values``, ``mean`` and ``segments`` of what that returns.

    :func:`sparse_lowrank_residual_reference` is the plain PyTorch equivalent. Not differentiable: ``backward`` raises.

    Args:
        h: hidden states, shape ``(*batch, T, d)``, float32, float16 or bfloat16.
        keys: K, shape ``(N, d)``, any of these dtypes, already centred by ``mean``. The first M are those that have a
            value, protected ones follow.
        coef: A, shape ``(N, M)``, float32. M <= N: keys whose target is zero (protected ones) have no column.
        values: D, shape ``(M, d)``, any of these dtypes.
        mean: μ, shape ``(d,)``, float32, or one for each edit set, ``(S, d)``. None: zero.
        alpha: strength α.
        sparsity: q, the fraction of each row that is dropped, 0 <= q < 1.
        row_mask: rows that may be edited, shape ``(*batch, T)``, bool. None: all rows.
        gate_threshold: τ. A row is edited only if its largest cosine similarity, h − μ with one of the first M keys (a
            protected key opens no gate), is at least τ. Rows and keys of norm zero never pass. None: no gate.
        edit_set: which set each sequence uses, shape ``(*batch,)``, int64; −1 for none. (A GPU is not asked, so there
            an id out of range is not refused.)
        segments: where each set lies in the packed tensors; needed with ``edit_set``.

    Returns:
        New tensor of the shape and dtype of ``h``.

    Raises:
        TypeError: a dtype or an argument's kind is unsupported.
        ValueError: shapes or devices disagree, ``sparsity`` is outside [0, 1), ``alpha`` is not finite, or an id or an
            offset is out of range.

    Source: TimeROME-DLM (Yao et al. 2026, arXiv 2606.12841). The mean, the gate, the edit sets and the separate A are
    ours.

    Example:
        >>> import torch
        >>> keys = torch.tensor([[1.0, 0.0, 0.0]])
        >>> values = torch.tensor([[0.0, 4.0, 1.0]])
        >>> h = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> sparse_lowrank_residual(h, keys, torch.eye(1), values, sparsity=0.6, gate_threshold=0.5)
        tensor([[2., 8., 2.],
                [0., 1., 0.]])
    """
    edit = _edit(h, keys, coef, values, mean, row_mask, edit_set, segments, gate_threshold, alpha, sparsity)
    out: Tensor = torch.ops.timerome.sparse_lowrank_residual(h, *edit)
    return out


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
    edit_set: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
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
        edit_set: which set each sequence uses.
        segments: where each set lies.

    Returns:
        As :func:`sparse_lowrank_residual`. Two orders of summation in r can swap entries at the selection's threshold.

    Raises:
        TypeError: a dtype or an argument's kind is unsupported.
        ValueError: as :func:`sparse_lowrank_residual`.

    Example:
        >>> import torch
        >>> one = torch.eye(1)
        >>> sparse_lowrank_residual_reference(2 * one, one, one, 3 * one)
        tensor([[8.]])
    """
    edit = _edit(h, keys, coef, values, mean, row_mask, edit_set, segments, gate_threshold, alpha, sparsity)
    check(h, edit)
    sequences = h.reshape(math.prod(h.shape[:-2]), *h.shape[-2:])
    masks = torch.ones(sequences.shape[:-1], dtype=torch.bool, device=h.device)
    if row_mask is not None:
        masks = row_mask.reshape(masks.shape)
    bounds = bounds_of(edit)
    ids = [None] * len(sequences) if edit_set is None else edit_set.reshape(-1).tolist()
    outs = []
    for sequence, active, s in zip(sequences, masks, ids, strict=True):
        if s == -1:
            outs.append(sequence)
            continue
        system = system_of(edit, s, bounds)
        with full_float32(h.device.type):
            x = sequence.float() if system.mean is None else sequence.float() - system.mean
            scores = x @ system.keys.mT
            residual = scores @ system.coef @ system.values
        if gate_threshold is not None:
            own = system.keys[: len(system.values)]
            active = active & passes_gate(scores[:, : len(own)], x.norm(dim=-1), own.norm(dim=-1), gate_threshold)
        outs.append(sparsify_add_reference(sequence, residual, edit.k, alpha, active))
    return torch.stack(outs).reshape(h.shape) if outs else h.clone()


def _edit(
    h: Tensor,
    keys: Tensor,
    coef: Tensor,
    values: Tensor,
    mean: Tensor | None,
    row_mask: Tensor | None,
    edit_set: Tensor | None,
    segments: Segments | None,
    gate_threshold: float | None,
    alpha: float,
    sparsity: float,
) -> Edit:
    """What the ops take besides h; raises TypeError for arguments of the wrong kind. The ops check the rest."""
    name = "sparse_lowrank_residual"
    check_tensors(name, h=h, keys=keys, coef=coef, values=values)
    check_optional_tensors(name, mean=mean, row_mask=row_mask, edit_set=edit_set)
    offsets, max_keys = None, 0
    if segments is not None:
        if not isinstance(segments, Segments):
            raise TypeError(f"{name}: expected segments as pack_edit_sets returns them, got {type(segments).__name__}.")
        check_tensors(name, **{"segments.offsets": segments.offsets})
        offsets, max_keys = segments.offsets, integer(name, "segments.max_keys", segments.max_keys)
    tau = None if gate_threshold is None else number(name, "gate_threshold", gate_threshold)
    k = _kept(h, number(name, "sparsity", sparsity))
    return Edit(keys, coef, values, mean, row_mask, edit_set, offsets, max_keys, tau, number(name, "alpha", alpha), k)


def _kept(h: Tensor, sparsity: float) -> int:
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparse_lowrank_residual: expected sparsity in [0, 1), the fraction that is dropped, got {sparsity}."
        )
    return _count(h.shape[-1], sparsity) if h.dim() else 0

"""Many edit memories in one set of tensors, so that each sequence of a batch can use its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timerome.ops._arguments import check_tensors


class Segments(NamedTuple):
    """Which rows of packed keys and values belong to which edit set.

    Attributes:
        offsets: int64 ``(S + 1, 2)``, on the device of the keys: set s has the keys ``offsets[s, 0]`` up to
            ``offsets[s + 1, 0]`` and the values ``offsets[s, 1]`` up to ``offsets[s + 1, 1]``.
        max_keys: the largest number of keys of a set; a GPU must not be asked for it.
    """

    offsets: Tensor
    max_keys: int


class EditSets(NamedTuple):
    """The systems of S edit sets, one after the other; see :func:`pack_edit_sets`.

    Attributes:
        keys: ``(ΣN, d)``.
        coef: ``(ΣN, max M)`` float32: row n belongs to key n, column m to the m-th value of its set; zero beyond.
        values: ``(ΣM, d)``.
        mean: ``(S, d)`` float32, or None if no set has one.
        segments: where each set lies.
    """

    keys: Tensor
    coef: Tensor
    values: Tensor
    mean: Tensor | None
    segments: Segments

    def to(self, device: torch.device | str) -> EditSets:
        """Return the same sets on another device."""
        mean = None if self.mean is None else self.mean.to(device)
        segments = Segments(self.segments.offsets.to(device), self.segments.max_keys)
        return EditSets(self.keys.to(device), self.coef.to(device), self.values.to(device), mean, segments)


def pack_edit_sets(systems: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> EditSets:
    """Pack systems of different sizes for :func:`~timerome.ops.sparse_lowrank_residual`.

    Args:
        systems: for each edit set its ``(keys, coef, values, mean)``, shaped as that function takes them for one set:
            ``(N, d)``, ``(N, M)`` float32, ``(M, d)``, and ``(d,)`` float32 or None for zero. N and M may differ
            between sets, d, dtypes and device may not.

    Returns:
        The :class:`EditSets`; set s is ``systems[s]``.

    Raises:
        TypeError: a system holds something else than tensors, or a dtype is not floating.
        ValueError: no system, or shapes, dtypes or devices disagree.

    Example:
        >>> import torch
        >>> one = (torch.eye(1, 4), torch.eye(1), torch.ones(1, 4), None)
        >>> two = (torch.eye(2, 4), torch.eye(2, 1), torch.ones(1, 4), None)
        >>> sets = pack_edit_sets([one, two])
        >>> sets.keys.shape, sets.segments.offsets.tolist(), sets.segments.max_keys
        (torch.Size([3, 4]), [[0, 0], [1, 1], [3, 2]], 2)
    """
    if not isinstance(systems, Sequence):
        raise TypeError(f"pack_edit_sets: expected a sequence of systems, got {type(systems).__name__}.")
    if not systems:
        raise ValueError("pack_edit_sets: expected at least one system, got none.")
    for s, system in enumerate(systems):
        _check_kinds(s, system)
    first = systems[0][0]
    for s, (keys, coef, values, mean) in enumerate(systems):
        d = first.shape[-1]
        wanted = [("keys", keys, ("N", d)), ("coef", coef, (len(keys), len(values))), ("values", values, ("M", d))]
        for name, tensor, shape in wanted + ([] if mean is None else [("mean", mean, (d,))]):
            fits = len(shape) == tensor.dim() and all(
                w in ("N", "M") or w == got for w, got in zip(shape, tensor.shape, strict=True)
            )
            if not fits:
                why = ", one row for each of keys and one column for each of values" if name == "coef" else ""
                raise ValueError(
                    f"pack_edit_sets: expected {name} {s} of shape {shape}{why}, got {tuple(tensor.shape)}."
                )
            like = first if name == "keys" else systems[0][2] if name == "values" else None
            dtype = torch.float32 if like is None else like.dtype
            if tensor.dtype != dtype:
                raise ValueError(f"pack_edit_sets: expected {name} {s} in {dtype}, got {tensor.dtype}.")
            if tensor.device != first.device:
                raise ValueError(
                    f"pack_edit_sets: expected {name} {s} on the device of keys 0, {first.device}, got {tensor.device}."
                )
    widest = max(len(values) for _, _, values, _ in systems)
    sizes = torch.tensor([[0, 0]] + [[len(keys), len(values)] for keys, _, values, _ in systems])
    mean = None
    if any(mean is not None for *_, mean in systems):
        zero = torch.zeros(first.shape[-1], device=first.device)
        mean = torch.stack([zero if mean is None else mean for *_, mean in systems])
    return EditSets(
        torch.cat([keys for keys, *_ in systems]),
        torch.cat([torch.nn.functional.pad(coef, (0, widest - coef.shape[1])) for _, coef, *_ in systems]),
        torch.cat([values for _, _, values, _ in systems]),
        mean,
        Segments(sizes.cumsum(0).to(first.device), int(sizes[:, 0].max())),
    )


def _check_kinds(s: int, system: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    if not isinstance(system, (tuple, list)) or len(system) != 4:
        raise TypeError(f"pack_edit_sets: expected system {s} to be (keys, coef, values, mean), got {system!r:.80}.")
    keys, coef, values, mean = system
    tensors = {f"keys {s}": keys, f"coef {s}": coef, f"values {s}": values}
    check_tensors("pack_edit_sets", **tensors if mean is None else {**tensors, f"mean {s}": mean})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"pack_edit_sets: expected {name} of a floating dtype, got {tensor.dtype}.")
        if tensor.dim() != 2:
            raise ValueError(f"pack_edit_sets: expected {name} to have two dimensions, got {tuple(tensor.shape)}.")

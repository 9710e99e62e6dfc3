"""Checks of an argument's kind, made before PyTorch's dispatcher sees it: what that raises names no remedy."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tensors(op: str, **arguments: Any) -> None:
    """Raise TypeError for an argument that is no dense tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise _no_tensor(op, name, value)


def check_optional_tensors(op: str, **arguments: Any) -> None:
    """As :func:`check_tensors`, for arguments that may be None."""
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, Tensor) or value.layout is not torch.strided):
            raise _no_tensor(op, name, value)


def _no_tensor(op: str, name: str, value: Any) -> TypeError:
    if not isinstance(value, Tensor):
        return TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}.")
    return TypeError(f"{op}: expected {name} to be dense, got the layout {value.layout}; call to_dense first.")


def number(op: str, name: str, value: Any) -> float:
    """Return a real number as a float; raise TypeError for what is none."""
    if type(value) is float or isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return float(value.__float__())  # not float(value), which would read a string
    except OverflowError:
        raise ValueError(f"{op}: expected {name} in the range of float64, got {_shown(value)}.") from None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: expected {name} to be a number, got {_shown(value)}.") from None


def integer(op: str, name: str, value: Any) -> int:
    """Return an integer of at most 64 bits as an int; raise TypeError or ValueError for what is none."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        index = operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{op}: expected {name} to be an integer, got {_shown(value)}.") from None
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"{op}: expected {name} in the range of int64, got {index}.")
    return index


def check_alpha(op: str, alpha: float) -> None:
    """Raise ValueError for a strength that float32 does not hold."""
    if not abs(alpha) <= FLOAT32_MAX:
        raise ValueError(f"{op}: expected a finite alpha, at most {FLOAT32_MAX:.3g}, got {alpha}.")


def check_writable(op: str, h: Tensor) -> None:
    """Raise ValueError for a tensor to be overwritten whose elements share memory, as after ``expand``."""
    if h.numel() and any(size > 1 and stride == 0 for size, stride in zip(h.shape, h.stride(), strict=True)):
        raise ValueError(
            f"{op}: expected h to have memory for each element, got strides {h.stride()}; clone an expanded tensor."
        )


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]

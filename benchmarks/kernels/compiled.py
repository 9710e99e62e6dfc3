"""``torch.compile`` of a rival, once a function for all shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for any sizes, as a model of changing sequence lengths would need it."""
    return torch.compile(function, dynamic=True)

"""Checksums of a model's weights in which every number counts, at the speed of reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TimeromeError

SMALL = (torch.int8, torch.uint8, torch.int16, torch.bool)
LINE = 4096  # numbers a line
LINES = {"cpu": 256, "": 16384}  # lines at a time: on a CPU what stays in a core's cache, elsewhere what is still exact


def parts_of(model: nn.Module) -> Iterator[bytes]:
    """Yield name, shape and checksum of all that a checkpoint of ``model`` would hold, by name; what is tied once.

    Raises:
        TimeromeError: weights are on the meta device.
    """
    seen: set[int] = set()
    for name, value in sorted(_leaves("", model.state_dict(keep_vars=True)), key=itemgetter(0)):
        if not isinstance(value, Tensor):
            yield f"{name}={value!r}".encode()
        elif id(value) not in seen:
            seen.add(id(value))
            if value.is_meta:
                raise TimeromeError(
                    f"Backbone.fingerprint: {name} is on the meta device, so its numbers are not at hand; load the "
                    "model without offloading to CPU or disk (a device_map without 'cpu' and 'disk', or device=...)."
                )
            yield f"{name}{tuple(value.shape)}".encode() + checksum(value.detach())


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values within ``value``: quantised modules keep tuples, quantised tensors have parts."""
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor") or not hasattr(value, "__tensor_flatten__"):
            yield name, value
        else:
            for part in value.__tensor_flatten__()[0]:
                yield from _leaves(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _leaves(f"{name}.{i}", part)
    elif isinstance(value, (bool, int, float, str, torch.dtype)):
        yield name, value


@torch.no_grad()
def checksum(tensor: Tensor) -> bytes:
    """Return sums of a tensor's numbers, as bytes: of each line of 4096, and of each place in the lines.

    The numbers are summed as integers: the bits of floats as float32, so that the order of the sum, hence the device,
    does not matter, nor does the float dtype if it holds the values. A number that is changed changes two sums; two
    that change places, two at least.

    Example:
        >>> one = checksum(torch.ones(2))
        >>> one == checksum(torch.ones(2).half()), one == checksum(torch.zeros(2))
        (True, False)
    """
    tensor = whole(tensor)
    if tensor.is_quantized or tensor.layout is not torch.strided:
        tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.reshape(-1)
    beyond = b""
    if flat.dtype == torch.float64:
        rest = (flat - flat.float().double()).nan_to_num(0, 0, 0).float()
        beyond, flat = (checksum(rest) if bool(rest.any()) else b""), flat.float()
    half = flat.dtype == torch.bfloat16
    # Sums of 16 bits fit in 32 as long as there are at most 32768 of them, and are then twice as fast.
    wide = torch.int32 if half or flat.dtype in SMALL else torch.int64
    lines = []
    places = torch.zeros(LINE, dtype=torch.int64, device=flat.device)
    for part in flat.split(LINE * LINES.get(flat.device.type, LINES[""])):
        if half:
            bits = part.view(torch.int16).to(wide)
        elif part.is_floating_point():
            bits = part.float().view(torch.int32)
        else:
            bits = part if part.dtype == torch.int32 else part.to(wide)
        padded = functional.pad(bits, (0, -len(bits) % LINE))
        folded = rearrange(padded, "(line place) -> line place", place=LINE)
        lines.append(folded.sum(1, dtype=wide).long())
        places += folded.sum(0, dtype=wide)
    sums = torch.cat([*lines, places[: flat.numel()]])
    return (sums << 16 if half else sums).cpu().numpy().tobytes() + beyond


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts may be spread over processes, put together; each of them must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

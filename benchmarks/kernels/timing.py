"""Timing of rivals on one device: in turns, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import os
import random
import statistics as stats
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
Parts = Callable[[], Iterator[tuple[AbstractContextManager[object], Call]]]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler below says on stderr that it begins, and that it ends


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds and the quartiles around it.

    Attributes:
        samples: seconds a call, one entry a round; entry i of every rival of a race was taken in the same round.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the rounds took no longer."""
        return stats.median(self.samples)

    @property
    def low(self) -> float:
        """A quarter of the rounds took no longer."""
        return stats.quantiles(self.samples, n=4)[0] if len(self.samples) > 1 else self.median

    @property
    def high(self) -> float:
        """Three quarters of the rounds took no longer."""
        return stats.quantiles(self.samples, n=4)[2] if len(self.samples) > 1 else self.median

    def over(self, other: Timing) -> float:
        """How many times longer this takes than ``other``: the median over rounds of the ratio within a round."""
        return stats.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


def race(
    rivals: dict[str, Call], device: torch.device, *, budget: float = 1.0, least: int = 5, most: int = 60
) -> dict[str, Timing]:
    """Time some callables in turns.

    Args:
        rivals: what is timed, by name. Each is called twice before, unmeasured.
        device: where they work; on a GPU the clock is that of its events, the cache is emptied before each call, and
            the host has enqueued the call before the clock starts, as far as the call does not wait for the device.
        budget: seconds for all of them together; the number of rounds follows from it.
        least: rounds at least, whatever they take.
        most: rounds at most.

    Returns:
        The timings, by name. A call shorter than half a millisecond is repeated within a round.

    Example:
        >>> found = race({"a": lambda: sum(range(10))}, torch.device("cpu"), budget=0.01)
        >>> found["a"].median > 0
        True
    """
    clock = _clock(device)
    repeats, once = {}, 0.0
    for name, call in rivals.items():
        call()
        call()
        seconds = clock(call, 1)
        repeats[name] = max(1, min(1000, int(5e-4 / max(seconds, 1e-7))))
        once += seconds * repeats[name]
    rounds = _rounds(once, budget, least, most)
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    order, shuffle = list(rivals), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # or one of them would always find the cache as the same other left it
        for name in order:
            samples[name].append(clock(rivals[name], repeats[name]))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def race_in_parts(
    rivals: dict[str, Parts], device: torch.device, *, budget: float = 1.0, least: int = 5, most: int = 60
) -> dict[str, Timing]:
    """Time long work that consists of many parts: the rivals take turns part by part.

    So whatever disturbs the machine for longer than a part disturbs all of them alike.

    Args:
        rivals: by name, what does the work: it yields the parts one after the other: what each needs around it, which
            is not timed, and a call. All of them are gone through once before, unmeasured.
        device: as for :func:`race`.
        budget: seconds for all of them together; the number of rounds follows from it.
        least: rounds at least.
        most: rounds at most.

    Returns:
        The timings of the whole work, by name.

    Example:
        >>> from contextlib import nullcontext
        >>> def a():
        ...     return ((nullcontext(), time.localtime) for _ in range(3))
        >>> found = race_in_parts({"a": a}, torch.device("cpu"), budget=0.01)
        >>> found["a"].median > 0
        True
    """
    clock = _clock(device)
    shuffle = random.Random(0).shuffle

    def one_round() -> dict[str, float]:
        total, under_way = dict.fromkeys(rivals, 0.0), {name: parts() for name, parts in rivals.items()}
        while under_way:
            order = list(under_way)
            shuffle(order)
            for name in order:
                part = next(under_way[name], None)
                if part is None:
                    del under_way[name]
                    continue
                around, call = part
                with around:
                    total[name] += clock(call, 1)
        return total

    rounds = _rounds(sum(one_round().values()), budget, least, most)
    found = [one_round() for _ in range(rounds)]
    return {name: Timing(tuple(taken[name] for taken in found)) for name in rivals}


def _rounds(once: float, budget: float, least: int, most: int) -> int:
    """How many rounds of ``once`` seconds the budget has room for."""
    return max(least, min(most, int(budget / max(once, 1e-9))))


def _clock(device: torch.device) -> Callable[[Call, int], float]:
    """Return what tells the seconds of a call that is repeated so often."""
    return _events(device) if device.type == "cuda" else _wall


def _wall(call: Call, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _events(device: torch.device) -> Callable[[Call, int], float]:
    # Larger than any present second-level cache. It is read, for what is written would be there to be written back, and
    # whoever comes next would wait for that.
    other = torch.zeros(64 << 20, device=device)
    # The host enqueues a call while the device still idles, as in a model's forward, where it is far ahead: else the
    # clock would show how long Python takes.
    ahead = 1_000_000  # cycles, about half a millisecond

    def clock(call: Call, repeats: int) -> float:
        nonlocal ahead
        total = 0.0
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            other.sum()
            torch.cuda._sleep(ahead)
            begin.record()
            call()
            end.record()
            if begin.query():  # the device was waiting for the host, or the host for the device, which more cannot help
                ahead = min(2 * ahead, 4_000_000)
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        return total / repeats

    return clock


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes a call holds at once at most, over what was allocated before it: tensors alone, results included.

    Example:
        >>> peak_bytes(lambda: torch.empty(1000), torch.device("cpu")) >= 4000
        True
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    del kept
    assert found.profiler is not None and found.profiler.kineto_results is not None
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do at best.

    Attributes:
        copy: bytes read and written a second, copying a gigabyte.
        matmul: operations a second of a square product, two for a multiply-add; on a GPU in the working dtype, on a CPU
            in float32, in which such work is done there (and in float16 a product can take a hundred times as long).
    """

    copy: float
    matmul: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        """Measure them; takes a second."""
        source = torch.zeros(1 << 28, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        n, dtype = (8192, dtype) if device.type == "cuda" else (2048, torch.float32)
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        product: Tensor = a @ b
        found = race(
            {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}, device, budget=2.0
        )
        return cls(2.0 * source.numel() * 4 / found["copy"].median, 2.0 * n**3 / found["matmul"].median)

    def floor(self, nbytes: float, operations: float) -> float:
        """Seconds below which work of so many bytes and operations cannot get on this device."""
        return max(nbytes / self.copy, operations / self.matmul)

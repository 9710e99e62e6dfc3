"""A trace shared out over processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def _no_others(mine: bytes) -> list[bytes]:
    return [mine]


@dataclass(frozen=True)
class Shard:
    """Which facts a process traces, and how it tells the others.

    Facts are dealt out in turn. What a fact's runs draw depends on its id alone, so the result does not depend on the
    number of processes.

    Attributes:
        rank: of this process, from 0.
        world_size: number of processes.
        gather: gives every process the bytes of all, by rank; called the same number of times by each.

    Raises:
        ValueError: the rank is none of the world's.

    Example:
        >>> Shard(1, 2, lambda mine: [b"{}", mine]).of(["a", "b", "c"])
        ['b']
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[bytes], list[bytes]] = _no_others

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"Shard: expected 0 <= rank < world_size, got {self.rank} of {self.world_size}.")

    def of(self, facts: Sequence[str]) -> list[str]:
        """Return this process's share."""
        return list(facts[self.rank :: self.world_size])

    def merged(self, mine: dict[str, Any]) -> dict[str, Any]:
        """Return every process's JSON-ready entries together."""
        if self.world_size == 1:
            return mine
        found: dict[str, Any] = {}
        for part in self.gather(json.dumps(mine).encode()):
            found |= json.loads(part)
        return found


ALONE = Shard()

"""The nodes' caches of shards in simulated time: who lacks what, and how long the storage takes for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOREVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Storage:
    """What loading asks of the storage.

    Attributes:
        bytes_per_step: that a node with a cold cache fetches for a step.
        first_bytes: that a node with an empty cache fetches before its first step.
        node_bytes_per_second: of a node's network.
        all_bytes_per_second: of the storage, which nodes share; infinite: without a limit.
        epoch_steps: of an epoch.
        seen_share: of the shards, that a node sees in an epoch; after e epochs a cache that can hold all of
            them misses (1 - seen_share)^e of what is asked for.
        keeps: whether the caches can hold the whole dataset; else nothing of an epoch before is there.
        is_cached: whether there are caches, which have what steps need that are taken again.
    """

    bytes_per_step: float
    first_bytes: float
    node_bytes_per_second: float
    all_bytes_per_second: float
    epoch_steps: int
    seen_share: float
    keeps: bool
    is_cached: bool = True


class Caches:
    """How far each node has read, and since which step its cache fills.

    Args:
        storage: what loading asks for; None: data are always at hand.
        num_nodes: nodes.
    """

    def __init__(self, storage: Storage | None, num_nodes: int) -> None:
        self._storage = storage
        self._since = np.zeros(num_nodes, dtype=np.int64)
        self._furthest = np.zeros(num_nodes, dtype=np.int64)

    def empty(self, node: int, step: int) -> None:
        """A node begins again, at a step."""
        self._since[node] = self._furthest[node] = step

    def read_up_to(self, step: int) -> None:
        """All nodes have read what steps before this one need."""
        np.maximum(self._furthest, step, out=self._furthest)

    def first_seconds(self) -> float:
        """Seconds until nodes whose caches are empty have what a first step needs."""
        if self._storage is None:
            return 0.0
        is_empty = self._since == self._furthest
        return self._fetch_seconds(np.where(is_empty, self._storage.first_bytes, 0.0))

    def step_seconds(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds in which the storage gives what each of some rising steps needs and caches do not hold."""
        seconds = np.zeros(len(steps))
        if self._storage is None:
            return seconds
        i = 0
        while i < len(steps):
            stop = int(np.searchsorted(steps, self._next_change(int(steps[i]))))
            missing = self._storage.bytes_per_step * self._missing(int(steps[i]))
            seconds[i:stop] = self._fetch_seconds(missing)
            i = stop
        return seconds

    def _next_change(self, step: int) -> int:
        """The next step at which caches hold another share of what is needed."""
        assert self._storage is not None
        changes: list[int] = self._furthest[self._furthest > step].tolist()
        if self._storage.keeps:
            epoch = self._storage.epoch_steps
            changes += (self._since + ((step - self._since) // epoch + 1) * epoch).tolist()
        return min(changes, default=FOREVER)

    def _missing(self, step: int) -> NDArray[np.float64]:
        """(nodes,) shares that are not in the caches."""
        assert self._storage is not None
        epochs = (step - self._since) // self._storage.epoch_steps
        share = (1 - self._storage.seen_share) ** epochs if self._storage.keeps else np.ones(len(epochs))
        is_there = (step < self._furthest) & self._storage.is_cached
        return np.where(is_there, 0.0, share)

    def _fetch_seconds(self, wanted: NDArray[np.float64]) -> float:
        """Seconds until the last of the nodes has its bytes; they share the storage as they need it."""
        assert self._storage is not None
        most, total = float(wanted.max()), float(wanted.sum())
        return max(most / self._storage.node_bytes_per_second, total / self._storage.all_bytes_per_second)

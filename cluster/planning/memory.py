"""Memory of a GPU by ZeRO stage and micro-batch, from what `frepa_dist.models.cost` counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frepa_dist.config import RunConfig
from frepa_dist.models.cost import Cost, count_cost, static_memory
from shards.support.errors import ConfigError

STAGES = (0, 1, 2, 3)
COUNTED_SIZE = 32  # of the larger of the two micro-batches that are counted


def with_layout(
    config: RunConfig, *, stage: int | None = None, micro_batch_size: int | None = None
) -> RunConfig:
    """The config with another ZeRO stage or micro-batch."""
    changes: dict[str, int] = {}
    if stage is not None:
        changes["zero_stage"] = stage
    if micro_batch_size is not None:
        changes["micro_batch_size"] = micro_batch_size
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a GPU as a function of the layout.

    The most activations alive at once are the largest of many sums that are affine in the micro-batch, one
    for each place of the program: a convex function. They are counted at 1 and at 32 images, so the line
    through both is never below them in between, and hardly below beyond.

    Attributes:
        config: of the run.
        cost: counted at the larger size.
        activations_at_none, activations_per_image: bytes, the line through both sizes.
    """

    config: RunConfig
    cost: Cost
    activations_at_none: float
    activations_per_image: float

    def parts(self, stage: int, micro_batch_size: int, ranks: int) -> dict[str, int]:
        """Bytes of a GPU, by what takes them."""
        config = with_layout(self.config, stage=stage)
        memory = static_memory(config, self.cost.parameters, self.cost.trained, ranks)
        activations = self.activations_at_none + self.activations_per_image * micro_batch_size
        return {**memory, "activations": round(activations)}

    def total(self, stage: int, micro_batch_size: int, ranks: int) -> int:
        """Bytes of a GPU."""
        return sum(self.parts(stage, micro_batch_size, ranks).values())

    def largest(self, stage: int, ranks: int, limit_bytes: float) -> int | None:
        """The largest micro-batch that fits and divides a rank's share of a global batch; None: none."""
        sizes = micro_batches(self.config.train.global_batch_size, ranks)
        fitting = [size for size in sizes if self.total(stage, size, ranks) <= limit_bytes]
        return max(fitting, default=None)


def fit_memory(config: RunConfig) -> MemoryModel:
    """Count a run at two micro-batch sizes.

    Raises:
        ConfigError: the settings contradict each other.
    """
    large = min(COUNTED_SIZE, config.train.global_batch_size)
    small = 1
    costs = [count_cost(with_layout(config, micro_batch_size=size)) for size in dict.fromkeys((small, large))]
    first, last = costs[0].memory["activations"], costs[-1].memory["activations"]
    slope = (last - first) / (large - small) if large > small else last / large
    return MemoryModel(config, costs[-1], last - slope * large, slope)


def micro_batches(global_batch_size: int, ranks: int) -> list[int]:
    """Micro-batch sizes that divide a rank's share of the global batch, rising.

    Raises:
        ConfigError: the ranks do not divide the global batch.
    """
    if global_batch_size % ranks:
        raise ConfigError(
            f"{ranks} ranks do not divide a global batch of {global_batch_size}",
            where="train.global_batch_size",
            fix=f"take {_near(global_batch_size, ranks)} GPUs together, or another global batch, which "
            "decides numbers",
        )
    share = global_batch_size // ranks
    return [size for size in range(1, share + 1) if share % size == 0]


def _near(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])))


def shown_sizes(sizes: Sequence[int], most: int = 8) -> list[int]:
    """Some of many sizes, evenly among them, the smallest and the largest too."""
    if len(sizes) <= most:
        return list(sizes)
    places = {round(i * (len(sizes) - 1) / (most - 1)) for i in range(most)}
    return [sizes[place] for place in sorted(places)]

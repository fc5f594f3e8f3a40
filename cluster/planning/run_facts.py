"""What of a run does not depend on the machines: its networks, its length, its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.planning.assumptions import Assumptions
from cluster.planning.checkpoints import checkpoint_bytes
from cluster.planning.datasets import open_dataset
from cluster.planning.memory import MemoryModel, fit_memory
from cluster.planning.reads import Dataset
from cluster.planning.timing import Network
from frepa_dist.config import RunConfig
from frepa_dist.models.cost import network_specs
from shards.read.order import OrderConfig, choose_num_streams, count_batches
from shards.stores.store import is_remote

Access = Literal["cache", "range", "folder"]


@dataclass(frozen=True)
class RunFacts:
    """A run, counted.

    Attributes:
        config: as it was given.
        memory: bytes of a GPU by layout, and with it the networks' sizes and operations.
        kinds: what each network is to training.
        dataset: what it reads.
        access: how: shards through caches or ranges of them, from S3, or a folder that all nodes see.
        order: of the samples; without weights where the modalities are not known.
        epoch_steps: of the first epoch.
        steps: of the run.
    """

    config: RunConfig
    memory: MemoryModel
    kinds: dict[str, str]
    dataset: Dataset
    access: Access
    order: OrderConfig
    epoch_steps: int
    steps: int

    @property
    def global_batch_size(self) -> int:
        """Images of a step."""
        return self.config.train.global_batch_size

    @property
    def images(self) -> int:
        """Of the run, repeats counted."""
        return self.steps * self.global_batch_size

    @property
    def epochs(self) -> float:
        """Of the run."""
        return self.steps / self.epoch_steps

    @property
    def num_streams(self) -> int:
        """Of the order."""
        return self.order.num_streams or choose_num_streams(self.global_batch_size)

    @property
    def flops_per_image(self) -> float:
        """Operations of a step for each image."""
        return self.memory.cost.total_flops

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint."""
        cost = self.memory.cost
        return checkpoint_bytes(self.kinds, cost.parameters, cost.trained)

    def networks(self, stage: int) -> dict[str, Network]:
        """Networks whose gradients travel, with the student in a ZeRO stage."""
        train, trained = self.config.train, self.memory.cost.trained
        made = {}
        for name, kind in self.kinds.items():
            if kind == "engine":
                made[name] = Network(trained[name], train.precision, stage)
            elif kind == "opponent":
                made[name] = Network(trained[name], "fp32", train.opponent.zero_stage)
            elif kind == "plain":
                made[name] = Network(trained[name], "fp32", 0)
        return made


def gather_facts(config: RunConfig, assumptions: Assumptions, *, look: bool = True) -> RunFacts:
    """Count a run's networks and open its dataset; some seconds.

    Args:
        config: of the run.
        assumptions: what is taken for granted.
        look: whether to look for the dataset.

    Raises:
        ConfigError, DataError: settings contradict each other, or the dataset lacks what they ask for.
    """
    dataset = open_dataset(config, assumptions, look=look)
    order = config.order_config()
    if not dataset.is_known:
        order = order.model_copy(update={"modality_weights": {}})
    train = config.train

    def batches(epoch: int) -> int:
        return count_batches(
            dataset.counts, dataset.exclusions, order, epoch, modalities=dataset.modalities or None
        )

    steps = train.steps or sum(batches(epoch) for epoch in range(train.epochs or 0))
    access: Access = config.data.remote if is_remote(config.data.root) else "folder"
    return RunFacts(
        config=config,
        memory=fit_memory(config),
        kinds={name: spec.kind for name, spec in network_specs(config).items()},
        dataset=dataset,
        access=access,
        order=order,
        epoch_steps=batches(0),
        steps=steps,
    )

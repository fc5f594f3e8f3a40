"""Seconds of a training step: computing, communication, data. Pure functions of numbers.

Communication volumes are those of S. Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models (SC 2020), section 7: a pass (a reduce-scatter or an all-gather) sends (W - 1) / W of a
network's bytes from each of W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.planning.assumptions import Assumptions
from frepa_dist.models.cost import BUCKET_ELEMENTS, PREFETCH_ELEMENTS

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Network:
    """A network that an engine trains.

    Attributes:
        trained: parameters.
        precision: in which gradients and weights travel.
        stage: ZeRO stage of its engine.
    """

    trained: int
    precision: str
    stage: int

    @property
    def num_bytes(self) -> int:
        """Of its gradients, or its weights."""
        return self.trained * BYTES[self.precision]


@dataclass(frozen=True)
class Layout:
    """How ranks share the work.

    Attributes:
        nodes, gpus_per_node: the machines.
        stage: ZeRO stage of the student.
        micro_batch_size, accumulation: global batch = ranks x both.
    """

    nodes: int
    gpus_per_node: int
    stage: int
    micro_batch_size: int
    accumulation: int

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def global_batch_size(self) -> int:
        """Images of a step."""
        return self.ranks * self.micro_batch_size * self.accumulation


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what could take them.

    Attributes:
        compute: of the operations.
        communication: between ranks, that is not hidden behind computing.
        loader: of decoding the step's images, on all loader processes.
        network: of fetching them from the storage.
    """

    compute: float
    communication: float
    loader: float
    network: float

    @property
    def device(self) -> float:
        """What the GPUs take; loading goes on beside it."""
        return self.compute + self.communication

    @property
    def total(self) -> float:
        """Seconds of a step: the slowest decides."""
        return max(self.device, self.loader, self.network)

    @property
    def limit(self) -> str:
        """What decides."""
        if self.total > self.device:
            return "network to the storage" if self.network >= self.loader else "loader"
        return "compute" if self.compute >= self.communication else "communication between GPUs"


def passes(stage: int, accumulation: int) -> int:
    """How often a network's bytes are sent around in a step.

    Stage 0: an all-reduce of the gradients, two passes. 1: they are scattered, and weights gathered. 2
    scatters them in every micro-batch, 3 also gathers weights twice in each, for the forward and the backward
    pass.
    """
    return {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]


def pass_seconds(num_bytes: float, layout: Layout, assumptions: Assumptions) -> float:
    """Seconds of one pass, by rings through all ranks: one for each GPU of a node, by its network port."""
    if layout.ranks == 1:
        return 0.0
    gpu, sent = assumptions.gpu, num_bytes * (layout.ranks - 1) / layout.ranks
    seconds = sent / gpu.link_gb_per_second / 1e9 if layout.gpus_per_node > 1 else 0.0
    if layout.nodes > 1:
        seconds = max(seconds, sent / (layout.gpus_per_node * gpu.network_bytes_per_second()))
    return seconds / assumptions.link_efficiency


def communication_seconds(networks: Mapping[str, Network], layout: Layout, assumptions: Assumptions) -> float:
    """Seconds of a step in which ranks exchange gradients and weights; small reductions are left out."""
    if layout.ranks == 1:
        return 0.0
    total = 0.0
    hops = 2 * math.ceil(math.log2(layout.ranks)) * assumptions.latency_seconds
    for network in networks.values():
        number = passes(network.stage, layout.accumulation)
        chunk = PREFETCH_ELEMENTS if network.stage == 3 else BUCKET_ELEMENTS
        total += number * pass_seconds(network.num_bytes, layout, assumptions)
        total += number * max(1, math.ceil(network.trained / chunk)) * hops
    return (1 - assumptions.overlap) * total


def loader_processes(num_workers: int, layout: Layout, cores_per_node: int | None) -> int:
    """Loader processes that have a core, over all nodes."""
    wanted = max(1, num_workers) * layout.gpus_per_node
    return layout.nodes * (wanted if cores_per_node is None else min(wanted, cores_per_node))


def fetch_seconds(bytes_by_node: float, requests: float, busy_nodes: int, assumptions: Assumptions) -> float:
    """Seconds of fetching side by side.

    Args:
        bytes_by_node: what each of the busy nodes fetches.
        requests: of all of them, to a prefix.
        busy_nodes: that fetch.
        assumptions: what networks and storage give.
    """
    rate = assumptions.storage_gbit_per_second
    if assumptions.s3_gbit_per_second is not None and busy_nodes:
        rate = min(rate, assumptions.s3_gbit_per_second / busy_nodes)
    seconds = bytes_by_node * 8 / (rate * 1e9)
    if assumptions.s3_requests_per_second is not None:
        seconds = max(seconds, requests / assumptions.s3_requests_per_second)
    return seconds


def step_time(
    networks: Mapping[str, Network],
    flops_per_image: float,
    precision: str,
    layout: Layout,
    num_workers: int,
    bytes_by_node: float,
    requests: float,
    assumptions: Assumptions,
) -> StepTime:
    """Seconds of a step.

    Args:
        networks: that engines train.
        flops_per_image: operations of a step for each image.
        precision: of the matrix products.
        layout: how ranks share the work.
        num_workers: loader processes of a rank.
        bytes_by_node: that a node fetches for a step, the busiest one.
        requests: of all nodes for a step, to a prefix.
        assumptions: the rest.
    """
    size = layout.global_batch_size
    processes = loader_processes(num_workers, layout, assumptions.cores_per_node)
    peak = assumptions.gpu.peak_flops(precision)
    return StepTime(
        compute=flops_per_image * size / (layout.ranks * peak * assumptions.mfu),
        communication=communication_seconds(networks, layout, assumptions),
        loader=size / (processes * assumptions.loader_images_per_second),
        network=fetch_seconds(bytes_by_node, requests, layout.nodes, assumptions),
    )

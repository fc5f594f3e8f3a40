"""The dataset of a run, opened where it can be, else assumed."""

from __future__ import annotations

from cluster.planning.assumptions import Assumptions
from cluster.planning.reads import Dataset, assumed_dataset
from frepa_dist.config import RunConfig
from shards.dataset import has_dataset
from shards.read.kept import exclusion_rows
from shards.read.reader import shard_files
from shards.read.views import open_snapshot
from shards.support.errors import EnvironmentFault


def open_dataset(config: RunConfig, assumptions: Assumptions, *, look: bool = True) -> Dataset:
    """Read the snapshot of `data.root`; where there is none, or it cannot be reached, assume one.

    Args:
        config: of the run.
        assumptions: what to assume.
        look: whether to look there at all.

    Raises:
        ConfigError, DataError: there is a dataset, but not what the config asks of it.
    """
    data = config.data
    assumed = assumed_dataset(assumptions.num_images, assumptions.bytes_per_image, assumptions.shard_bytes)
    try:
        if not look or not has_dataset(data.root):
            return assumed
        stream = config.stream_config()
        snapshot = open_snapshot(stream)
        exclusions = exclusion_rows(data.root, snapshot)
    except EnvironmentFault:
        return assumed
    return Dataset(
        counts=[shard.num_samples for shard in snapshot.shards],
        shard_bytes=[
            sum(file.num_bytes for file in set(shard_files(shard, data.hf_digests or {})))
            for shard in snapshot.shards
        ],
        modalities=[shard.modality for shard in snapshot.shards],
        exclusions=exclusions,
        is_known=True,
        source=f"snapshot {snapshot.hash} of {data.root}",
    )

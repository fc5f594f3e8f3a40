"""The samples of a dataset as they are, for evaluation: no order, no augmentation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.read.crops import center_crop
from shards.read.kept import KeptSamples, exclusion_rows
from shards.read.reader import Sample, ShardReader
from shards.read.views import StreamConfig, cut_view, open_snapshot, three_planes
from shards.read.windows import to_bytes


class PlainView(NamedTuple):
    """The largest centered square of an image, resized."""

    key: str
    modality: str
    labels: dict[str, Any]
    image: NDArray[np.uint8]
    """(3, S, S) RGB, grey images repeated, CT in the reference window."""
    hf_indices: NDArray[np.int64]
    """(K,) HF tokens of the view, strongest first."""


class ImageSet:
    """Samples of a snapshot in the order of its shards, without those that repeat the pixels of another one.

    Args:
        config: the dataset, and size and grid of the views.

    Raises:
        ConfigError, DataError, EnvironmentFault: as of `shards.read.views.open_snapshot`.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._config, self.snapshot = config, open_snapshot(config)
        self._reader = ShardReader(config.root, self.snapshot, config.hf_digests, config.remote_config)
        self._kept = KeptSamples(self.snapshot, exclusion_rows(config.root, self.snapshot))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> PlainView:
        """Return the plain view of one sample.

        Raises:
            DataError: the sample is damaged.
            IndexError: there is no such sample.
        """
        shard, row = self._locate(index)
        sample = self._reader.read(shard, row)
        pixels, hf_indices = cut_view(sample, center_crop(*sample.image.shape[:2]), self._config)
        return PlainView(
            key=sample.key,
            modality=self.snapshot.shards[shard].modality,
            labels=self._reader.labels(shard, row),
            image=three_planes(to_bytes(pixels)),
            hf_indices=hf_indices.astype(np.int64),
        )

    def read(self, index: int) -> Sample:
        """Return one sample as stored: canonical pixels and the response map of the whole image.

        Raises:
            DataError: the sample is damaged.
            IndexError: there is no such sample.
        """
        return self._reader.read(*self._locate(index))

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._kept.locate(index)

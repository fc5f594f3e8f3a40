"""What one shard adds to the statistics of its modality; runs in a worker process."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from shards.builder.members import Stored, decode_json, decode_npy, decode_stored, read_member
from shards.dataset import read_index
from shards.hf.draw import token_mask
from shards.hf.tokens import HFParams, hf_response
from shards.read.windows import to_bytes
from shards.schema import ShardInfo
from shards.stores.store import Store
from shards.support.errors import DataError

HEAT_CELLS = 16
NUM_BINS = 64
RANGES = {"uint8": (0.0, 256.0), "int16": (-1024.0, 3072.0)}
"""Values that a histogram covers: grey levels, or Hounsfield units."""

MAX_LABEL_VALUES = 1000
"""Different values of a label that are counted one by one; what has more is an id, not a class."""

Float = npt.NDArray[np.float64]


class Shown(NamedTuple):
    """A sample to be looked at."""

    caption: str
    pixels: npt.NDArray[np.uint8]
    """(H, W) or (H, W, 3) RGB; CT in the reference window."""
    tokens: npt.NDArray[np.uint16]
    """(N,) all patches, strongest first."""


@dataclass(frozen=True)
class StatsTask:
    """All a worker needs.

    Attributes:
        store: the dataset.
        shard: what is looked at.
        rows: of its samples whose pixels are measured.
        shown: those of them that are kept to be looked at.
        hf: parameters of the tokens, None where this program has another definition.
        patch_size: of the tokens, in pixels.
    """

    store: Store
    shard: ShardInfo
    rows: Sequence[int]
    shown: frozenset[int]
    hf: HFParams | None
    patch_size: int


@dataclass
class ShardStats:
    """Counts over all samples of a shard, and sums over those that were measured.

    Attributes:
        modality: of the shard.
        sides: how many samples have a side of so many pixels, by "stored short side", "source long side", ...
        kinds: samples by what they are stored as: "grey png".
        labels: samples by label and value.
        histograms: by dtype, (NUM_BINS,): share of each image's pixels, summed over images.
        num_images: measured, by dtype.
        heat: (HEAT_CELLS, HEAT_CELLS): share of the kept tokens' area in each cell, summed over images.
        ring_tokens: of the kept tokens, the share in the outermost ring of patches, of each image.
        ring_patches: of all patches likewise, of each image.
        energy: share of the squared response that lies in the kept tokens, of each image.
        shown: samples to be looked at.
    """

    modality: str
    sides: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    kinds: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    histograms: dict[str, Float] = field(default_factory=dict)
    num_images: Counter[str] = field(default_factory=Counter)
    heat: Float = field(default_factory=lambda: np.zeros((HEAT_CELLS, HEAT_CELLS)))
    ring_tokens: list[float] = field(default_factory=list)
    ring_patches: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def add(self, other: ShardStats) -> None:
        """Take over another shard's."""
        for name, counts in other.sides.items():
            self.sides[name] += counts
        for name, values in other.labels.items():
            if len(self.labels[name]) <= MAX_LABEL_VALUES:
                self.labels[name] += values
        for dtype, histogram in other.histograms.items():
            self.histograms[dtype] = self.histograms.get(dtype, 0) + histogram
        self.kinds += other.kinds
        self.num_images += other.num_images
        self.heat += other.heat
        self.ring_tokens += other.ring_tokens
        self.ring_patches += other.ring_patches
        self.energy += other.energy
        self.shown += other.shown


def measure_shard(task: StatsTask) -> ShardStats:
    """Count what an index says, and measure the chosen samples.

    Raises:
        DataError: the index or a sample is missing or damaged.
        EnvironmentFault: the store cannot be reached.
    """
    table = read_index(task.store, task.shard)
    stats = ShardStats(task.shard.modality)
    for prefix, what in (("", "stored"), ("source_", "source")):
        height, width = (table[f"{prefix}{side}"].to_numpy() for side in ("height", "width"))
        for name, values in (("short", np.minimum(height, width)), ("long", np.maximum(height, width))):
            counted = zip(*np.unique(values, return_counts=True), strict=True)
            stats.sides[f"{what} {name} side"] = Counter({int(v): int(n) for v, n in counted})
    columns = (table[name].to_pylist() for name in ("channels", "dtype", "image_ext"))
    stats.kinds = Counter(
        f"{'grey' if channels == 1 else 'color'}{'' if dtype == 'uint8' else ' ' + dtype} {extension}"
        for channels, dtype, extension in zip(*columns, strict=True)
    )
    for item in pc.value_counts(table["labels"]).to_pylist():
        for name, value in decode_json(item["values"].encode()).items():
            if len(stats.labels[name]) <= MAX_LABEL_VALUES:
                stats.labels[name][str(value)] += item["counts"]
    for row in task.rows:
        _measure(task, stats, table.slice(row, 1).to_pylist()[0], row in task.shown)
    return stats


def _measure(task: StatsTask, stats: ShardStats, row: dict[str, Any], is_shown: bool) -> None:
    """Read one sample and add what it shows."""
    where = f"{task.store.where(task.shard.path)}, sample {row['key']}"
    try:
        image = read_member(task.store, task.shard.path, row, "image")
        pixels = decode_stored(image, row["image_ext"], row["dtype"])
        tokens = decode_npy(read_member(task.store, task.shard.path, row, "hf"))
    except DataError as error:
        fix = "run frepa shards verify --deep, mend the shard"
        raise DataError(error.what, where=where, fix=fix) from error
    dtype = str(pixels.dtype)
    stats.histograms[dtype] = stats.histograms.get(dtype, 0) + _histogram(pixels)
    stats.num_images[dtype] += 1
    kept = token_mask(tokens, pixels.shape[0], pixels.shape[1], task.patch_size)
    # by area: a cell says which share of it is kept
    stats.heat += cv2.resize(kept.astype(np.float32), (HEAT_CELLS,) * 2, interpolation=cv2.INTER_AREA)
    ring = np.ones(kept.shape, bool)
    ring[1:-1, 1:-1] = False
    stats.ring_patches.append(float(ring.mean()))
    stats.ring_tokens.append(float(kept[ring].sum() / max(1, kept.sum())))
    if task.hf is not None:
        energy = np.square(hf_response(pixels, task.hf)[: kept.shape[0] * task.patch_size])
        energy = energy[:, : kept.shape[1] * task.patch_size]
        inside = np.kron(kept, np.ones((task.patch_size,) * 2, np.uint8)).astype(bool)
        if total := float(energy.sum()):
            stats.energy.append(float(energy[inside].sum() / total))
    if is_shown:
        caption = f"{row['key'][:8]}, {row['width']} x {row['height']} px"
        stats.shown.append(Shown(caption, to_bytes(pixels), tokens))


def _histogram(pixels: Stored) -> Float:
    """Share of the pixels in each bin; colors by their luminance."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.ndim == 3 else pixels
    counts, _ = np.histogram(grey, bins=NUM_BINS, range=RANGES[str(pixels.dtype)])
    return counts / grey.size

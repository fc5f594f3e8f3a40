"""Samples to micro-batches: the view of a sample that belongs to a place in the plan.

Shapes: B samples of a micro-batch, C channels, S side of a view in pixels, N patches of a view, K HF tokens
among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from shards.dataset import load_snapshot
from shards.hf.maps import indices_from_map
from shards.read.access import CacheRequests
from shards.read.config import StreamConfig
from shards.read.crops import Crop, apply_crop, center_crop, crop_shares, random_crop
from shards.read.draws import draw_key, sample_rng
from shards.read.kept import KeptSamples, Place
from shards.read.order import Slots
from shards.read.reader import Sample, ShardReader
from shards.read.windows import BYTE_WINDOW, REFERENCE_WINDOW, draw_window
from shards.schema import Snapshot
from shards.support.errors import ConfigError, DataError, FrepaError

MAX_REPLACEMENTS = 8
"""How many samples in a row may be damaged under `skip`: beyond it, the dataset is, not the sample."""


def open_snapshot(config: StreamConfig) -> Snapshot:
    """Load the snapshot that is to be read.

    Raises:
        ConfigError: `config.hf_digests` names a modality that the dataset does not hold.
        DataError: there is no such dataset, or shards of it lack an HF version that is asked for.
        EnvironmentFault: the place cannot be reached.
    """
    snapshot = load_snapshot(config.root, config.snapshot)
    for modality, digest in sorted((config.hf_digests or {}).items()):
        if modality not in snapshot.modalities:
            raise ConfigError(
                f"the dataset holds no '{modality}'",
                where=f"hf_digests.{modality}",
                allowed=", ".join(snapshot.modalities),
            )
        if digest == snapshot.hf_digests[modality]:
            continue
        shards = [shard for shard in snapshot.shards if shard.modality == modality]
        lacking = [shard.path for shard in shards if digest not in shard.hf]
        if lacking:
            some = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            whole = set.intersection(*(set(shard.hf) for shard in shards))
            raise DataError(
                f"{len(lacking)} of {len(shards)} shards of {modality} have no HF version {digest}: {some}",
                where=config.root,
                allowed=", ".join(sorted({snapshot.hf_digests[modality], *whole})),
                fix="add it to all of them with `frepa shards rehf`, or change hf_digests",
            )
    return snapshot


class Skipped(TypedDict):
    """A sample that could not be read and was replaced."""

    position: int
    sample: str
    reason: str


class MicroBatch(TypedDict):
    """Consecutive slots of a global batch, ready for a device."""

    image: torch.Tensor
    """(B, C, S, S) as stored: uint8, or int16 where any sample is; C = 1 where all are grey, else 3 (RGB).
    What a sample looks like depends on its neighbors, then; `windows.to_unit_range` makes it equal."""
    window: torch.Tensor
    """(B, 2) float32, the stored values that become 0 and 1: (0, 255), or a window in Hounsfield units."""
    hf_indices: torch.Tensor
    """(B, K) int64, the HF tokens of the view, strongest first."""
    mask_noise: torch.Tensor
    """(B, N) float32, uniform in [0, 1)."""
    position: torch.Tensor
    """(B,) int64, place in the epoch's plan."""
    slot: torch.Tensor
    """(B,) int64, place in the global batch."""
    draw_key: list[int]
    """Of each sample, a hash of seed, epoch and position: what further draws for it are keyed by."""
    key: list[str]
    skipped: list[Skipped]
    """What `bad_samples: skip` replaced."""
    num_bytes: int
    """Bytes read from shards."""
    cache_requests: CacheRequests
    """What the process that made this asked of the cache since it made the one before. It tells of the way to
    samples, and nothing of them."""


class Request(NamedTuple):
    """What a micro-batch is made from; small, since it travels to a worker."""

    epoch: int
    slots: Slots
    upcoming: Sequence[int] = ()
    """Shards that this worker should get in the background for later."""


class Views(torch.utils.data.Dataset["MicroBatch | FrepaError"]):
    """Map-style dataset whose index is a `Request` and whose item is a whole micro-batch.

    A function of its arguments and of the request: which process asks, and what was asked before, is nothing
    to it.
    """

    def __init__(
        self, config: StreamConfig, snapshot: Snapshot, exclusions: dict[int, NDArray[np.int64]]
    ) -> None:
        self.config, self.exclusions = config, exclusions
        self.reader = ShardReader(config.root, snapshot, config.hf_digests, config.remote_config)

    def __getitem__(self, request: Request) -> MicroBatch | FrepaError:
        # an error is returned: on its way out of a worker DataLoader would turn it into text with a traceback
        try:
            return self._micro_batch(request)
        except FrepaError as error:
            return error

    def _micro_batch(self, request: Request) -> MicroBatch:
        config, slots = self.config, request.slots
        self.reader.prefetch(request.upcoming)
        num = len(slots.position)
        hf_indices = np.empty((num, round(config.hf_keep * config.num_patches)), np.int64)
        noise = np.empty((num, config.num_patches), np.float32)
        windows = np.empty((num, 2), np.float32)
        pixels: list[NDArray[Any]] = []
        keys: list[str] = []
        skipped: list[Skipped] = []
        num_bytes = 0
        places = list(zip(slots.shard.tolist(), slots.row.tolist(), strict=True))
        for i, found in enumerate(self.reader.read_many(places)):
            position = int(slots.position[i])
            sample = self._replace(request.epoch, position, places[i], found, skipped)
            crop = self._crop(sample, request.epoch, position)
            view, hf_indices[i] = cut_view(sample, crop, config)
            pixels.append(view)
            windows[i] = self._window(sample, request.epoch, position)
            sample_rng(config.seed, request.epoch, position, "mask").random(out=noise[i], dtype=np.float32)
            keys.append(sample.key)
            num_bytes += sample.num_bytes
        return MicroBatch(
            image=torch.from_numpy(_stack(pixels, config.image_size)),
            window=torch.from_numpy(windows),
            hf_indices=torch.from_numpy(hf_indices),
            mask_noise=torch.from_numpy(noise),
            position=torch.from_numpy(slots.position.copy()),
            slot=torch.from_numpy(slots.slot.copy()),
            draw_key=[draw_key(config.seed, request.epoch, p) for p in slots.position.tolist()],
            key=keys,
            skipped=skipped,
            num_bytes=num_bytes,
            cache_requests=self.reader.take_requests(),
        )

    def _crop(self, sample: Sample, epoch: int, position: int) -> Crop:
        config, (height, width) = self.config, sample.image.shape[:2]
        if not config.augment:
            return center_crop(height, width)
        rng = sample_rng(config.seed, epoch, position, "crop")
        return random_crop(
            rng, height, width, scale=config.crop_scale, ratio=config.crop_ratio, flip=config.flip
        )

    def _window(self, sample: Sample, epoch: int, position: int) -> tuple[float, float]:
        if sample.image.dtype == np.uint8:
            return BYTE_WINDOW
        if not self.config.augment:
            return REFERENCE_WINDOW
        rng = sample_rng(self.config.seed, epoch, position, "window")
        return draw_window(rng, self.config.ct_windows)

    def _replace(
        self, epoch: int, position: int, place: Place, found: Sample | DataError, skipped: list[Skipped]
    ) -> Sample:
        """Return what was found, or under `skip` the first readable one of those drawn for the position."""
        replacements = self._replacements(epoch, position, place[0])
        while isinstance(found, DataError):
            if self.config.bad_samples == "fail":
                raise found
            skipped.append(Skipped(position=position, sample=self.reader.where(*place), reason=found.what))
            following = next(replacements, None)
            if following is None:
                raise DataError(
                    f"{1 + MAX_REPLACEMENTS} samples drawn for one place in the plan are all damaged, "
                    f"the last one: {skipped[-1]['sample']}: {skipped[-1]['reason']}",
                    where=self.config.root,
                    fix="restore the shards, or build the dataset again",
                )
            place = following
            (found,) = self.reader.read_many([place])
        return found

    def _replacements(self, epoch: int, position: int, shard: int) -> Iterator[tuple[int, int]]:
        """Draw samples of a shard's modality, each as likely as any other."""
        kept = KeptSamples(self.reader.snapshot, self.exclusions, self.reader.snapshot.shards[shard].modality)
        rng = sample_rng(self.config.seed, epoch, position, "replacement")
        for number in rng.integers(len(kept), size=MAX_REPLACEMENTS).tolist():
            yield kept.locate(number)


def cut_view(sample: Sample, crop: Crop, config: StreamConfig) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """Cut a view out of a sample, and rank its HF tokens in the same rectangle of the response map.

    Returns:
        The pixels of the stored type, (3, S, S) or for a grey image (S, S), and the indices of the HF tokens,
        (K,).
    """
    pixels = apply_crop(sample.image, crop, config.image_size)
    indices = indices_from_map(
        sample.hf_map,
        crop_shares(crop, *sample.image.shape[:2]),
        config.patch_size,
        config.hf_keep,
        output_size=config.image_size,
        flip=crop.flip,
    )
    return pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1), indices


def _stack(views: Sequence[NDArray[Any]], size: int) -> NDArray[Any]:
    """Stack views (S, S) and (3, S, S) -> (B, C, S, S), of the wider of their types."""
    is_color = any(view.ndim == 3 for view in views)
    dtype = np.result_type(*(view.dtype for view in views))
    stacked = np.empty((len(views), 3 if is_color else 1, size, size), dtype)
    for i, view in enumerate(views):
        stacked[i] = view
    return stacked


def three_planes(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(S, S) or (3, S, S) -> (3, S, S), contiguous."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[-2:])))

"""Features of many pictures: on one rank or several, and from the cache where they are known.

Pictures are cut into batches before anything else, and ranks take whole batches: a batch holds the same
pictures whatever the number of ranks, so their features are the same too (bit for bit where the ranks have
as many threads as one process had; a matrix product may sum in another order else).

Shapes: n pictures, B of a batch, D width, V parts of a view.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.feature_cache import FeatureCache, encoder_digest, prune_cache
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.pictures import FilePictures, Pictures
from frepa_dist.threads import share_cores
from shards.support.errors import ConfigError, DataError
from shards.support.progress import Progress
from shards.support.settings import Settings
from shards.workers.pool import run_tasks

BATCHES_AHEAD = 2  # decoded while the device works


class Extraction(Settings):
    """How features are computed; none of it changes what they are.

    Attributes:
        batch_size: pictures at a time.
        device: None takes a GPU if there is one; of several ranks, each its own GPU in turn.
        num_ranks: processes on this machine.
        cache: folder of known features, None for none.
        cache_bytes: that may stay in it.
    """

    batch_size: int = Field(default=64, ge=1)
    device: str | None = None
    num_ranks: int = Field(default=1, ge=1)
    cache: Path | None = None
    cache_bytes: int = Field(default=10 << 30, ge=0)


class Look(Protocol):
    """A way to look at pictures; may be pickled."""

    def version(self, encoder: Encoder, pictures: Pictures) -> str:
        """All that decides features besides the encoder and a picture's content."""

    def load(self, encoder: Encoder, pictures: Pictures, numbers: Sequence[int]) -> Any:
        """What the encoder is to see of some pictures."""

    def embed(self, encoder: Encoder, loaded: Any, digests: Sequence[str]) -> Tensor:
        """Features (B, ...) of that; `digests` are those of the pictures."""


@dataclass(frozen=True)
class WholeView:
    """The center square of a picture, all of it."""

    def version(self, encoder: Encoder, pictures: Pictures) -> str:
        """See `Look`."""
        return "whole"

    def load(self, encoder: Encoder, pictures: Pictures, numbers: Sequence[int]) -> Tensor:
        """See `Look`."""
        return torch.from_numpy(pictures.pixels(numbers, encoder.image_size))

    def embed(self, encoder: Encoder, loaded: Tensor, digests: Sequence[str]) -> Tensor:
        """See `Look`."""
        return encoder.encode(loaded)


class Share(NamedTuple):
    """What one rank does: every `num_ranks`-th batch."""

    source: str
    pictures: Pictures
    digests: list[str]
    look: Look
    settings: Extraction
    rank: int
    num_ranks: int


def extract(
    source: str,
    pictures: Pictures,
    settings: Extraction | None = None,
    look: Look | None = None,
    *,
    encoder: Encoder | None = None,
) -> npt.NDArray[np.float32]:
    """Features of pictures.

    Args:
        source: of the encoder, see `features.SOURCES`.
        pictures: n of them.
        settings: how they are computed.
        look: how pictures are looked at, None for the whole center square.
        encoder: that was loaded from `source` already.

    Returns:
        (n, D), or (n, V, D) where a look gives several.

    Raises:
        FrepaError: what is wrong with encoder, pictures or cache.
    """
    settings, look = settings or Extraction(), look or WholeView()
    refuse_launcher()
    encoder = encoder or load_encoder(source, settings.device)
    if settings.cache is None and settings.num_ranks == 1:
        digests = [""] * len(pictures.names) if isinstance(look, WholeView) else pictures.digests()
        batches = _cut(range(len(digests)), settings.batch_size)
        found = [features for _, features in _run(encoder, pictures, digests, look, batches)]
        return np.concatenate(found)
    digests = pictures.digests()
    if settings.cache is not None:
        features = _through_cache(source, encoder, pictures, digests, look, settings)
        prune_cache(settings.cache, settings.cache_bytes)
        return features
    with tempfile.TemporaryDirectory(prefix="frepa-features-") as folder:
        given = settings.model_copy(update={"cache": Path(folder)})
        return _through_cache(source, encoder, pictures, digests, look, given)


def extract_features(
    encoder: Encoder, paths: Sequence[Path], *, batch_size: int = 64
) -> npt.NDArray[np.float32]:
    """Features (n, D) of n image files, on this rank and without a cache.

    Raises:
        DataError: a file cannot be read, or a feature is not finite.
    """
    pictures = FilePictures(Path(), [str(path) for path in paths])
    digests, batches = [""] * len(paths), _cut(range(len(paths)), batch_size)
    found = [rows for _, rows in _run(encoder, pictures, digests, WholeView(), batches)]
    return np.concatenate([np.empty((0, encoder.width), np.float32), *found])


def _through_cache(
    source: str,
    encoder: Encoder,
    pictures: Pictures,
    digests: list[str],
    look: Look,
    settings: Extraction,
) -> npt.NDArray[np.float32]:
    cache = open_cache(encoder, pictures, look, settings)
    found = cache.read(digests)
    if missing := set(digests) - set(found):
        shares = [
            Share(source, pictures, digests, look, settings, rank, settings.num_ranks)
            for rank in range(settings.num_ranks)
        ]
        if settings.num_ranks == 1:
            fill_share(shares[0], encoder)
        else:
            for _ in run_tasks(_fill_in_process, shares, settings.num_ranks):
                pass
        found |= cache.read(list(missing))
    lost = [digest for digest in digests if digest not in found]
    if lost:
        raise DataError(
            f"{len(lost)} features that were written are not there any more",
            where=settings.cache,
            fix="let no other program delete from the cache meanwhile, and give it more room",
        )
    return np.stack([found[digest] for digest in digests])


def open_cache(encoder: Encoder, pictures: Pictures, look: Look, settings: Extraction) -> FeatureCache:
    """The part of a cache that holds what an encoder sees by a look."""
    assert settings.cache is not None
    return FeatureCache(settings.cache, encoder_digest(encoder), look.version(encoder, pictures))


def _fill_in_process(share: Share) -> int:
    settings = share.settings
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{share.rank % torch.cuda.device_count()}"
    if device == "cpu":
        share_cores(share.num_ranks)
    return fill_share(share, load_encoder(share.source, device))


def fill_share(share: Share, encoder: Encoder) -> int:
    """Compute what the cache lacks of a rank's batches, and keep it; returns how many pictures that were."""
    cache = open_cache(encoder, share.pictures, share.look, share.settings)
    # of equal pictures the first stands for all, so that the batches do not depend on the cache
    first = {digest: number for number, digest in reversed(list(enumerate(share.digests)))}
    batches = _cut(sorted(first.values()), share.settings.batch_size)[share.rank :: share.num_ranks]
    known = cache.names()
    todo = [[n for n in batch if share.digests[n] not in known] for batch in batches]
    todo = [batch for batch in todo if batch]
    done = 0
    rank = share.rank if share.num_ranks > 1 else None
    for batch, features in _run(encoder, share.pictures, share.digests, share.look, todo, rank):
        cache.write([share.digests[number] for number in batch], features)
        done += len(batch)
    return done


def _cut(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _run(
    encoder: Encoder,
    pictures: Pictures,
    digests: Sequence[str],
    look: Look,
    batches: Sequence[Sequence[int]],
    rank: int | None = None,
) -> Iterator[tuple[Sequence[int], npt.NDArray[np.float32]]]:
    """Embed batches; of several ranks the first speaks for all."""
    total = sum(map(len, batches))
    description = "features" if rank is None else f"features, rank {rank}"

    def load(batch: Sequence[int]) -> Any:
        return look.load(encoder, pictures, batch)

    with Progress(total, description, silent=bool(rank)) as progress:
        for batch, loaded in _ahead(load, batches):
            features = look.embed(encoder, loaded, [digests[number] for number in batch]).cpu().numpy()
            if not np.isfinite(features).all():
                raise DataError(
                    "the features hold NaN or infinity", where=encoder.name, fix="use an earlier checkpoint"
                )
            yield batch, features
            progress.update(len(batch))


def _ahead(
    load: Callable[[Sequence[int]], Any], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], Any]]:
    """Load batches in one thread (which may use others), a bounded number ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Sequence[int], Future[Any]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(load, batch)))
            if len(waiting) > BATCHES_AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def launched_rank(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Rank and number of ranks that a launcher such as torchrun gave this process; (0, 1) without one.

    Raises:
        ConfigError: they are no numbers.
    """
    given = os.environ if environment is None else environment
    try:
        return int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise ConfigError("no numbers", where="RANK, WORLD_SIZE", fix="unset them") from error


def local_device(wanted: str | None) -> str | None:
    """The device of a rank that a launcher started: its own GPU, where none is named."""
    rank = os.environ.get("LOCAL_RANK", "")
    if wanted is None and rank.isdecimal() and torch.cuda.is_available():
        return f"cuda:{int(rank) % torch.cuda.device_count()}"
    return wanted


def refuse_launcher() -> None:
    """See that this process is not one of several that would all do the same.

    Raises:
        ConfigError: it is.
    """
    _, num_ranks = launched_rank()
    if num_ranks > 1:
        raise ConfigError(
            f"a launcher started {num_ranks} ranks, and each would do all of this",
            where="WORLD_SIZE",
            fix="fill a cache with `frepa evaluate features --cache DIR` under the launcher, then run this "
            "once with the same --cache; or use --num-ranks",
        )

"""Features of all pictures of a folder or a dataset, kept for other commands or programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from frepa_dist.evaluate.extract import (
    Extraction,
    Share,
    WholeView,
    extract,
    fill_share,
    launched_rank,
    local_device,
)
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.pictures import open_pictures
from shards.stores.atomic import replace_file, writing_to
from shards.support.errors import ConfigError
from shards.support.settings import Settings


class FeatureResult(Settings):
    """What was computed.

    Attributes:
        encoder: of which encoder.
        images: of which pictures.
        num: how many there are.
        num_computed: how many this rank computed, None where several did or nothing was kept.
        width: of a feature.
        cache, out: where they are.
    """

    encoder: str
    images: str
    num: int
    num_computed: int | None
    width: int
    cache: str | None
    out: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A line for the terminal."""
        computed = "" if self.num_computed is None else f", {self.num_computed} computed by this rank"
        places = " and ".join(place for place in (self.cache, self.out) if place)
        return f"features of {self.num} images, {self.width} wide{computed}, in {places}"


def run_features(
    encoder: str,
    images: Path | str,
    *,
    modality: str | None = None,
    extraction: Extraction | None = None,
    out: Path | None = None,
) -> FeatureResult:
    """Compute features of pictures; under a launcher, a rank's share of them.

    Args:
        encoder: see `features.SOURCES`.
        images: a folder of files, or a dataset of shards.
        modality: of a dataset, the only one to use.
        extraction: how; with a cache, unless `out` is given.
        out: safetensors file: `features` (n, D), and `names` in its header, a JSON list.

    Raises:
        FrepaError: what is wrong with encoder, pictures, cache or file.
    """
    extraction = extraction or Extraction()
    rank, num_ranks = launched_rank()
    if num_ranks > 1 and (extraction.cache is None or out is not None or extraction.num_ranks > 1):
        raise ConfigError(
            "ranks of a launcher meet in a cache",
            where="features",
            allowed="--cache, without --out and --num-ranks",
        )
    if extraction.cache is None and out is None:
        raise ConfigError("the features would be lost", where="features", fix="name a --cache or an --out")
    pictures = open_pictures(images, modality)
    loaded = load_encoder(encoder, local_device(extraction.device))
    computed = None
    if num_ranks > 1:
        digests = pictures.digests()
        share = Share(encoder, pictures, digests, WholeView(), extraction, rank, num_ranks)
        computed = fill_share(share, loaded)
    else:
        features = extract(encoder, pictures, extraction, encoder=loaded)
        if out is not None:
            with writing_to(out):
                out.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(out) as file:
                names = {"names": json.dumps(pictures.names), "encoder": loaded.name}
                file.write(save({"features": features}, metadata=names))
    return FeatureResult(
        encoder=loaded.name,
        images=pictures.where,
        num=len(pictures.names),
        num_computed=computed,
        width=loaded.width,
        cache=None if extraction.cache is None else str(extraction.cache),
        out=None if out is None else str(out),
    )

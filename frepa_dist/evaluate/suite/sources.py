"""What is known of the encoders of a suite: their weights, and of runs the images of their pretraining."""

from __future__ import annotations

from pathlib import Path

from frepa_dist.evaluate.feature_cache import encoder_digest
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.suite.config import EncoderEntry
from frepa_dist.runs import CONFIG, load_run_config
from shards.dataset import load_snapshot
from shards.read.balance import drawn_modalities
from shards.support.errors import FrepaError
from shards.support.settings import Settings


class Weights(Settings):
    """A source that was loaded.

    Attributes:
        name: the source, with the step of a run.
        digest: of weights and structure.
    """

    name: str
    digest: str


class Pretraining(Settings):
    """Images that an encoder was pretrained on, as far as they are known.

    Attributes:
        modalities: None where they are not known.
        num_images: None where it is not known.
        told: who says so.
    """

    modalities: tuple[str, ...] | None = None
    num_images: int | None = None
    told: str = "not known"


def read_weights(source: str, device: str | None) -> Weights:
    """Load a source and hash it.

    Raises:
        FrepaError: what is wrong with it.
    """
    encoder = load_encoder(source, device)
    return Weights(name=encoder.name, digest=encoder_digest(encoder))


def find_pretraining(entry: EncoderEntry) -> Pretraining:
    """What the config says of an encoder's pretraining, else the dataset of its first run."""
    found = _of_run(Path(entry.sources[0]))
    said = {
        "modalities": entry.pretrained_on or found.modalities,
        "num_images": entry.pretraining_images or found.num_images,
    }
    if entry.pretrained_on is None and entry.pretraining_images is None:
        return found
    return Pretraining(**said, told="the config")


def _of_run(run: Path) -> Pretraining:
    if not (run / CONFIG).is_file():
        return Pretraining()
    try:
        data = load_run_config(run).data
        snapshot = load_snapshot(data.root, data.snapshot)
    except FrepaError as error:
        return Pretraining(told=f"not known: {error}")
    used = drawn_modalities(data.modality_weights, snapshot.modalities)
    num = sum(shard.num_samples for shard in snapshot.shards if shard.modality in used)
    return Pretraining(modalities=used, num_images=num, told=f"the dataset of {run}")

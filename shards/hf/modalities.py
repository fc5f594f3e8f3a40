"""The nine modalities: what high-frequency tokens are in each, and how its grey levels are stored.

The values for fundus photographs were searched on three sets with vessel masks; the defaults of `HFParams`
are the published definition. Those of the others were chosen by eye on some 300 images of each, and by
measuring: how many kept tokens lie on the rim, on padding, on lettering drawn into the images or on
highlights, and how many stay when noise is added. A band-pass is there where it keeps tokens off speckle: in
OCT nine tokens of ten then lie on the retina, six of ten without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shards.formats.intensity import IntensityRule
from shards.hf.tokens import HFParams
from shards.support.errors import ConfigError


@dataclass(frozen=True)
class Modality:
    """A kind of image.

    Attributes:
        name: as in paths and settings.
        hf: how its high-frequency tokens are found.
        intensity: how its deep values are stored; 8-bit images are stored as they are.
        caution: what its high-frequency tokens may be besides anatomy.
    """

    name: str
    hf: HFParams
    intensity: IntensityRule
    caution: str


def _hf(**changes: Any) -> HFParams:
    """Parameters of a modality other than fundus: the filter as published, on luminance."""
    published = {"background_sigma": 0.04, "cutoff_cycles": 13.4, "low_pass_cycles": None, "order": 2}
    return HFParams(**{"channel": "luminance", "log_offset": None, "fov_convex": False} | published | changes)


MODALITIES = {
    modality.name: modality
    for modality in (
        Modality(
            "fundus",
            HFParams(log_offset=0.2, cutoff_cycles=24.0, low_pass_cycles=85.0),
            IntensityRule(kind="as_is"),
            "bright crescents at the rim, lens dust",
        ),
        Modality(
            "ct",
            _hf(fov="body", fov_level=-500.0, clip=(-1000.0, 1000.0)),
            IntensityRule(kind="hounsfield"),
            "streaks of metal; a table that touches the skin",
        ),
        Modality(
            "mri",
            _hf(fov="adaptive", fov_paper=False, fov_erosion=0.03),
            IntensityRule(kind="percentiles", scope="volume"),
            "ghosts inside the head, scalp, bias field",
        ),
        Modality(
            "xray",
            _hf(fov="adaptive", fov_paper=False, fov_erosion=0.03, frame_taper=0.05, mark_contrast=0.15),
            IntensityRule(kind="percentiles", scope="image"),
            "wires and tubes; lettering on bright tissue",
        ),
        Modality(
            "ultrasound",
            _hf(fov="padding", cutoff_cycles=8.0, low_pass_cycles=60.0, mark_contrast=0.45),
            IntensityRule(kind="as_is"),
            "coarse speckle, dim callipers",
        ),
        Modality(
            "oct",
            _hf(fov="padding", fov_erosion=0.03, low_pass_cycles=40.0),
            IntensityRule(kind="as_is"),
            "bright vitreous",
        ),
        Modality(
            "dermoscopy",
            _hf(fov="body", fov_convex=True),
            IntensityRule(kind="as_is"),
            "hair, rulers, gel bubbles",
        ),
        Modality(
            "histopathology",
            _hf(fov="tissue", cutoff_cycles=26.8),
            IntensityRule(kind="as_is"),
            "folds, blood cells, ink of the colors of the stain",
        ),
        Modality(
            "endoscopy",
            _hf(channel="green", fov="adaptive", fov_paper=False, mark_contrast=0.2),
            IntensityRule(kind="as_is"),
            "large highlights, instruments, dim lettering",
        ),
    )
}


def find_modality(name: str) -> Modality:
    """Return a modality by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in MODALITIES:
        raise ConfigError(f"unknown modality '{name}'", allowed=", ".join(MODALITIES))
    return MODALITIES[name]

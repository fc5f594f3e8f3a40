"""The nine modalities: what high-frequency tokens are in each, for 8-bit pictures.

The values for fundus photographs follow RetMAE (ICLR 2026). For histopathology the cut-off is twice as high,
since nuclei are smaller than vessels at the usual magnifications, and the whole tile is the field of view:
glass is smooth, so that its patches rank last by themselves. The others are starting choices.
"""

from __future__ import annotations

from dataclasses import dataclass

from shards.hf_tokens import HFParams
from shards.support.errors import ConfigError


@dataclass(frozen=True)
class Modality:
    """A kind of image; `caution` says what its high-frequency tokens may be besides anatomy."""

    name: str
    hf: HFParams
    caution: str


MODALITIES = {
    modality.name: modality
    for modality in (
        Modality("fundus", HFParams(), "rim, lens dust, white corners"),
        Modality("ct", HFParams(channel="luminance"), "table, metal"),
        Modality("mri", HFParams(channel="luminance"), "ringing, bias field"),
        Modality("xray", HFParams(channel="luminance"), "burnt-in text, borders"),
        Modality("ultrasound", HFParams(channel="luminance", cutoff_cycles=8.0), "speckle, callipers"),
        Modality("oct", HFParams(channel="luminance", fov="none"), "speckle, padding wedges"),
        Modality("dermoscopy", HFParams(channel="luminance"), "hair, rulers"),
        Modality(
            "histopathology",
            HFParams(channel="luminance", fov="none", cutoff_cycles=26.8),
            "pen marks, folds",
        ),
        Modality("endoscopy", HFParams(), "specular highlights, overlays"),
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

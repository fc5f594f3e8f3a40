"""The settings of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shards.builder.publish import SourceFacts
from shards.builder.samples import SampleSpec
from shards.formats.common import DEFAULT_MAX_PIXELS, ReadOptions
from shards.formats.intensity import IntensityRule
from shards.hf.modalities import MODALITIES, find_modality
from shards.hf.tokens import HFParams
from shards.schema import NAME_PATTERN
from shards.support.settings import Settings, validate
from shards.support.telemetry import MetricsConfig

_UNPUBLISHED = {"jobs", "executor", "ray_address", "state", "salt", "retry_quarantined", "metrics"}
"""Settings that do not change the bytes, and secrets."""


class BuildConfig(Settings):
    """How a source becomes shards.

    Attributes:
        modality: one of `MODALITIES`.
        source: what the shards of this source are called; it enters the dataset.
        size: short side of the canonical images, in pixels; aspect kept, never upscaled.
        patch_size: of the HF tokens, in pixels; the cells of the response map are a quarter of it.
        shard_bytes: about how large a shard becomes; small datasets get smaller ones.
        jobs: worker processes, 0 for one per available core; it does not change the bytes.
        executor: "local" for processes of this machine, "ray" for Ray's; it does not change the bytes.
        ray_address: of a running Ray cluster, None to start Ray on this machine.
        keep_names: put the file names into the dataset.
        state: private folder, DEST.state when None; must be named where the destination is in S3.
        salt: to be used in a fresh state folder instead of a random one.
        retry_quarantined: plan the quarantined units of earlier builds anew.
        metrics: where live metrics of the build are served to Prometheus; it does not change the bytes.
        hf: changes to the HF parameters of the modality.
        intensity: changes to the modality's rule for values of more than 8 bits.
        labels: "none", "folder" or the path of a table, see `create_labeler`.
        label_columns: columns of tables and listings that enter the dataset.
        patient_column: column of tables and listings that tells patients apart; it enters salted.
        splits: take only objects labeled with these splits, all when empty.
        max_pixels: larger images are quarantined before they are decoded.
        min_side: images with a shorter side (as decoded) are quarantined.
        min_std: images whose channels all have a lower standard deviation are quarantined, in grey levels or
            Hounsfield units.
        slice_axis: see `ReadOptions`, as for the four that follow.
        hdf5_key: dataset of an HDF5 or NPZ file.
        tile_size: of slides.
        tile_mpp: of slides.
        min_tissue: of slides.
    """

    modality: str
    source: str = Field(default="images", pattern=NAME_PATTERN, max_length=100)
    size: int = Field(default=512, ge=16, le=8192)
    patch_size: int = Field(default=16, ge=4, multiple_of=4)
    shard_bytes: int = Field(default=256 << 20, gt=0)
    jobs: int = Field(default=0, ge=0)
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    keep_names: bool = False
    state: Path | None = None
    salt: str | None = Field(default=None, min_length=16)
    retry_quarantined: bool = False
    metrics: MetricsConfig = MetricsConfig()
    hf: dict[str, Any] = Field(default_factory=dict)
    intensity: dict[str, Any] = Field(default_factory=dict)
    labels: str = "none"
    label_columns: tuple[str, ...] = ("label", "split")
    patient_column: str = "patient"
    splits: tuple[str, ...] = ()
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, gt=0)
    min_side: int = Field(default=64, ge=1)
    min_std: float = Field(default=1.0, ge=0)
    slice_axis: Literal["axial", "coronal", "sagittal"] = "axial"
    hdf5_key: str = Field(default="data", min_length=1)
    tile_size: int = Field(default=512, ge=16)
    tile_mpp: float | None = Field(default=None, gt=0)
    min_tissue: float = Field(default=0.1, ge=0, le=1)

    @field_validator("modality")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in MODALITIES:
            raise ValueError(f"not one of {', '.join(MODALITIES)}")
        return name

    @model_validator(mode="after")
    def _has_whole_patches(self) -> BuildConfig:
        if min(self.size, self.min_side) < self.patch_size:
            raise ValueError("size and min_side must be at least patch_size")
        return self

    @model_validator(mode="after")
    def _has_known_changes(self) -> BuildConfig:
        """Says what is wrong with `hf` and `intensity` at once, not after hours of listing."""
        self.hf_params(), self.intensity_rule()
        return self

    @property
    def map_cell(self) -> int:
        """Cell of the response map, in pixels."""
        return self.patch_size // 4

    def hf_params(self) -> HFParams:
        """The modality's HF parameters with the changes."""
        return validate(HFParams, find_modality(self.modality).hf.model_dump() | self.hf, where="hf")

    def intensity_rule(self) -> IntensityRule:
        """The modality's intensity rule with the changes."""
        rule = find_modality(self.modality).intensity
        return validate(IntensityRule, rule.model_dump() | self.intensity, where="intensity")

    def read_options(self) -> ReadOptions:
        """How objects are read."""
        return ReadOptions(**{name: getattr(self, name) for name in ReadOptions.model_fields})

    def published_settings(self) -> dict[str, Any]:
        """What determines the bytes: neither places nor secrets."""
        settings = self.model_dump(mode="json", exclude=_UNPUBLISHED)
        settings["hf"] = self.hf_params().model_dump(mode="json")
        settings["intensity"] = self.intensity_rule().model_dump(mode="json")
        settings["labels"] = self.labels if self.labels in ("none", "folder") else "table"
        return settings

    def source_facts(self) -> SourceFacts:
        """What a dataset says of the source."""
        return SourceFacts(
            modality=self.modality,
            source=self.source,
            settings=self.published_settings(),
            hf=self.hf_params(),
            map_cell=self.map_cell,
        )

    def sample_spec(self) -> SampleSpec:
        """How a unit becomes a sample."""
        return SampleSpec(
            modality=self.modality,
            source=self.source,
            size=self.size,
            patch_size=self.patch_size,
            map_cell=self.map_cell,
            hf=self.hf_params(),
            intensity=self.intensity_rule(),
            read=self.read_options(),
            min_side=self.min_side,
            min_std=self.min_std,
            keep_names=self.keep_names,
        )

"""What a volume head found, for files and for people."""

from __future__ import annotations

from typing import Any

from frepa_dist.evaluate.grouping import Units
from frepa_dist.evaluate.leakage import NOT_CHECKED
from frepa_dist.evaluate.volume_training import VolumeTraining
from frepa_dist.models.volume import VolumeSettings
from shards.support.settings import Settings


class HeadResult(Settings):
    """What a head does on the test part.

    Attributes:
        auroc: of several classes, the mean of one against the rest; `auroc_low` to `auroc_high` is its 95%
            bootstrap interval (percentiles).
        accuracy: share of volumes whose class is the likeliest one; with its interval likewise.
        train_accuracy: the same on the training part, to tell a head that cannot from one that overfits.
        num_parameters: that learned.
        seconds: of training.
        seconds_per_volume: of the test part; with a frozen encoder, from stored maps.
        scores: (n, K) of the test volumes.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    train_accuracy: float
    num_parameters: int
    seconds: float
    seconds_per_volume: float
    scores: list[list[float]]


class VolumeResult(Settings):
    """What a volume head found, and how.

    Attributes:
        encoder: the 2D encoder.
        dataset: where the shards lie; `snapshot` is which of its states.
        label_column: name of the label.
        classes: names, sorted; of two, the AUROC is that of the second.
        num_train, num_test: volumes of each class.
        num_left_out: volumes without the label.
        num_slices: least, median and most slices of a volume.
        num_missing: gaps in the numbers of all its volumes together.
        split: "given", or "made" with the seed.
        resampled: what the bootstrap draws; volumes that share slices are drawn together.
        num_test_groups: how many of these there are.
        test_y: (n,) classes of the test volumes, by number; `test_groups` are what is drawn together.
        majority: accuracy of always naming the most frequent class of the training part.
        settings: of the head; `training`: how it was trained.
        train_encoder: whether the 2D encoder learned too.
        encode_seconds_per_volume: of a frozen encoder over all slices, reading included; else None.
        volume: the head with attention between slices.
        control: the head without.
        smoke_test: the labels mean nothing medical.
        leakage: whether volumes were in the pretraining data, in words.
    """

    encoder: str
    dataset: str
    snapshot: str
    label_column: str
    classes: list[str]
    num_train: list[int]
    num_test: list[int]
    num_left_out: int
    num_slices: tuple[int, float, int]
    num_missing: int
    split: str
    resampled: Units
    num_test_groups: int
    test_y: list[int]
    test_groups: list[int]
    num_resamples: int
    majority: float
    settings: VolumeSettings
    training: VolumeTraining
    train_encoder: bool
    encode_seconds_per_volume: float | None
    volume: HeadResult
    control: HeadResult
    smoke_test: bool
    leakage: str = NOT_CHECKED

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{name:<23} AUROC {r.auroc:.3f} [{r.auroc_low:.3f}, {r.auroc_high:.3f}]  accuracy "
            f"{r.accuracy:.3f} [{r.accuracy_low:.3f}, {r.accuracy_high:.3f}]"
            for name, r in (("with other slices", self.volume), ("each slice alone (2D)", self.control))
        ]
        classes = ", ".join(
            f"{name} {train} + {test}"
            for name, train, test in zip(self.classes, self.num_train, self.num_test, strict=True)
        )
        lines.append(f"the most frequent class{'':<36} accuracy {self.majority:.3f}")
        lines.append(f"volumes (train + test): {classes}; split {self.split}; {self.num_left_out} left out")
        lines.append(f"leakage: {self.leakage}")
        if self.smoke_test:
            lines.append("a smoke test: these labels compare no methods")
        return "\n".join(lines)

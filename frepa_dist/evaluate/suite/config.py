"""The settings of a suite: which encoders, which tasks, and how all of them are measured.

A task has the settings that its command has, under the same names; here they are taken from the models that
the commands use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from frepa_dist.evaluate.cka import CkaConfig
from frepa_dist.evaluate.classifiers import Classifier
from frepa_dist.evaluate.degrade import Degradation
from frepa_dist.evaluate.dense import DenseTraining
from frepa_dist.evaluate.detect import DetectSettings
from frepa_dist.evaluate.extract import Extraction
from frepa_dist.evaluate.highpass import CUTOFFS
from frepa_dist.evaluate.label_curve import SHARES
from frepa_dist.evaluate.layer_cka import LayerCkaConfig
from frepa_dist.evaluate.layer_spectra import SpectraConfig
from frepa_dist.evaluate.pairs import Columns
from frepa_dist.evaluate.probe import Head
from frepa_dist.evaluate.restore_head import RestoreTraining
from frepa_dist.evaluate.suite.published import find_published
from frepa_dist.evaluate.task import ProbeTask
from frepa_dist.evaluate.token_pca import TokenPcaConfig
from frepa_dist.evaluate.volume_training import VolumeTraining
from frepa_dist.models.volume import VolumeSettings
from shards.hf.modalities import MODALITIES
from shards.read.windows import WindowName
from shards.support.errors import ConfigError
from shards.support.settings import Settings, apply_overrides, read_config, validate

Training = dict[str, bool | int | float | str | None]
"""Settings of a head that is trained by steps, as `--train` of a probe takes them."""

HAS_SEED = dict.fromkeys(("segment", "detect", "restore", "volume"), "training") | dict.fromkeys(
    ("cka", "layer-cka", "layer-spectra", "token-pca"), "config"
)
"""Where the seed of a task stands, if not in the task itself."""


def _in_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class EncoderEntry(Settings):
    """One way to pretrain, by the encoders that it gave.

    Attributes:
        name: in tables and figures.
        sources: one for each seed of the pretraining, in the same order for all encoders; a single one may
            stand alone. What may stand here says `features.SOURCES`.
        baseline: differences are against this one; without any, against the first.
        family: encoders of one family that differ in the number of images make a curve.
        pretraining_images: how many there were; None takes them from the dataset of a run.
        pretrained_on: their modalities; None takes them from the dataset of a run.
    """

    name: str = Field(min_length=1)
    sources: tuple[str, ...] = Field(min_length=1)
    baseline: bool = False
    family: str | None = None
    pretraining_images: int | None = Field(default=None, ge=1)
    pretrained_on: tuple[str, ...] | None = None

    _one_is_enough = field_validator("sources", "pretrained_on", mode="before")(_in_tuple)


class TaskEntry(Settings):
    """What every task has.

    Attributes:
        name: in tables and figures.
        modality: of the images; an encoder that was pretrained on others only is marked "unseen".
        published: keys of published figures to print beside (`published.yaml`).
    """

    name: str = Field(min_length=1)
    modality: str | None = None
    published: tuple[str, ...] = ()

    _one_is_enough = field_validator("published", mode="before")(_in_tuple)


class ProbeEntry(ProbeTask, TaskEntry):
    """`frepa evaluate probe`; see `ProbeTask`."""

    kind: Literal["probe"]
    head: Head = "logistic"
    training: Training = Field(default_factory=dict)


class LabelCurveEntry(ProbeTask, TaskEntry):
    """`frepa evaluate label-curve`; see `run_label_curve`."""

    kind: Literal["label-curve"]
    head: Classifier = "logistic"
    training: Training = Field(default_factory=dict)
    shares: tuple[float, ...] = SHARES
    num_draws: int = Field(default=5, ge=1)


class TokensEntry(ProbeTask, TaskEntry):
    """`frepa evaluate tokens`; see `run_token_probe`."""

    kind: Literal["tokens"]
    head: Classifier = "logistic"
    training: Training = Field(default_factory=dict)
    keep: float = Field(default=0.25, gt=0, lt=1)
    num_permutations: int = Field(default=2000, ge=1)


class MasksEntry(TaskEntry):
    """What tasks with masks have; `masks` is the table of `pairs.read_masked`."""

    images: Path
    masks: Path
    columns: Columns = Columns()
    training: DenseTraining = DenseTraining()
    num_resamples: int = Field(default=1000, ge=1)


class SegmentEntry(MasksEntry):
    """`frepa evaluate segment`."""

    kind: Literal["segment"]


class DetectEntry(MasksEntry):
    """`frepa evaluate detect`; see `DetectSettings`."""

    kind: Literal["detect"]
    count: DetectSettings = DetectSettings()
    keep_empty: bool = True


class RestoreEntry(TaskEntry):
    """`frepa evaluate restore`; `labels` is the table of `pairs.read_split`."""

    kind: Literal["restore"]
    images: Path
    labels: Path | None = None
    degradation: Degradation = Degradation()
    training: RestoreTraining = RestoreTraining()
    num_resamples: int = Field(default=1000, ge=1)


class HighPassEntry(ProbeTask, TaskEntry):
    """`frepa evaluate high-pass`; see `run_highpass`."""

    kind: Literal["high-pass"]
    cutoffs: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=CUTOFFS, min_length=2)


class CkaEntry(TaskEntry):
    """`frepa evaluate cka`; see `CkaConfig`."""

    kind: Literal["cka"]
    images: str
    config: CkaConfig = CkaConfig()


class LayerCkaEntry(TaskEntry):
    """`frepa evaluate layer-cka` of each encoder with itself; see `LayerCkaConfig`."""

    kind: Literal["layer-cka"]
    images: str
    config: LayerCkaConfig = LayerCkaConfig()


class TokenPcaEntry(TaskEntry):
    """`frepa evaluate token-pca`; see `TokenPcaConfig`."""

    kind: Literal["token-pca"]
    images: str
    config: TokenPcaConfig = TokenPcaConfig()


class ReconstructEntry(TaskEntry):
    """`frepa evaluate reconstruct`; its encoders are runs, for it takes their decoders too."""

    kind: Literal["reconstruct"]
    images: str
    num: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)


class SpectraEntry(TaskEntry):
    """`frepa evaluate layer-spectra`; see `SpectraConfig`."""

    kind: Literal["layer-spectra"]
    images: str
    config: SpectraConfig = SpectraConfig()
    num_resamples: int = Field(default=1000, ge=1)


class VolumeEntry(TaskEntry):
    """`frepa evaluate volume`; `images` is a dataset of volumes. See `run_volume`."""

    kind: Literal["volume"]
    images: str
    label_column: str = "label"
    window: WindowName | None = None
    train_encoder: bool = False
    head: VolumeSettings = VolumeSettings()
    training: VolumeTraining = VolumeTraining()
    num_resamples: int = Field(default=1000, ge=1)
    smoke_test: bool = False


Entry = Annotated[
    ProbeEntry
    | LabelCurveEntry
    | TokensEntry
    | SegmentEntry
    | DetectEntry
    | RestoreEntry
    | HighPassEntry
    | CkaEntry
    | LayerCkaEntry
    | ReconstructEntry
    | SpectraEntry
    | TokenPcaEntry
    | VolumeEntry,
    Field(discriminator="kind"),
]


class SuiteConfig(Extraction):
    """Encoders and tasks; see `Extraction` for how features are computed.

    Attributes:
        output: folder of the results, the tables and the page.
        title: of the page.
        encoders, tasks: each with a name of its own.
        allow_leakage: go on where test images were in a run's pretraining data; the page says so.
        states: private folders of the builds of those data.
        seed: of every task that does not set its own, and of the tests.
        num_resamples: of every bootstrap, as far as a task does not set its own.
        num_permutations: of each paired test, as far as a task does not set its own.
        num_pictures: test images that tasks with pictures show, the first ones.
    """

    output: Path
    title: str = "Evaluation"
    encoders: tuple[EncoderEntry, ...] = Field(min_length=1)
    tasks: tuple[Entry, ...] = Field(min_length=1)
    allow_leakage: bool = False
    states: tuple[Path, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**32)
    num_resamples: int = Field(default=1000, ge=1)
    num_permutations: int = Field(default=2000, ge=1)
    num_pictures: int = Field(default=3, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _share(cls, data: Any) -> Any:
        """Give what holds for all to the tasks that say nothing else."""
        if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), list | tuple):
            return data
        return {**data, "tasks": [_with_shared(task, data) for task in data["tasks"]]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, names in (
            ("encoders", [encoder.name for encoder in self.encoders]),
            ("tasks", [task.name for task in self.tasks]),
        ):
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                raise ValueError(f"two {what} are called '{repeated[0]}'")
        if sum(encoder.baseline for encoder in self.encoders) > 1:
            raise ValueError("more than one encoder is the baseline")
        named = [task.modality for task in self.tasks]
        named += [name for encoder in self.encoders for name in encoder.pretrained_on or ()]
        unknown = {name for name in named if name is not None} - set(MODALITIES)
        if unknown:
            raise ValueError(
                f"no such modality: {', '.join(sorted(unknown))} (known: {', '.join(MODALITIES)})"
            )
        return self

    @property
    def baseline(self) -> EncoderEntry:
        """What differences are against."""
        return next((encoder for encoder in self.encoders if encoder.baseline), self.encoders[0])

    @property
    def extraction(self) -> Extraction:
        """How features are computed."""
        return Extraction(**{name: getattr(self, name) for name in Extraction.model_fields})


def _with_shared(task: Any, shared: Mapping[str, Any]) -> Any:
    if not isinstance(task, Mapping):
        return task
    filled, kind = dict(task), task.get("kind")
    if "num_resamples" in shared and kind not in ("cka", "layer-cka", "reconstruct", "token-pca"):
        filled.setdefault("num_resamples", shared["num_resamples"])
    if "num_permutations" in shared and kind == "tokens":
        filled.setdefault("num_permutations", shared["num_permutations"])
    if "seed" in shared:
        group = HAS_SEED.get(str(kind))
        inner = filled.get(group, {}) if group else filled
        if group and isinstance(inner, Mapping):
            filled[group] = {"seed": shared["seed"], **inner}
        elif not group:
            filled.setdefault("seed", shared["seed"])
    return filled


def read_suite(name: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read the config of a suite.

    Raises:
        ConfigError: with every problem named.
    """
    config = validate(SuiteConfig, apply_overrides(read_config(name), overrides), where=name)
    for task in config.tasks:
        for key in task.published:
            find_published(key)
    return config


def choose_tasks(config: SuiteConfig, only: Sequence[str]) -> list[str]:
    """Names of the tasks to run.

    Raises:
        ConfigError: there is no such task.
    """
    names = [task.name for task in config.tasks]
    for name in only:
        if name not in names:
            raise ConfigError(f"no task '{name}'", where="--only", allowed=", ".join(names))
    return [name for name in names if not only or name in only]

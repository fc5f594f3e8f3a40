"""Runs each kind of task of a suite, through the function that its command calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frepa_dist.evaluate.cka import run_cka
from frepa_dist.evaluate.detect import run_detect
from frepa_dist.evaluate.extract import Extraction
from frepa_dist.evaluate.highpass import run_highpass
from frepa_dist.evaluate.label_curve import run_label_curve
from frepa_dist.evaluate.layer_cka import run_layer_cka
from frepa_dist.evaluate.layer_spectra import run_layer_spectra
from frepa_dist.evaluate.overlays import Gallery
from frepa_dist.evaluate.probe import run_probe
from frepa_dist.evaluate.reconstruct import run_reconstruct
from frepa_dist.evaluate.restore import run_restore
from frepa_dist.evaluate.segment import run_segment
from frepa_dist.evaluate.suite.config import (
    CkaEntry,
    DetectEntry,
    HighPassEntry,
    LabelCurveEntry,
    LayerCkaEntry,
    ProbeEntry,
    ReconstructEntry,
    RestoreEntry,
    SegmentEntry,
    SpectraEntry,
    TokenPcaEntry,
    TokensEntry,
    Training,
    VolumeEntry,
)
from frepa_dist.evaluate.token_pca import run_token_pca
from frepa_dist.evaluate.token_probe import run_token_probe
from frepa_dist.evaluate.volume import run_volume
from shards.support.settings import Settings, dump_yaml


@dataclass(frozen=True)
class Given:
    """What all tasks are run with.

    Attributes:
        extraction: how features are computed, and on which device.
        allow_leakage, states: see `leakage.check_leakage`.
        num_pictures: test images whose pictures are wanted.
        gallery: where they are put.
    """

    extraction: Extraction
    allow_leakage: bool
    states: tuple[Path, ...]
    num_pictures: int
    gallery: Gallery

    @property
    def leakage(self) -> dict[str, Any]:
        """Arguments about leakage."""
        return {"allow_leakage": self.allow_leakage, "states": self.states}

    @property
    def dense(self) -> dict[str, Any]:
        """Arguments of tasks on maps."""
        shown = {"gallery": self.gallery, "chosen": range(self.num_pictures)} if self.num_pictures else {}
        return {"device": self.extraction.device, **shown, **self.leakage}


def _overrides(training: Training) -> list[str]:
    return [f"{key}={dump_yaml(value).splitlines()[0]}" for key, value in training.items()]


def _probe(task: ProbeEntry, encoder: str, given: Given) -> Settings:
    extraction = given.extraction
    if task.head == "finetune":  # an encoder that learns has no features to keep, and learns on one rank
        extraction = extraction.model_copy(update={"cache": None, "num_ranks": 1})
    train = _overrides(task.training)
    return run_probe(encoder, task, head=task.head, train=train, extraction=extraction, **given.leakage)


def _label_curve(task: LabelCurveEntry, encoder: str, given: Given) -> Settings:
    return run_label_curve(
        encoder,
        task,
        head=task.head,
        train=_overrides(task.training),
        shares=task.shares,
        num_draws=task.num_draws,
        extraction=given.extraction,
        **given.leakage,
    )


def _tokens(task: TokensEntry, encoder: str, given: Given) -> Settings:
    return run_token_probe(
        encoder,
        task,
        keep=task.keep,
        num_permutations=task.num_permutations,
        head=task.head,
        train=_overrides(task.training),
        extraction=given.extraction,
        **given.leakage,
    )


def _segment(task: SegmentEntry, encoder: str, given: Given) -> Settings:
    return run_segment(
        encoder,
        task.images,
        task.masks,
        columns=task.columns,
        training=task.training,
        num_resamples=task.num_resamples,
        **given.dense,
    )


def _detect(task: DetectEntry, encoder: str, given: Given) -> Settings:
    return run_detect(
        encoder,
        task.images,
        task.masks,
        columns=task.columns,
        settings=task.count,
        training=task.training,
        keep_empty=task.keep_empty,
        num_resamples=task.num_resamples,
        **given.dense,
    )


def _restore(task: RestoreEntry, encoder: str, given: Given) -> Settings:
    return run_restore(
        encoder,
        task.images,
        task.labels,
        degradation=task.degradation,
        training=task.training,
        num_resamples=task.num_resamples,
        **given.dense,
    )


def _highpass(task: HighPassEntry, encoder: str, given: Given) -> Settings:
    device = given.extraction.device
    return run_highpass(encoder, task, cutoffs=task.cutoffs, device=device, **given.leakage)


def _cka(task: CkaEntry, encoder: str, given: Given) -> Settings:
    device = given.extraction.device
    return run_cka(encoder, task.images, modality=task.modality, device=device, **task.config.model_dump())


def _layer_cka(task: LayerCkaEntry, encoder: str, given: Given) -> Settings:
    device = given.extraction.device
    return run_layer_cka(encoder, task.images, config=task.config, modality=task.modality, device=device)


def _token_pca(task: TokenPcaEntry, encoder: str, given: Given) -> Settings:
    gallery: Gallery = []
    result = run_token_pca(
        encoder,
        task.images,
        config=task.config,
        modality=task.modality,
        device=given.extraction.device,
        gallery=gallery,
    )
    given.gallery.extend(gallery[: given.num_pictures])
    return result


def _reconstruct(task: ReconstructEntry, encoder: str, given: Given) -> Settings:
    return run_reconstruct(
        Path(encoder),
        task.images,
        num=task.num,
        seed=task.seed,
        modality=task.modality,
        device=given.extraction.device,
    )


def _spectra(task: SpectraEntry, encoder: str, given: Given) -> Settings:
    return run_layer_spectra(
        encoder,
        task.images,
        config=task.config,
        modality=task.modality,
        device=given.extraction.device,
        num_resamples=task.num_resamples,
    )


def _volume(task: VolumeEntry, encoder: str, given: Given) -> Settings:
    return run_volume(
        encoder,
        task.images,
        task.label_column,
        modality=task.modality,
        window=task.window,
        train_encoder=task.train_encoder,
        settings=task.head,
        training=task.training,
        num_resamples=task.num_resamples,
        device=given.extraction.device,
        smoke_test=task.smoke_test,
        **given.leakage,
    )


RUNNERS: Mapping[str, Callable[[Any, str, Given], Settings]] = {
    "probe": _probe,
    "label-curve": _label_curve,
    "tokens": _tokens,
    "segment": _segment,
    "detect": _detect,
    "restore": _restore,
    "high-pass": _highpass,
    "cka": _cka,
    "layer-cka": _layer_cka,
    "reconstruct": _reconstruct,
    "layer-spectra": _spectra,
    "token-pca": _token_pca,
    "volume": _volume,
}
"""By kind of task: from the task and the source of an encoder to a result of `readings.READERS`."""

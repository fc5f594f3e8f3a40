"""Probes: a classifier on frozen features, or the encoder fine-tuned, judged on images it has not seen.

The papers' protocol is the logistic regression. Features are standardized by the training part; what a head
chooses it chooses by cross-validation inside the training part; the test part is used once. Where patients
are known, no patient is on two sides of any split, and the bootstrap draws patients, since two eyes of one
are no two independent images; so with the slices of a volume, and with images that are equal.

Shapes: n images, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frepa_dist.evaluate.classifiers import Classifier, Features, LinearTraining, fit_classifier
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.extract import Extraction, extract, refuse_launcher
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.finetune import FineTuning, finetune, predict
from frepa_dist.evaluate.leakage import check_leakage
from frepa_dist.evaluate.pictures import FilePictures, ShardPictures
from frepa_dist.evaluate.probe_result import ProbeResult, Transfer, estimate, image_scores
from frepa_dist.evaluate.scores import Float64
from frepa_dist.evaluate.task import Parts, ProbeTask, read_parts
from shards.support.errors import ConfigError
from shards.support.settings import apply_overrides, validate

Head = Literal[Classifier, "finetune"]


@dataclass(frozen=True)
class Judged:
    """What a head said of the test part.

    Attributes:
        scores: (n, K).
        head: which head.
        chosen, at_edge, inner_auroc, training, num_parameters: see `ProbeResult`.
    """

    scores: Float64
    head: str
    chosen: dict[str, float]
    at_edge: bool = False
    inner_auroc: float | None = None
    training: dict[str, Any] | None = None
    num_parameters: int | None = None


def run_probe(
    encoder: str,
    task: ProbeTask,
    *,
    head: Head = "logistic",
    train: Sequence[str] = (),
    extraction: Extraction | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> ProbeResult:
    """Probe an encoder on labeled images.

    Args:
        encoder: see `features.SOURCES`.
        task: the images, and what is to be told.
        head: what stands on the encoder.
        train: overrides of the training of `linear` (`LinearTraining`) or `finetune` (`FineTuning`).
        extraction: how features are computed; of `finetune` the device and the batch of the test part.
        allow_leakage: go on where test images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or labels.
    """
    refuse_launcher()
    extraction = extraction or Extraction()
    tuning = _fine_tuning(train, task.seed) if head == "finetune" else None
    training = None if head == "finetune" else linear_training(head, train, task.seed)
    if tuning is not None and (extraction.cache is not None or extraction.num_ranks > 1):
        raise ConfigError(
            "an encoder that learns has no features to keep, and learns on one rank",
            where="--head finetune",
            fix="leave --cache and --num-ranks out",
        )
    parts = read_parts(task)
    leakage = find_leaks(encoder, parts, allow_leakage, states)
    loaded = load_encoder(encoder, extraction.device)
    if tuning is not None:
        judged = judge_finetuned(loaded, parts, tuning, extraction)
    else:
        assert head != "finetune"
        x, test_x = extract_parts(encoder, loaded, parts, extraction)
        judged = judge_features(head, x, test_x, parts, task.seed, training)
    return probe_result(loaded.name, task, parts, judged).model_copy(update={"leakage": leakage})


def find_leaks(encoder: str, parts: Parts, allow: bool, states: Sequence[Path]) -> str:
    """Say whether pictures of the test part were in the pretraining data of a run.

    Raises:
        DataError: some were, and that is not allowed.
    """
    pictures = parts.test.pictures
    given: dict[str, Any] = {"allow": allow, "states": states, "tested": parts.is_test.tolist()}
    if isinstance(pictures, FilePictures):
        files = [pictures.folder / name for name in pictures.names]
        patients = parts.test.patients
        return check_leakage(encoder, files, images=pictures.folder, patients=patients, **given)
    assert isinstance(pictures, ShardPictures)
    return check_leakage(encoder, pictures.stored(), images=pictures.where, **given)


def linear_training(head: Classifier, overrides: Sequence[str], seed: int) -> LinearTraining | None:
    """Settings of the head `linear`, None for those that are not trained by steps.

    Raises:
        ConfigError: a setting is unknown, or the head has none.
    """
    if head == "linear":
        return validate(LinearTraining, apply_overrides({"seed": seed}, overrides), where="--train")
    if overrides:
        raise ConfigError(
            f"the head '{head}' is not trained by steps",
            where=f"--train {overrides[0]}",
            allowed="settings of the heads linear and finetune",
        )
    return None


def _fine_tuning(overrides: Sequence[str], seed: int) -> FineTuning:
    return validate(FineTuning, apply_overrides({"seed": seed}, overrides), where="--train")


def extract_parts(
    source: str, encoder: Encoder, parts: Parts, extraction: Extraction
) -> tuple[Features, Features]:
    """Features of all pictures of both sets, the same array where they are one."""
    x = extract(source, parts.train.pictures, extraction, encoder=encoder)
    if parts.test is parts.train:
        return x, x
    return x, extract(source, parts.test.pictures, extraction, encoder=encoder)


def judge_features(
    head: Classifier,
    x: Features,
    test_x: Features,
    parts: Parts,
    seed: int,
    training: LinearTraining | None = None,
    *,
    silent: bool = False,
) -> Judged:
    """Fit a head to features of the training part, and let it score the test part.

    Args:
        head: which.
        x: (n, D) of all pictures of `parts.train`.
        test_x: of all pictures of `parts.test`.
        parts: which of them are learned from, and which are judged.
        seed: of the folds.
        training: of `linear`.
        silent: show no progress.

    Raises:
        DataError: there are too few images of a class to choose by.
    """
    fitted = fit_classifier(head, x[parts.is_train], parts.y, parts.groups, seed, training, silent=silent)
    return Judged(
        scores=fitted.scores(test_x[parts.is_test]),
        head=head,
        chosen=fitted.chosen,
        at_edge=fitted.at_edge,
        inner_auroc=fitted.inner_auroc,
        training=None if training is None else training.model_dump(mode="json"),
        num_parameters=(x.shape[1] + 1) * len(parts.train.classes) if head == "linear" else None,
    )


def judge_finetuned(encoder: Encoder, parts: Parts, training: FineTuning, extraction: Extraction) -> Judged:
    """Fine-tune an encoder, which has other weights afterwards, and let it score the test part.

    Raises:
        ConfigError: the encoder does not show its weights.
        DivergedError: the loss is no number.
    """
    data = parts.train
    chosen, asked = np.flatnonzero(parts.is_train), np.flatnonzero(parts.is_test)
    tuned = finetune(encoder, data.pictures, chosen, data.y, len(data.classes), training)
    return Judged(
        scores=predict(tuned, parts.test.pictures, asked, extraction.batch_size),
        head="finetune",
        chosen={},
        training=training.model_dump(mode="json"),
        num_parameters=tuned.num_parameters,
    )


def probe_result(encoder: str, task: ProbeTask, parts: Parts, judged: Judged) -> ProbeResult:
    """Measure what a head said of the test part.

    Args:
        encoder: its name.
        task: what was to be told.
        parts: of the images.
        judged: what the head said.
    """
    data, test = parts.train, parts.test
    return ProbeResult(
        encoder=encoder,
        images=data.pictures.where,
        label_column=data.label_column,
        classes=data.classes,
        are_grades=task.are_grades,
        num_train=data.counts(parts.is_train),
        num_test=test.counts(parts.is_test),
        num_left_out=data.num_left_out + (0 if test is data else test.num_left_out),
        split=parts.split,
        transfer=None
        if test is data
        else Transfer(images=test.pictures.where, label_column=test.label_column),
        head=judged.head,
        chosen=judged.chosen,
        at_edge=judged.at_edge,
        inner_auroc=judged.inner_auroc,
        training=judged.training,
        num_parameters=judged.num_parameters,
        resampled=test.units,
        measures=estimate(
            judged.scores,
            parts.test_y,
            parts.test_groups,
            are_grades=task.are_grades,
            num_resamples=task.num_resamples,
            seed=task.seed,
        ),
        num_resamples=task.num_resamples,
        seed=task.seed,
        smoke_test=task.smoke_test,
        test=image_scores(test, parts.is_test, judged.scores),
    )

"""Lesions found with a frozen encoder: by a trained decoder, or by a linear probe that only knew of images.

`decoder`: the light decoder of `evaluate.segment` learns masks; its logit is the heat.

`tokens`: a logistic regression of whole images, read token by token, is the heat (`evaluate.token_heat`): no
mask is learned from, so that it says what the tokens themselves hold where.

Shapes: H, W of an image, R rates of false positives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from frepa_dist.evaluate.dense import DenseTraining
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.image_measures import (
    ImageResult,
    draws_of_images,
    name_test,
    shown_places,
    summarize,
)
from frepa_dist.evaluate.leakage import check_split
from frepa_dist.evaluate.lesions import (
    RATES,
    Candidates,
    find_candidates,
    froc_by_image,
    froc_recalls,
    label_lesions,
    match_candidates,
    outline_measures,
)
from frepa_dist.evaluate.masks import Mask, mask_measures
from frepa_dist.evaluate.overlays import Gallery, fit_picture, overlay_heat, to_picture
from frepa_dist.evaluate.pairs import (
    Columns,
    MaskedImage,
    load_image,
    load_truth,
    number_patients,
    read_masked,
    read_patients,
)
from frepa_dist.evaluate.scores import auroc
from frepa_dist.evaluate.segment import predict_logits, train_decoder
from frepa_dist.evaluate.token_heat import fit_token_probe, predict_heat
from shards.formats.common import Pixels
from shards.support.errors import DataError
from shards.support.progress import track
from shards.support.settings import Settings

Source = Literal["decoder", "tokens"]
Heat = npt.NDArray[np.float32]
LEAST_LOGIT = 0.0  # of what is found: a probability of one half
CURVE_RATES = tuple(float(rate) for rate in np.geomspace(1 / 16, 16, 33))


class DetectSettings(Settings):
    """How lesions and candidates are counted; no public source states these.

    Attributes:
        source: where heat comes from.
        min_distance: least distance of two candidates along an axis, in pixels of the file.
        tolerance: pixels that a candidate may lie outside of a lesion.
        min_area: pixels of a lesion; smaller ones are neither to be found nor false alarms.
        max_false: candidates in no lesion that are kept of an image, the hottest ones.
        least_iou: overlap from which on an outline counts as found (`decoder` alone has outlines).
    """

    source: Source = "decoder"
    min_distance: int = Field(default=10, ge=1)
    tolerance: float = Field(default=0.0, ge=0)
    min_area: int = Field(default=1, ge=1)
    max_false: int = Field(default=100, ge=1)
    least_iou: float = Field(default=0.5, gt=0, le=1)


class DetectResult(ImageResult):
    """How well lesions are found.

    The measures of an image are `froc`, the mean over rates of the share of its lesions that are found at the
    thresholds of all images; `pointing`, whether the hottest pixel lies in a lesion; of the decoder those of
    `lesions.outline_measures`, and the IoU, Dice and AUROC of pixels (of tokens the last alone).

    Attributes:
        num_lesions: in the test images; `num_without` of these have none.
        rates: false positives per image.
        recalls: share of all lesions found at each; `froc` is the mean.
        recall_low, recall_high, froc_low, froc_high: 95% bootstrap intervals over images, or patients where
            they are known (percentiles).
        curve: recall at `CURVE_RATES`, to be drawn.
        image_auroc: of `tokens`, how well the mean heat of an image tells whether there is a lesion; None
            where all or no test images have one.
        settings: how lesions were counted.
        training: of the decoder; of the probe its tiles and its seed.
    """

    num_lesions: int
    num_without: int
    rates: list[float]
    recalls: list[float]
    recall_low: list[float]
    recall_high: list[float]
    froc: float
    froc_low: float
    froc_high: float
    curve: list[float]
    image_auroc: float | None
    settings: DetectSettings
    training: DenseTraining

    def describe(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.num_lesions} lesions in {len(self.names)} test images, {self.num_without} of them "
            f"without any; {self.num_train} to learn from; heat of the {self.settings.source}",
            f"FROC {self.froc:.3f}  [{self.froc_low:.3f}, {self.froc_high:.3f}]: mean of the recalls below",
        ]
        for rate, recall, low, high in zip(
            self.rates, self.recalls, self.recall_low, self.recall_high, strict=True
        ):
            lines.append(f"  {rate:5.3f} false positives per image: {recall:.3f}  [{low:.3f}, {high:.3f}]")
        for name, mean in self.mean.items():
            if name != "froc":
                lines.append(f"{name:<16} {mean:.3f}  [{self.low[name]:.3f}, {self.high[name]:.3f}]")
        if self.image_auroc is not None:
            lines.append(f"AUROC of images  {self.image_auroc:.3f}")
        lines.append(f"leakage: {self.leakage}")
        return "\n".join(lines)


def run_detect(
    encoder: str,
    images: Path,
    table: Path,
    *,
    columns: Columns | None = None,
    settings: DetectSettings | None = None,
    training: DenseTraining | None = None,
    keep_empty: bool = True,
    num_resamples: int = 1000,
    device: str | None = None,
    gallery: Gallery | None = None,
    chosen: Sequence[int] | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> DetectResult:
    """Learn where lesions are, and judge it lesion by lesion on images not seen.

    Args:
        encoder: see `features.SOURCES`.
        images: folder of the images.
        table: which masks they have (see `pairs.read_masked`).
        columns: what the columns of masks are called.
        settings: how lesions are counted.
        training: of the decoder.
        keep_empty: rows without a mask are images without any lesion; else they are left out.
        num_resamples: of the bootstrap.
        device: where it runs, None takes a GPU if there is one.
        gallery: where pictures of the best, the median and the worst test image are put.
        chosen: places of the test images to put there instead.
        allow_leakage: go on where images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or masks.
    """
    settings, training = settings or DetectSettings(), training or DenseTraining()
    pairs = read_masked(images, table, columns, seed=training.seed, keep_empty=keep_empty)
    split = [(pair.image, pair.is_test) for pair in pairs]
    leakage = check_split(encoder, split, images, table, allow=allow_leakage, states=states)
    to_learn, tests = ([pair for pair in pairs if pair.is_test == part] for part in (False, True))
    loaded = load_encoder(encoder, device)
    learners = number_patients(read_patients(images, table, [pair.image for pair in to_learn]))
    heat_of = learn_heat(loaded, to_learn, settings, training, learners)
    rows, found, means = [], [], []
    for pair in track(tests, total=len(tests), description="detect", unit="image"):
        truth, where = load_truth(pair)
        heat = _heat_of_file(heat_of, pair, training, truth.shape)
        row, candidates = judge_heat(heat, truth, where, settings)
        rows.append(row)
        found.append(candidates)
        means.append(float(heat.mean()))
    if not any(len(candidates.lesion_scores) for candidates in found):
        raise DataError("no test image has a lesion", where=table, fix="test on some that have")
    rows = [{"froc": froc, **row} for froc, row in zip(froc_by_image(found), rows, strict=True)]
    groups = number_patients(read_patients(images, table, [pair.image for pair in tests]))
    measures = summarize(rows, num_resamples, training.seed, groups)
    if gallery is not None:
        for word, place in shown_places(measures["by_image"]["froc"], chosen):
            words = name_test(place), f"{word}{rows[place]['froc']:.2f} found"
            gallery.append(_draw(heat_of, tests[place], training, words))
    recalls = froc_recalls(found)
    draws = draws_of_images(len(found), groups, num_resamples, training.seed)
    spread = np.array([froc_recalls([found[place] for place in drawn]) for drawn in draws])  # NaN: no lesion
    ends = np.nanpercentile(spread, [2.5, 97.5], axis=0)
    froc_ends = np.nanpercentile(spread.mean(axis=1), [2.5, 97.5])
    return DetectResult(
        encoder=loaded.name,
        images=str(images),
        names=[pair.image.name for pair in tests],
        **measures,
        num_lesions=sum(len(candidates.lesion_scores) for candidates in found),
        num_without=sum(not len(candidates.lesion_scores) for candidates in found),
        rates=list(RATES),
        recalls=recalls.tolist(),
        recall_low=ends[0].tolist(),
        recall_high=ends[1].tolist(),
        froc=float(recalls.mean()),
        froc_low=float(froc_ends[0]),
        froc_high=float(froc_ends[1]),
        curve=froc_recalls(found, CURVE_RATES).tolist(),
        image_auroc=_image_auroc(means, found) if settings.source == "tokens" else None,
        num_train=len(to_learn),
        settings=settings,
        training=training,
        leakage=leakage,
        groups=groups,
    )


def learn_heat(
    encoder: Encoder,
    to_learn: Sequence[MaskedImage],
    settings: DetectSettings,
    training: DenseTraining,
    groups: Sequence[int] | None = None,
) -> Callable[[Pixels], Heat]:
    """Learn to heat images (3, H, W) -> (H, W).

    Args:
        encoder: the frozen encoder.
        to_learn: training images.
        settings: where heat comes from.
        training: of the decoder.
        groups: patient of each training image, None where they are not known.

    Raises:
        DataError: something cannot be read, or the probe has nothing to tell apart.
        DivergedError: the loss of the decoder is no number.
    """
    if settings.source == "decoder":
        head = train_decoder(encoder, to_learn, training)
        return lambda image: predict_logits(encoder, head, image)
    probe = fit_token_probe(encoder, to_learn, training, settings.min_area, groups)
    return lambda image: predict_heat(encoder, probe, image)


def judge_heat(
    heat: Heat, truth: Mask, where: Mask, settings: DetectSettings
) -> tuple[dict[str, float], Candidates]:
    """Measure the heat of one image.

    Args:
        heat: (H, W); of a decoder, where it is above 0 something is found.
        truth: (H, W).
        where: (H, W), the pixels that count.
        settings: how lesions are counted.

    Returns:
        Measures by name (see `DetectResult.by_image`), and the candidates for the FROC.
    """
    lesions = label_lesions(truth & where, settings.min_area)
    too_small = truth & where & (lesions == 0)
    places, scores = find_candidates(heat, where, min_distance=settings.min_distance)
    candidates = match_candidates(
        places, scores, lesions, settings.tolerance, ignored=too_small, most_false=settings.max_false
    )
    pixels = mask_measures(heat, lesions > 0, where & ~too_small, threshold=LEAST_LOGIT)
    hottest = np.unravel_index(np.argmax(np.where(where & ~too_small, heat, -np.inf)), heat.shape)
    row = {"pointing": float(lesions[hottest] > 0) if lesions.any() else float("nan")}
    row["auroc"] = pixels["auroc"]
    if settings.source == "decoder":
        found = (heat >= LEAST_LOGIT) & where
        row |= {name: pixels[name] for name in ("dice", "iou")}
        row |= outline_measures(found, lesions, least_iou=settings.least_iou, ignored=too_small)
    return row, candidates


def _heat_of_file(
    heat_of: Callable[[Pixels], Heat], pair: MaskedImage, training: DenseTraining, shape: tuple[int, int]
) -> Heat:
    """Heat (H, W) at the size of the file, which is the shape."""
    heat = heat_of(load_image(pair.image, training.short_side))
    return np.asarray(cv2.resize(heat, shape[::-1], interpolation=cv2.INTER_LINEAR), np.float32)


def _draw(
    heat_of: Callable[[Pixels], Heat], pair: MaskedImage, training: DenseTraining, words: tuple[str, str]
) -> list[tuple[Pixels, str]]:
    image, (truth, where) = load_image(pair.image, None), load_truth(pair)
    drawn = overlay_heat(image, _heat_of_file(heat_of, pair, training, truth.shape), truth & where)
    return [(to_picture(image), words[0]), (fit_picture(drawn), words[1])]


def _image_auroc(means: Sequence[float], found: Sequence[Candidates]) -> float | None:
    is_there = np.array([len(candidates.lesion_scores) > 0 for candidates in found])
    return auroc(np.array(means), is_there) if not is_there.all() else None

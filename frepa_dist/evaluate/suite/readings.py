"""What the result of each kind of task says in a suite: its measures, and what the test images gave for each.

Pure functions of results: a measure that is added here needs nothing computed again.

Shapes: n test images, V looks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frepa_dist.evaluate.cka import NORMAL_95, CkaResult
from frepa_dist.evaluate.detect import DetectResult
from frepa_dist.evaluate.highpass import HighPassResult
from frepa_dist.evaluate.image_measures import ImageResult
from frepa_dist.evaluate.label_curve import LabelCurve
from frepa_dist.evaluate.layer_cka import LayerCkaResult
from frepa_dist.evaluate.layer_spectra import SpectraResult
from frepa_dist.evaluate.layers import LAST
from frepa_dist.evaluate.probe_result import SHOWN, Estimate, ProbeResult
from frepa_dist.evaluate.reconstruct import ReconstructionResult
from frepa_dist.evaluate.restore import RestoreResult
from frepa_dist.evaluate.segment import SegmentResult
from frepa_dist.evaluate.suite.panel import Panel, macro_auroc_of_many
from frepa_dist.evaluate.token_pca import TokenPcaResult
from frepa_dist.evaluate.token_probe import TokenResult
from frepa_dist.evaluate.volume_result import VolumeResult

IMAGE_MEASURES = {"dice": "Dice", "iou": "IoU", "cldice": "clDice", "auroc": "AUROC of pixels"} | {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "rmse": "RMSE",
}
BETTER_LOWER = ("rmse",)


@dataclass(frozen=True)
class Measured:
    """A measure of one encoder with one seed.

    Attributes:
        value: on the test part.
        low, high: its 95% interval, as the command gave it; None where there is none.
        is_up: whether more is better; None where neither is, as of similarities.
        panel: what each test image gave, of one seed; None where images one by one do not make the measure.
    """

    value: float
    low: float | None = None
    high: float | None = None
    is_up: bool | None = True
    panel: Panel | None = None


@dataclass(frozen=True)
class Reading:
    """What a result says.

    Attributes:
        measures: by name, the main one first: it stands in the summary, and differences are tested of it.
        leakage: whether test images were in the pretraining data, in words; None where nothing was learned
            from labels or masks.
        unit: what intervals draw: "images", "patients" or "volumes".
    """

    measures: dict[str, Measured]
    leakage: str | None
    unit: str

    @property
    def main(self) -> str:
        """Name of the main measure."""
        return next(iter(self.measures))


def _groups(groups: Sequence[int] | None, num: int) -> Any:
    return np.arange(num) if groups is None else np.array(groups, np.int64)


def _unit(groups: Sequence[int] | None) -> str:
    return "images" if groups is None else "patients"


def _scores_panel(result: ProbeResult, looks: Sequence[Sequence[Sequence[float]]]) -> Panel:
    """Scores (V, n, K) of the test part of a probe."""
    groups = _groups(result.test.groups, len(result.test.y))
    return Panel(np.array(looks, np.float64)[None], groups, np.array(result.test.y, np.int64))


def _values_panel(values: Sequence[float | None], groups: Sequence[int] | None) -> Panel:
    return Panel(np.array([values], np.float64), _groups(groups, len(values)))


def _estimate(found: Estimate, panel: Panel | None = None) -> Measured:
    return Measured(found.value, found.low, found.high, panel=panel)


def read_probe(result: ProbeResult) -> Reading:
    """The AUROC, and all other measures."""
    panels = {"auroc": _scores_panel(result, [result.test.scores])}
    measures = {SHOWN[name]: _estimate(found, panels.get(name)) for name, found in result.measures.items()}
    return Reading(measures, result.leakage, result.resampled)


def read_label_curve(result: LabelCurve) -> Reading:
    """The AUROC at each share of the labels, the smallest first."""
    measures = {
        f"AUROC, {100 * row.share:.4g}% of the labels": Measured(
            row.mean("auroc"), panel=_scores_panel(result.full, row.scores)
        )
        for row in result.rows
    }
    return Reading(measures, result.full.leakage, result.full.resampled)


def read_tokens(result: TokenResult) -> Reading:
    """The AUROC by tokens seen; HF tokens only are the main one."""
    measures = {
        f"AUROC, {name}": _estimate(row.auroc, _scores_panel(row, [row.test.scores]))
        for name, row in result.rows.items()
    }
    full = next(iter(result.rows.values()))
    main = next(name for name in measures if "HF tokens only" in name)
    return Reading({main: measures[main], **measures}, full.leakage, full.resampled)


def _read_images(result: ImageResult, main: str) -> dict[str, Measured]:
    """Means over test images, the main one first."""
    return {
        IMAGE_MEASURES.get(name, name.replace("_", " ")): Measured(
            result.mean[name],
            result.low[name],
            result.high[name],
            is_up=name not in BETTER_LOWER,
            panel=_values_panel(result.by_image[name], result.groups),
        )
        for name in (main, *(name for name in result.mean if name != main))
        if name in result.mean
    }


def read_segment(result: SegmentResult) -> Reading:
    """Dice and the others, means over images."""
    return Reading(_read_images(result, "dice"), result.leakage, _unit(result.groups))


def read_restore(result: RestoreResult) -> Reading:
    """PSNR and the others, means over images."""
    return Reading(_read_images(result, "psnr"), result.leakage, _unit(result.groups))


def read_detect(result: DetectResult) -> Reading:
    """The share of lesions found, image by image, then the FROC of all lesions together."""
    measures = {
        ("lesions found, mean over images" if name == "froc" else name): found
        for name, found in _read_images(result, "froc").items()
    }
    measures["FROC, all lesions"] = Measured(result.froc, result.froc_low, result.froc_high)
    return Reading(measures, result.leakage, _unit(result.groups))


def read_highpass(result: HighPassResult) -> Reading:
    """The mean AUROC over all high-passed images, then that at each cut-off."""
    y, groups = np.array(result.y, np.int64), _groups(result.groups, len(result.y))
    scores = np.array(result.scores, np.float64)
    filtered = np.flatnonzero(np.array(result.cutoffs) > 0)
    panel = Panel(scores[None, filtered], groups, y)
    measures = {"AUROC, mean of high-passed": Measured(float(panel.by_seed()[0]), panel=panel)}
    for place, cutoff in enumerate(result.cutoffs):
        name = f"AUROC, high-passed at {cutoff:g}" if cutoff else "AUROC, raw"
        value = float(macro_auroc_of_many(scores[place], y))
        low, high = result.auroc_low[place], result.auroc_high[place]
        measures[name] = Measured(value, low, high, panel=Panel(scores[None, [place]], groups, y))
    return Reading(measures, result.leakage, result.resampled)


def read_cka(result: CkaResult) -> Reading:
    """CKA of each part with the full image; the high-passed image is the main one."""
    several = len({row.modality for row in result.rows}) > 1
    measures = {}
    for row in result.rows:
        low, high = row.interval() or (None, None)
        name = f"CKA, {row.variant}" + (f", {row.modality}" if several else "")
        measures[name] = Measured(row.cka, low, high, is_up=None)
    main = next(name for name in measures if "high-passed" in name)
    return Reading({main: measures[main], **measures}, None, "images")


def read_layer_cka(result: LayerCkaResult) -> Reading:
    """CKA of the output with that of bands of frequencies, the highest band first."""
    measures = {}
    for row in result.rows:
        place = row.layers.index(LAST)
        for band, name in reversed(list(enumerate(row.bands))):
            value = row.band_cka[place][band]
            reach = None if row.band_error is None else NORMAL_95 * row.band_error[place][band]
            low, high = (None, None) if reach is None else (value - reach, min(1.0, value + reach))
            which = f", {row.modality}" if len(result.rows) > 1 else ""
            measures[f"CKA of the output, band {name}{which}"] = Measured(value, low, high, is_up=None)
    return Reading(measures, None, "images")


def read_token_pca(result: TokenPcaResult) -> Reading:
    """Share of the tokens' variance that the three colors hold."""
    measures = {
        "variance in three components" + (f", {row.modality}" if len(result.rows) > 1 else ""): Measured(
            sum(row.explained), is_up=None
        )
        for row in result.rows
    }
    return Reading(measures, None, "images")


def read_reconstruct(result: ReconstructionResult) -> Reading:
    """The error of detail by what was hidden, hidden patches first; what has another name is not compared."""
    several = len({row.modality for row in result.rows}) > 1
    measures = {}
    for row in result.rows:
        # of patches that are predicted normalized, mean and contrast are taken from the image
        name = ", ".join(
            (f"error of detail, {row.corruption}", *["tone from the image"] * bool(row.note))
            + (row.modality,) * several
        )
        if name not in measures:  # a method's own corruption may be a common one
            panel = _values_panel(row.by_image["high_band"], None)
            measures[name] = Measured(row.high_band.mean, is_up=False, panel=panel)
    main = next((name for name in measures if "patches hidden" in name), next(iter(measures)))
    return Reading({main: measures[main], **measures}, None, "images")


def read_spectra(result: SpectraResult) -> Reading:
    """Relative log-amplitude of the output at its map's highest frequency."""
    rows = [row for row in result.rows if row.layer == LAST]
    measures = {
        "log-amplitude at the highest frequency" + (f", {row.modality}" if len(rows) > 1 else ""): Measured(
            row.amplitude[-1], row.low, row.high, is_up=None, panel=_values_panel(row.by_image, None)
        )
        for row in rows
    }
    return Reading(measures, None, "images")


def read_volume(result: VolumeResult) -> Reading:
    """The AUROC of volumes with attention between slices, then that of the head without, and accuracies."""
    y, groups = np.array(result.test_y, np.int64), np.array(result.test_groups, np.int64)
    measures = {}
    for name, head in (("", result.volume), (", each slice alone", result.control)):
        panel = Panel(np.array(head.scores, np.float64)[None, None], groups, y)
        measures[f"AUROC{name}"] = Measured(head.auroc, head.auroc_low, head.auroc_high, panel=panel)
        measures[f"accuracy{name}"] = Measured(head.accuracy, head.accuracy_low, head.accuracy_high)
    return Reading(measures, result.leakage, result.resampled)


READERS: Mapping[str, tuple[type[Any], Callable[[Any], Reading]]] = {
    "probe": (ProbeResult, read_probe),
    "label-curve": (LabelCurve, read_label_curve),
    "tokens": (TokenResult, read_tokens),
    "segment": (SegmentResult, read_segment),
    "restore": (RestoreResult, read_restore),
    "detect": (DetectResult, read_detect),
    "high-pass": (HighPassResult, read_highpass),
    "cka": (CkaResult, read_cka),
    "layer-cka": (LayerCkaResult, read_layer_cka),
    "reconstruct": (ReconstructionResult, read_reconstruct),
    "layer-spectra": (SpectraResult, read_spectra),
    "token-pca": (TokenPcaResult, read_token_pca),
    "volume": (VolumeResult, read_volume),
}
"""By kind of task: the class of its results, and what reads them."""

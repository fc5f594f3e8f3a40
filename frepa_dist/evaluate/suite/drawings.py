"""What the page of a suite draws of one kind of task's results, encoders side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frepa_dist.evaluate.detect import CURVE_RATES, DetectResult
from frepa_dist.evaluate.highpass import HighPassResult
from frepa_dist.evaluate.label_curve import LabelCurve
from frepa_dist.evaluate.layer_cka import LayerCkaResult, LayerCkaRow
from frepa_dist.evaluate.layer_spectra import SpectraResult
from frepa_dist.evaluate.layers import LAST
from frepa_dist.evaluate.plots import Line, lines_figure, matrix_figure, share_figure
from frepa_dist.evaluate.probe_result import ProbeResult
from frepa_dist.evaluate.restore import RestoreResult
from frepa_dist.evaluate.segment import SegmentResult
from frepa_dist.evaluate.suite.readings import IMAGE_MEASURES
from frepa_dist.evaluate.token_probe import TokenResult
from frepa_dist.evaluate.volume_result import VolumeResult
from shards.support.page import Page


def _mean(results: Sequence[Any], values: Callable[[Any], Sequence[float]]) -> list[float]:
    return [float(value) for value in np.mean([values(result) for result in results], axis=0)]


def _named(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{IMAGE_MEASURES.get(name, name)} {value:.3f}" for name, value in measures.items())


def _tell_probe(page: Page, found: Mapping[str, Sequence[ProbeResult]]) -> None:
    first = next(iter(found.values()))[0]
    classes = zip(first.classes, first.num_train, first.num_test, strict=True)
    told = ", ".join(f"{name} {num_train} + {num_test}" for name, num_train, num_test in classes)
    judged = f"judged on {first.transfer.images}" if first.transfer else f"split {first.split}"
    left_out = f" {first.num_left_out} rows without a label, or of other classes, were left out."
    page.text(f"Images to learn from + to test on: {told}; {judged}.{left_out if first.num_left_out else ''}")


def _tell_tokens(page: Page, found: Mapping[str, Sequence[TokenResult]]) -> None:
    _tell_probe(page, {name: [next(iter(some[0].rows.values()))] for name, some in found.items()})


def _draw_label_curve(page: Page, found: Mapping[str, Sequence[LabelCurve]]) -> None:
    _tell_probe(page, {name: [curves[0].full] for name, curves in found.items()})
    lines = {}
    for name, curves in found.items():
        points: list[tuple[float, float, float | None]] = []
        for place, row in enumerate(curves[0].rows):
            means = [curve.rows[place].mean("auroc") for curve in curves]
            spread = float(np.std(means, ddof=1)) if len(means) > 1 else row.deviation("auroc")
            points.append((row.share, float(np.mean(means)), spread))
        lines[name] = points
    words = (
        "Lines reach one standard deviation up and down: over seeds; of one seed over draws of the labels."
    )
    page.figure(share_figure(lines, "AUROC"), words)


def _draw_highpass(page: Page, found: Mapping[str, Sequence[HighPassResult]]) -> None:
    lines = [
        Line(
            name,
            some[0].cutoffs,
            _mean(some, lambda result: result.auroc),
            some[0].auroc_low if len(some) == 1 else None,
            some[0].auroc_high if len(some) == 1 else None,
        )
        for name, some in found.items()
    ]
    label = "d0 of the high-pass, cycles per image side (0: raw)"
    figure = lines_figure(lines, xlabel=label, ylabel="AUROC", reference=0.5)
    page.figure(
        figure, "Mean over seeds; bands, of one seed: 95% intervals over test images. Dashed: chance."
    )


def _draw_detect(page: Page, found: Mapping[str, Sequence[DetectResult]]) -> None:
    lines = [Line(name, CURVE_RATES, _mean(some, lambda r: r.curve)) for name, some in found.items()]
    label = "false positives per image"
    figure = lines_figure(lines, xlabel=label, ylabel="lesions found", is_log=True, limits=(0.0, 1.0))
    first = next(iter(found.values()))[0]
    page.figure(figure, f"{first.num_lesions} lesions in {len(first.names)} test images; mean over seeds.")


def found_nothing(result: SegmentResult) -> bool:
    """Whether no pixel of any mask was found."""
    return result.mean.get("sensitivity") == 0


def _draw_segment(page: Page, found: Mapping[str, Sequence[SegmentResult]]) -> None:
    first = next(iter(found.values()))[0]
    page.text(f"{first.num_train} images to learn from, {len(first.names)} test images.")
    blind = [name for name, some in found.items() if any(found_nothing(result) for result in some)]
    if blind:
        page.note(
            f"The decoder on {', '.join(blind)} found nothing in any test image (of a seed): its training "
            "was too short, or failed. That is no finding about the encoder."
        )
    if first.observer:
        told = _named(first.observer)
        page.text(f"A second observer, on the same images: {told}.")


def _draw_restore(page: Page, found: Mapping[str, Sequence[RestoreResult]]) -> None:
    first = next(iter(found.values()))[0]
    told = _named(first.degraded)
    sees = "sees the degraded image too" if first.training.skip else "sees nothing but the encoder's maps"
    page.text(
        f"{first.degradation}; {first.num_train} images to learn from, {len(first.names)} test images. The "
        f"decoder {sees}. The degraded image itself: {told}."
    )


def _draw_spectra(page: Page, found: Mapping[str, Sequence[SpectraResult]]) -> None:
    depths, outputs = [], []
    modality = next(iter(found.values()))[0].rows[0].modality
    for name, some in found.items():
        rows = [[row for row in result.rows if row.modality == modality] for result in some]
        highest = _mean(rows, lambda layers: [row.amplitude[-1] for row in layers])
        depths.append(Line(name, list(np.linspace(0, 1, len(highest))), highest))
        last = [next(row for row in layers if row.layer == LAST) for layers in rows]
        outputs.append(Line(name, last[0].frequencies, _mean(last, lambda row: row.amplitude)))
    ylabel = "relative log-amplitude"
    figure = lines_figure(depths, xlabel="depth (0: first layer, 1: output)", ylabel=ylabel)
    page.figure(figure, f"{modality}: at the highest frequency of each layer's map; mean over seeds.")
    figure = lines_figure(outputs, xlabel="frequency / highest", ylabel=ylabel)
    page.figure(figure, f"{modality}: the output, frequency by frequency; mean over seeds.")


def _draw_layer_cka(page: Page, found: Mapping[str, Sequence[LayerCkaResult]]) -> None:
    first = next(iter(found.values()))[0].rows[0]
    chosen = {name: [_of_modality(result, first.modality) for result in some] for name, some in found.items()}
    words = f"{first.modality}, {first.num_images} images; mean over seeds."
    for band in (0, -1):
        lines = []
        for name, rows in chosen.items():
            values = np.mean([np.array(row.band_cka)[:, band] for row in rows], axis=0).tolist()
            lines.append(Line(name, list(np.linspace(0, 1, len(values))), values))
        label = f"CKA with the band {first.bands[band]}"
        figure = lines_figure(lines, xlabel="depth (0: first layer, 1: output)", ylabel=label)
        page.figure(figure, f"{words} Where it is high, a layer says what it says by that band.")
    for name, rows in chosen.items():
        mean = np.mean([row.cka for row in rows], axis=0)
        figure = matrix_figure(mean, rows[0].layers, rows[0].others, label="CKA")
        page.figure(figure, f"{name}: all pairs of layers; {words}")


def _of_modality(result: LayerCkaResult, modality: str) -> LayerCkaRow:
    return next(row for row in result.rows if row.modality == modality)


def _tell_volume(page: Page, found: Mapping[str, Sequence[VolumeResult]]) -> None:
    first = next(iter(found.values()))[0]
    classes = zip(first.classes, first.num_train, first.num_test, strict=True)
    told = ", ".join(f"{name} {num_train} + {num_test}" for name, num_train, num_test in classes)
    least, median, most = first.num_slices
    learns = "learns too" if first.train_encoder else "is frozen"
    page.text(
        f"Volumes to learn from + to test on: {told}; split {first.split}; {least} to {most} slices (median "
        f"{median:g}); {first.num_left_out} volumes without a label left out; the encoder {learns}."
    )


DRAWERS: Mapping[str, Callable[[Page, Any], None]] = {
    "probe": _tell_probe,
    "tokens": _tell_tokens,
    "label-curve": _draw_label_curve,
    "high-pass": _draw_highpass,
    "detect": _draw_detect,
    "segment": _draw_segment,
    "restore": _draw_restore,
    "layer-cka": _draw_layer_cka,
    "layer-spectra": _draw_spectra,
    "volume": _tell_volume,
}
"""By kind of task, what is drawn of the results of each encoder's seeds."""

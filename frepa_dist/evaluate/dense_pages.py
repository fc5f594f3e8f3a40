"""What dense tasks on a frozen encoder show on a page: figures, tables, pictures of the best to the worst."""

from __future__ import annotations

from collections.abc import Mapping

from frepa_dist.evaluate.detect import CURVE_RATES, DetectResult
from frepa_dist.evaluate.overlays import LEGEND, Gallery
from frepa_dist.evaluate.plots import Line, intervals_figure, lines_figure
from frepa_dist.evaluate.restore import RestoreResult
from frepa_dist.evaluate.segment import SegmentResult
from shards.support.page import Page


def add_segment(page: Page, result: SegmentResult, gallery: Gallery | None = None) -> None:
    """Show how well masks are found."""
    page.heading("Segmentation")
    page.text(
        f"{result.encoder}, frozen, with a decoder of {result.num_parameters:,} parameters that learned from "
        f"{result.num_train} images; {len(result.names)} test images. Lines are 95% bootstrap intervals."
    )
    names = list(result.mean)
    page.figure(
        intervals_figure(
            names,
            [result.mean[name] for name in names],
            [(result.low[name], result.high[name]) for name in names],
            xlabel="mean over test images",
            limits=(0.0, 1.0),
        )
    )
    if result.observer:
        page.table(
            ["measure", "the decoder", "second observer"],
            [(name, result.mean[name], value) for name, value in result.observer.items()],
        )
    _add_gallery(page, gallery, f"Over the grey picture: {LEGEND}. Black does not count.", columns=2)


def add_restore(page: Page, result: RestoreResult, gallery: Gallery | None = None) -> None:
    """Show how well degraded images are restored."""
    page.heading(f"Restoration: {result.degradation.task}")
    sees = "sees the degraded image too" if result.training.skip else "sees nothing but the encoder's maps"
    page.text(
        f"{result.degradation}. {result.encoder}, frozen, with a decoder of {result.num_parameters:,} "
        f"parameters that {sees} and learned from {result.num_train} images; {len(result.names)} test "
        "images. What the encoder contributes is the difference to the same decoder on another encoder, such "
        "as random weights."
    )
    means, given = result.mean, result.degraded
    page.table(
        ["", *means],
        [
            ("restored", *(_with_interval(means, result.low, result.high, name) for name in means)),
            ("the degraded image itself", *(f"{given[name]:.3f}" if name in given else "" for name in means)),
        ],
    )
    _add_gallery(page, gallery, "The best, the median and the worst test image by PSNR.", columns=3)


def add_detect(page: Page, result: DetectResult, gallery: Gallery | None = None) -> None:
    """Show how many lesions are found at how many false positives."""
    page.heading("Lesions")
    sources = {
        "decoder": "the probability that a decoder learned from masks",
        "tokens": "a linear probe that learned which images have a lesion, read token by token",
    }
    page.text(
        f"{result.encoder}, frozen; {result.num_lesions} lesions in {len(result.names)} test images, of "
        f"which {result.num_without} have none; {result.num_train} images to learn from. Heat: "
        f"{sources[result.settings.source]}. Candidates are its local maxima."
    )
    page.figure(
        lines_figure(
            [
                Line("all thresholds", CURVE_RATES, result.curve),
                Line("95% interval", result.rates, result.recalls, result.recall_low, result.recall_high),
            ],
            xlabel="false positives per image",
            ylabel="lesions found",
            is_log=True,
            limits=(0.0, 1.0),
        ),
        f"FROC: {result.froc:.3f} [{result.froc_low:.3f}, {result.froc_high:.3f}], the mean recall at "
        "1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per image.",
    )
    rows = [
        (name, _with_interval(result.mean, result.low, result.high, name))
        for name in result.mean
        if name != "froc"
    ]
    if result.image_auroc is not None:
        rows.append(("AUROC of images by their mean heat", f"{result.image_auroc:.3f}"))
    page.table(["measure, image by image", "mean, 95% interval"], rows)
    _add_gallery(page, gallery, "Heat, and lesions outlined; by the share of lesions found.", columns=2)


def _with_interval(
    mean: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], name: str
) -> str:
    return f"{mean[name]:.3f} [{low[name]:.3f}, {high[name]:.3f}]"


def _add_gallery(page: Page, gallery: Gallery | None, words: str, *, columns: int) -> None:
    if gallery:
        page.text(words)
        for row in gallery:
            page.gallery(row, columns=columns)

"""What analyses of an encoder show on a page: figures, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps

from frepa_dist.evaluate.highpass import HighPassResult
from frepa_dist.evaluate.histogram import HistogramResult
from frepa_dist.evaluate.layer_cka import LayerCkaResult
from frepa_dist.evaluate.layer_spectra import SpectraResult
from frepa_dist.evaluate.overlays import Gallery
from frepa_dist.evaluate.plots import Line, lines_figure, matrix_figure
from frepa_dist.evaluate.reconstruct import ReconstructionResult
from frepa_dist.evaluate.reconstruct_pictures import Row
from frepa_dist.evaluate.token_pca import TokenPcaResult
from shards.support.page import Page


def add_layer_cka(page: Page, result: LayerCkaResult) -> None:
    """Show how alike layers are, and which frequencies they stand on."""
    page.heading("Layers by CKA")
    page.text(
        "Debiased linear CKA of mean features: 1 where two layers say the same up to rotation and scale, 0 "
        "where they share nothing. A band is what is left of the images between two Gaussian filters, in "
        "cycles per image side; where its CKA is high, the layer's features are those of that band."
    )
    for row in result.rows:
        caption = f"{row.modality}, n = {row.num_images} images"
        against = result.other or result.encoder
        columns = f"columns: {against}"
        figure = matrix_figure(np.array(row.cka), row.layers, row.others, label="CKA")
        page.figure(figure, f"{caption}; rows: {result.encoder}; {columns}.")
        figure = matrix_figure(np.array(row.band_cka), row.layers, row.bands, label="CKA with the band")
        page.figure(figure, f"{caption}; layers of {result.encoder} with themselves on bands of frequencies.")
        if row.error is not None:
            largest = max(value for line in row.error for value in line)
            page.text(f"The largest jackknife standard error of the upper matrix is {largest:.3f}.")


def add_highpass(page: Page, results: Sequence[HighPassResult]) -> None:
    """Draw how probes of raw images do on high-passed ones, several encoders beside each other."""
    page.heading("Without low frequencies")
    page.text(
        "A linear probe learned from raw images; the test images are high-passed by 1 - exp(-rho^2 / (2 "
        "d0^2)). Bands are 95% bootstrap intervals. Dashed: chance; of accuracy, always "
        "naming the most frequent class."
    )
    for words, kind in (("accuracy", "accuracy"), ("AUROC", "auroc")):
        lines = [
            Line(
                result.encoder,
                result.cutoffs,
                getattr(result, kind),
                getattr(result, f"{kind}_low"),
                getattr(result, f"{kind}_high"),
            )
            for result in results
        ]
        figure = lines_figure(
            lines,
            xlabel="d0 of the high-pass, cycles per image side (0: raw)",
            ylabel=words,
            limits=(0.0, 1.02),
            reference=results[0].chance if kind == "accuracy" else 0.5,
        )
        tested = f"{', '.join(results[0].classes)}; {len(results[0].names)} test images"
        page.figure(figure, f"{tested}.")


def add_histogram(page: Page, result: HistogramResult, gallery: Gallery | None = None) -> None:
    """Show how far corruptions shift grey levels."""
    page.heading("Grey levels under corruption")
    page.text(
        f"Total variation of histograms of {result.config.bins} bins, {result.config.image_size} pixels: the "
        "share of the pixels that would have to change to undo the shift. Of each image (mean and 95% "
        "interval over images), and of the histograms of all images together."
    )
    page.table(
        ["modality", "corruption", "images", "each image", "95% interval", "together"],
        [
            (
                row.modality,
                row.corruption,
                row.num_images,
                f"{row.mean:.4f}",
                f"{row.low:.4f} to {row.high:.4f}",
                f"{row.pooled:.4f}",
            )
            for row in result.rows
        ],
    )
    for modality in dict.fromkeys(row.modality for row in result.rows):
        rows = [row for row in result.rows if row.modality == modality]
        levels = list((np.arange(result.config.bins) + 0.5) / result.config.bins)
        lines = [Line("images", levels, np.cumsum(rows[0].before)[1:-1].tolist(), color="black")]
        lines += [Line(row.corruption, levels, np.cumsum(row.after)[1:-1].tolist()) for row in rows]
        figure = lines_figure(lines, xlabel="grey level", ylabel="share of pixels below", limits=(0, 1))
        page.figure(figure, f"{modality}: cumulative histograms of all {rows[0].num_images} images together.")
    if gallery:
        page.text(
            "The first image of each modality; what lies below 0 or above 1 is clipped in the pictures."
        )
        for shown in gallery:
            page.gallery(shown, columns=len(shown))


def add_layer_spectra(page: Page, result: SpectraResult) -> None:
    """Draw which frequencies the layers pass."""
    page.heading("Frequencies of the layers")
    page.text(
        "Relative log-amplitude of the Fourier transform of each layer's maps, along the half-diagonal: how "
        "much of high frequencies there is beside the mean, the higher the more. Frequencies are shares of "
        "the map's highest one; a smaller map's highest frequency is a lower one of the image."
    )
    for modality in dict.fromkeys(row.modality for row in result.rows):
        rows = [row for row in result.rows if row.modality == modality]
        shades = colormaps["viridis"](np.linspace(0, 0.95, len(rows)))
        lines = [
            Line(row.layer, row.frequencies, row.amplitude, color=tuple(shade[:3]))
            for row, shade in zip(rows, shades.tolist(), strict=True)
        ]
        words = f"{modality}, n = {len(rows[0].by_image)} images, {result.encoder}"
        figure = lines_figure(lines, xlabel="frequency / highest", ylabel="relative log-amplitude")
        page.figure(figure, f"{words}; dark: early layers.")
        places = list(range(len(rows)))
        highest = [row.amplitude[-1] for row in rows]
        line = Line("", places, highest, [row.low for row in rows], [row.high for row in rows])
        figure = lines_figure([line], xlabel="layer", ylabel="at the highest frequency")
        axes = figure.axes[0]
        axes.set_xticks(places, [f"{row.layer}, {row.side}" for row in rows], rotation=90, fontsize=6)
        page.figure(figure, f"{words}; layer and side of its map, with 95% intervals over images.")


def add_token_pca(page: Page, result: TokenPcaResult, gallery: Gallery) -> None:
    """Show tokens as colors beside their images."""
    page.heading("Tokens as colors")
    left_out = "; black tokens were left out by the first component" if result.config.foreground else ""
    page.text(
        f"{result.encoder}, {result.config.layer}: red, green and blue are the first three principal "
        f"components of the tokens of all images of a modality{left_out}. Like colors are like tokens."
    )
    page.text(result.describe())
    page.gallery([pair for row in gallery for pair in row], columns=6)


def add_reconstruct(page: Page, result: ReconstructionResult, rows: Sequence[Row] = ()) -> None:
    """Show errors of reconstructions, and some of them with their spectra."""
    page.heading("Reconstructions")
    page.text(
        f"{result.run}, step {result.step}, on images of {result.images}. Relative error: sum |x - y| / sum "
        f"|x| over what was hidden. Detail lies above {result.config.cutoff_cycles:g} cycles per image side: "
        "its error is 0 where all of it is there and true, 1 where none is; its power is a share of the "
        "original's. Mean and standard deviation over images."
    )
    page.table(
        ["modality", "hidden", "by", "images", "relative error", "error of detail", "power of detail"],
        [
            (
                row.modality,
                row.corruption,
                "all methods" if row.common else result.method,
                row.num_images,
                str(row.relative),
                str(row.high_band),
                str(row.power_kept),
            )
            for row in result.rows
        ],
    )
    for note in dict.fromkeys(row.note for row in result.rows if row.note):
        page.text(note)
    for shown in rows:
        page.gallery(shown, columns=4)

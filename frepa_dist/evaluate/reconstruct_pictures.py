"""Reconstructions of external images beside their spectra, by what was hidden (Frepa, arXiv 2407.14651).

Shapes: S image side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from frepa_dist.evaluate.overlays import to_picture
from frepa_dist.evaluate.plots import spectra_figure
from frepa_dist.evaluate.reconstruct import ReconstructionSettings, compare, list_previews, scale_images
from frepa_dist.evaluate.views import Grid, list_pixels
from frepa_dist.runs import load_student
from frepa_dist.spectrum import radial_power_spectrum
from shards.formats.common import Pixels
from shards.read.draws import draw_key

Row = list[tuple[Pixels | Figure, str]]
NUM_SHOWN = 2  # images of each modality


def draw_reconstructions(
    run_dir: Path,
    images: Path | str,
    *,
    num: int = 64,
    seed: int = 0,
    modality: str | None = None,
    device: str | None = None,
) -> list[Row]:
    """Show the first images that `reconstruct.run_reconstruct` measures: original, seen, restored, spectra.

    Args:
        run_dir: the run.
        images: see `run_reconstruct`; with the same `num` and `seed` they are the same images.
        num: see there.
        seed: see there.
        modality: see there.
        device: where the student runs, None takes a GPU if there is one.

    Returns:
        For each modality, image and corruption a row for the page.

    Raises:
        ConfigError: the modality is not known.
        DataError: no such run, or something cannot be read.
    """
    settings = ReconstructionSettings(num=num, seed=seed)
    student, config, _ = load_student(run_dir)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    student.requires_grad_(False).to(where)
    grid = Grid(config.method.input.image_size, config.method.input.patch_size)
    rows: list[Row] = []
    for name, loaders in list_pixels(images, grid, num=num, seed=seed, modality=modality).items():
        pixels = torch.from_numpy(np.stack([load() for load in loaders[:NUM_SHOWN]])).to(where)
        originals = scale_images(pixels, config.method.input)
        keys = [draw_key(seed, 0, number) for number in range(len(pixels))]
        previews = list_previews(student, originals, config, keys, settings)
        for i, original in enumerate(originals):
            for preview, _ in previews:
                errors = compare(originals, preview, settings.cutoff_cycles)
                spectra = {
                    "original": _spectrum(original),
                    "seen": _spectrum(preview.seen[i]),
                    "restored": _spectrum(preview.predicted[i]),
                }
                relative, detail = float(errors.relative[i]), float(errors.high_band[i])
                words = f"relative error {relative:.3f}, of detail {detail:.2f}"
                rows.append(
                    [
                        (_picture(original), name),
                        (_picture(preview.seen[i]), preview.name),
                        (_picture(preview.predicted[i]), words),
                        (spectra_figure(spectra), "power spectra"),
                    ]
                )
    return rows


def _spectrum(image: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(3, S, S) -> (S // 2 + 1,), the mean over channels."""
    found: np.ndarray[tuple[int], np.dtype[np.float32]] = radial_power_spectrum(image).mean(0).cpu().numpy()
    return found


def _picture(image: Tensor) -> Pixels:
    return to_picture((image.clamp(0, 1) * 255).round().byte().cpu().numpy())

"""The report's pictures: reconstructions before and after training with their spectra, and HF tokens.

Shapes: B images, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from frepa_dist.config import RunConfig
from frepa_dist.evaluate.plots import spectra_figure
from frepa_dist.evaluate.reconstruct import compare, scale_images
from frepa_dist.evaluate.views import Grid, View, list_views, stack_images
from frepa_dist.methods.base import Preview
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import build_student, load_student
from frepa_dist.spectrum import DETAIL_CYCLES, radial_power_spectrum
from shards.formats.common import Pixels
from shards.read.draws import draw_key
from shards.support.errors import DataError
from shards.support.page import Page

NUM_PICTURES = 6  # images shown, shared among the modalities, at least one of each
MAX_SIDE = 384  # of a picture on the page: twice the pixels that a column has on most screens
BATCH_SIZE = 4  # images that a student reconstructs at a time
FRAME_COLOR = (255, 196, 0)  # of the tokens that are marked


@dataclass(frozen=True)
class Shown:
    """What a student made of one image.

    Attributes:
        picture: (S, S, 3) uint8.
        spectrum: (S // 2 + 1,) mean power by cycles per image side, mean of the channels.
        error: mean absolute error over the hidden pixels, of values in [0, 1].
        high_band: relative error of detail; see `reconstruct.Errors`.
        power_kept: power of detail as a share of the image's.
    """

    picture: Pixels
    spectrum: npt.NDArray[np.float32]
    error: float
    high_band: float
    power_kept: float

    def caption(self, title: str) -> str:
        """The figures below the picture."""
        return (
            f"{title}: error {self.error:.3f}, error of detail {self.high_band:.2f}, "
            f"power of detail {self.power_kept:.0%}"
        )


@dataclass(frozen=True)
class Row:
    """One image under one corruption: what was seen, and what was made of it before and after training."""

    modality: str
    corruption: str
    note: str
    original: Pixels
    spectrum: npt.NDArray[np.float32]
    seen: Pixels
    before: Shown
    after: Shown


def choose_views(config: RunConfig) -> list[tuple[str, View]]:
    """A few images of the run's dataset with their modalities, the same in every report of it.

    Raises:
        DataError: the dataset cannot be read.
    """
    data, grid = config.data, Grid(config.method.input.image_size, config.method.input.patch_size)
    found = list_views(data.root, grid, num=NUM_PICTURES, snapshot=data.snapshot, hf_digests=data.hf_digests)
    share = max(1, NUM_PICTURES // len(found))
    return [(modality, load()) for modality, loaders in found.items() for load in loaders[:share]]


def add_pictures(page: Page, run_dir: Path, config: RunConfig) -> None:
    """Show reconstructions beside originals with their spectra, then HF tokens on the images."""
    try:
        views = choose_views(config)
    except DataError as error:
        page.heading("Reconstructions")
        page.text(f"No pictures: the run's dataset cannot be read. {error}")
        return
    add_reconstructions(page, run_dir, config, views)
    page.heading("High-frequency tokens")
    keep, patch_size = config.data.hf_keep, config.method.input.patch_size
    page.text(
        f"The {keep:.0%} of the {patch_size}-pixel cells with the strongest response are framed, the others "
        "dimmed. They should lie on anatomy (vessels, nuclei), not on a rim, a border or burnt-in text."
    )
    marked = []
    for modality, view in views:
        kept = view.hf_order[: round(keep * len(view.hf_order))]
        marked.append((shrink(mark_tokens(view.image.transpose(1, 2, 0), kept, patch_size)), modality))
    page.gallery(marked, columns=3)


def add_reconstructions(
    page: Page, run_dir: Path, config: RunConfig, views: Sequence[tuple[str, View]]
) -> None:
    """Hide parts of a few images as the method does, and show what its student makes of them."""
    page.heading("Reconstructions")
    try:
        student, _, step = load_student(run_dir)
    except DataError as error:
        page.text(f"No reconstructions yet: {error}")
        return
    fresh, words = _fresh_student(config)
    rows = list_rows(fresh, student, config, views)
    if not rows:
        page.text(f"The method {config.method.name} shows no reconstructions.")
        return
    page.text(
        "From left to right: the original, what the student saw, its reconstruction before training "
        f"({words}) and after step {step}, and the power spectra of the original and of both. What is hidden "
        "is the same in every report of this run. Error: mean absolute error over the hidden pixels, of "
        f"values in [0, 1]. Detail is what lies above {DETAIL_CYCLES:g} cycles per image side: its error is "
        "0 where all of it is there and true, and 1 where none is there; its power is a share of the "
        "original's, above 100% where detail is made up."
    )
    for note in dict.fromkeys(row.note for row in rows if row.note):
        page.text(note)
    for row in rows:
        spectra = {"original": row.spectrum, "before": row.before.spectrum, "after": row.after.spectrum}
        page.gallery(
            [
                (row.original, row.modality),
                (row.seen, row.corruption),
                (row.before.picture, row.before.caption("before")),
                (row.after.picture, row.after.caption("after")),
                (spectra_figure(spectra), "power spectra"),
            ],
            columns=5,
        )
    add_error_table(page, rows)


def _fresh_student(config: RunConfig) -> tuple[nn.Module, str]:
    """The student before training, and what it is in words."""
    try:
        return build_student(config), "as the run started"
    except DataError:  # the weights it started from are no longer there
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            student = METHODS[config.method.name].create_student(config.method).eval()
        return student, "random weights, for those it started from cannot be read"


def add_error_table(page: Page, rows: Sequence[Row]) -> None:
    """Say the mean errors of each modality and corruption, before and after."""
    page.heading("Errors by modality", level=3)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.modality, row.corruption), []).append(row)

    def change(members: Sequence[Row], field: str) -> str:
        before, after = (
            fmean(getattr(side, field) for side in sides)
            for sides in ([row.before for row in members], [row.after for row in members])
        )
        return f"{before:.3f} → {after:.3f}"

    fields = {"error": "error", "error of detail": "high_band", "power of detail": "power_kept"}
    page.table(
        ["modality", "hidden", "images", *fields],
        [
            (modality, corruption, len(members), *(change(members, field) for field in fields.values()))
            for (modality, corruption), members in groups.items()
        ],
    )
    page.text(
        "Before → after training, means over the images above, which are few and may have been trained on; "
        "frepa evaluate reconstruct measures on others."
    )


@torch.no_grad()
def list_rows(
    before: nn.Module, after: nn.Module, config: RunConfig, views: Sequence[tuple[str, View]]
) -> list[Row]:
    """Let two students reconstruct the same hidden parts of the same images.

    Args:
        before: the student before training.
        after: the trained one.
        config: of the run.
        views: images with their modalities.
    """
    method, rows = METHODS[config.method.name], []
    for start in range(0, len(views), BATCH_SIZE):
        chunk = views[start : start + BATCH_SIZE]
        images = scale_images(stack_images([view for _, view in chunk]), config.method.input)
        keys = [draw_key(0, 0, start + number) for number in range(len(chunk))]
        pairs = zip(
            method.previews(before, images, config.method, keys),
            method.previews(after, images, config.method, keys),
            strict=True,
        )
        by_corruption = [
            (new, _shown(images, old), _shown(images, new)) for old, new in pairs if old.name == new.name
        ]
        spectra = _spectra(images)
        rows += [
            Row(
                modality=modality,
                corruption=preview.name,
                note=preview.note,
                original=_picture(images[i]),
                spectrum=spectra[i],
                seen=_picture(preview.seen[i]),
                before=old[i],
                after=new[i],
            )
            for i, (modality, _) in enumerate(chunk)
            for preview, old, new in by_corruption
        ]
    return rows


def _shown(images: Tensor, preview: Preview) -> list[Shown]:
    """What became of each image (B, 3, S, S)."""
    errors, spectra = compare(images, preview), _spectra(preview.predicted)
    return [
        Shown(
            picture=_picture(preview.predicted[i]),
            spectrum=spectra[i],
            error=float(errors.absolute[i]),
            high_band=float(errors.high_band[i]),
            power_kept=float(errors.power_kept[i]),
        )
        for i in range(len(images))
    ]


def _spectra(images: Tensor) -> npt.NDArray[np.float32]:
    """(B, 3, S, S) -> (B, S // 2 + 1)."""
    spectra: npt.NDArray[np.float32] = radial_power_spectrum(images).mean(dim=1).numpy()
    return spectra


def _picture(image: Tensor) -> Pixels:
    """(3, S, S) in [0, 1] -> (S, S, 3) uint8, made smaller where the page has no room for it."""
    return shrink((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def shrink(picture: Pixels) -> Pixels:
    """Average a picture (S, S, 3) down to `MAX_SIDE` where it is larger."""
    if picture.shape[0] <= MAX_SIDE:
        return picture
    smaller: Pixels = cv2.resize(picture, (MAX_SIDE, MAX_SIDE), interpolation=cv2.INTER_AREA)
    return smaller


def mark_tokens(
    image: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], patch_size: int
) -> npt.NDArray[np.uint8]:
    """Dim all patches of an image but those named, which get a thin frame.

    Args:
        image: (S, S, 3).
        indices: (K,) row-major.
        patch_size: in pixels.
    """
    drawn = (image * 0.45).astype(np.uint8)
    columns = image.shape[1] // patch_size
    for index in indices.tolist():
        top, left = (index // columns) * patch_size, (index % columns) * patch_size
        patch = image[top : top + patch_size, left : left + patch_size].copy()
        patch[[0, -1]] = patch[:, [0, -1]] = FRAME_COLOR
        drawn[top : top + patch_size, left : left + patch_size] = patch
    return drawn

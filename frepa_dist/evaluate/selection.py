"""What runs are chosen by: one number of a checkpoint, the same question for all, and no training loss.

Two kinds of questions. How well do frozen features tell the classes of labeled images? Cross-validated inside
the training part of a labeled set: the test part is left for whoever has been chosen, since the best of many
on a test part is too good to be true. And: how much detail comes back where all have as much hidden, the same
patches of the same images, whatever they hide in training?

Shapes: n images, D width, K classes, B batch, S image side, N patches.
"""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from frepa_dist.config import RunConfig
from frepa_dist.evaluate.classifiers import choose_c, fit_neighbors
from frepa_dist.evaluate.extract import extract_features
from frepa_dist.evaluate.features import encoder_of_run
from frepa_dist.evaluate.pictures import is_dataset
from frepa_dist.evaluate.reconstruct import ReconstructionSettings, compare, list_previews, scale_images
from frepa_dist.evaluate.scores import Bool, Int64, macro_auroc
from frepa_dist.evaluate.splits import LEAST, cross_validation
from frepa_dist.evaluate.task import ProbeTask, read_parts
from frepa_dist.evaluate.views import Grid, list_pixels
from frepa_dist.methods.base import Preview
from frepa_dist.models.response import InputChannelConfig, high_frequency_response
from frepa_dist.runs import load_student
from shards.read.draws import draw_key, sample_rng
from shards.support.errors import ConfigError, DataError

HF_SHARE = 0.25  # of the hidden patches: what counts as high-frequency tokens, by chance so many are found


def measure_labeled(
    run_dir: Path,
    step: int,
    task: ProbeTask,
    *,
    num: int | None = None,
    neighbors: int | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """AUROC of a checkpoint's frozen features by cross-validation in the training part of a labeled set.

    Args:
        run_dir: the run.
        step: which checkpoint.
        task: the probe whose training part this is; its images are files.
        num: about the most images, the same share of each class, but two of a rare one; None takes all.
        neighbors: votes of so many nearest neighbors by the cosine; None: logistic regression.
        device: where the encoder runs, None takes a GPU if there is one.

    Returns:
        `auroc` and the number `n` of images.

    Raises:
        FrepaError: what is wrong with the run, the images or the labels.
    """
    if is_dataset(task.images):
        raise ConfigError("a sweep's metric reads files, and this is a dataset", where=task.images)
    parts = read_parts(task)  # the probe's, so that its test part is not looked at
    kept = parts.is_train
    if num is not None:
        kept = kept & choose_images(parts.train.y, kept, num, task.seed)
    names = compress(parts.train.pictures.names, kept)
    x = extract_features(encoder_of_run(run_dir, step, device), [Path(task.images) / name for name in names])
    y, groups = parts.train.y[kept], None if parts.train.groups is None else parts.train.groups[kept]
    if neighbors is None:
        _, auroc = choose_c(x, y, groups, task.seed)
    else:
        auroc = neighbor_auroc(x, y, groups, neighbors, task.seed)
    return {"auroc": auroc, "n": float(len(y))}


def choose_images(y: Int64, kept: Bool, num: int, seed: int) -> Bool:
    """Choose about `num` of the images that are kept, the same share of each class.

    Args:
        y: (n,) classes.
        kept: (n,) which images there are to choose from.
        num: how many; of a class at least two are chosen where it has them, that folds can part them.
        seed: of the choice.
    """
    rng = sample_rng(seed, 0, 0, "images of a selection")
    chosen = np.zeros(len(y), bool)
    share = min(1.0, num / max(1, int(kept.sum())))
    for k in np.unique(y):
        members = np.flatnonzero(kept & (y == k))
        wanted = min(len(members), max(LEAST, round(share * len(members))))
        chosen[rng.choice(members, wanted, replace=False)] = True
    return chosen


def neighbor_auroc(
    x: npt.NDArray[np.floating[Any]], y: Int64, groups: Int64 | None, neighbors: int, seed: int
) -> float:
    """Mean AUROC over folds of nearest neighbors' votes (`classifiers.fit_neighbors`).

    Args:
        x: (n, D) features.
        y: (n,) classes.
        groups: (n,) patients, or None.
        neighbors: how many vote.
        seed: of the folds.

    Raises:
        ConfigError: there are not so many neighbors.
        DataError: there are too few images of a class for two folds.
    """
    folds = cross_validation(y, groups, seed)
    most = min(len(a) for a, _ in folds)
    if neighbors > most:
        raise ConfigError(
            f"{neighbors} neighbors are to vote, and {most} images are learned from",
            where="neighbors",
            allowed=f"1 to {most}",
            fix="ask fewer neighbors, or take more images",
        )
    return float(np.mean([macro_auroc(fit_neighbors(x[a], y[a], neighbors)(x[b]), y[b]) for a, b in folds]))


def measure_detail(
    run_dir: Path,
    step: int,
    images: str,
    *,
    mask_ratio: float,
    num: int = 64,
    modality: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """How much detail a checkpoint's student reconstructs where as much is hidden as of all others.

    Masked autoencoders have `mask_ratio` of the patches hidden, drawn by the seed; students of whole images
    the common corruption that hides patches (`evaluate.reconstruct`).

    Args:
        run_dir: the run.
        step: which checkpoint.
        images: a dataset of shards, or a folder of image files; best none that were trained on.
        mask_ratio: share of the patches that masked autoencoders do not see.
        num: most images of a modality.
        modality: of image files; of a dataset, the only one to use.
        seed: of the choice of images, and of what is hidden.
        device: where the student runs, None takes a GPU if there is one.

    Returns:
        Means over images, then over modalities: `high_band`, `power_kept` (see `reconstruct.Errors`),
        `hf_recall` (see `token_recall`; NaN where patches are predicted normalized), and the number `n` of
        images.

    Raises:
        DataError: no such checkpoint, an image cannot be read, or a prediction is not finite.
    """
    student, config, _ = load_student(run_dir, step)
    student.requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = with_common_masking(config, mask_ratio)
    settings = ReconstructionSettings(num=num, seed=seed)
    grid = Grid(config.method.input.image_size, config.method.input.patch_size)
    rows = []
    found = list_pixels(images, grid, num=num, seed=seed, modality=modality)
    where = next(student.parameters()).device
    for loaders in found.values():
        values: list[dict[str, Tensor]] = []
        for start in range(0, len(loaders), settings.batch_size):
            pixels = np.stack([load() for load in loaders[start : start + settings.batch_size]])
            batch = scale_images(torch.from_numpy(pixels).to(where), config.method.input)
            keys = [draw_key(seed, 0, start + number) for number in range(len(pixels))]
            shown = list_previews(student, batch, config, keys, settings)
            preview = next((one for one, common in shown if common), shown[0][0])
            errors = compare(batch, preview, settings.cutoff_cycles)
            recall = token_recall(batch, preview, grid.patch_size)
            if preview.note:  # the spread of each patch is the true one, and would tell the ranks
                recall = torch.full_like(recall, torch.nan)
            values.append(
                {"high_band": errors.high_band, "power_kept": errors.power_kept, "hf_recall": recall}
            )
        rows.append({key: float(torch.cat([part[key] for part in values]).nanmean()) for key in values[0]})
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    if not np.isfinite([means["high_band"], means["power_kept"]]).all():
        raise DataError("the reconstructions hold NaN or infinity, or no image has detail", where=run_dir)
    return means | {"n": float(sum(map(len, found.values())))}


def with_common_masking(config: RunConfig, mask_ratio: float) -> RunConfig:
    """The same config with a share of masked patches that is common to all that are compared."""
    if "mask_ratio" not in type(config.method).model_fields:
        return config
    method = config.method.model_copy(update={"mask_ratio": mask_ratio})
    return config.model_copy(update={"method": method})


def token_recall(images: Tensor, preview: Preview, patch_size: int) -> Tensor:
    """Share of the hidden patches with most high frequency that have most in the reconstruction too, (B,).

    Patches are ranked by the mean |response| of the filter that high-frequency tokens are scored with, on the
    whole view without a field of view (`models.response`), of the image and of the reconstruction; the first
    quarter of the hidden ones counts. By chance it is a quarter. Patches that are hidden in part count as
    such; NaN where fewer than four are hidden.

    Args:
        images: (B, 3, S, S) in [0, 1].
        preview: what a student made of them.
        patch_size: side of the patches in pixels.
    """
    filter_config = InputChannelConfig()

    def scores(pictures: Tensor) -> Tensor:
        response = high_frequency_response(pictures[:, 1].float(), filter_config).abs()[:, None]
        return torch.nn.functional.avg_pool2d(response, patch_size).flatten(1)

    truth, found = scores(images), scores(preview.predicted)
    hidden = preview.hidden[:, :1].expand(len(images), 1, *images.shape[2:]).float()
    is_hidden = torch.nn.functional.avg_pool2d(hidden, patch_size).flatten(1) > 0.5
    recalls = []
    for row in range(len(images)):
        places = is_hidden[row].nonzero()[:, 0]
        kept = round(HF_SHARE * len(places))
        if not kept:
            recalls.append(truth.new_tensor(torch.nan))
            continue
        wanted = truth[row, places].argsort(descending=True, stable=True)[:kept]
        given = found[row, places].argsort(descending=True, stable=True)[:kept]
        recalls.append(torch.isin(wanted, given).float().mean())
    return torch.stack(recalls)

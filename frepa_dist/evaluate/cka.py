"""Debiased linear CKA: how alike two representations of the same images are (Table 1 of RetMAE).

CKA (Kornblith et al., arXiv 1905.00414) from a few hundred images is biased upward: independent noise scores
well above 0. The unbiased estimator of HSIC (Song et al., JMLR 13, 2012, eq. 5; used for CKA by Nguyen et
al., arXiv 2010.15327) mends that. It is computed here as an inner product of U-centered kernels (Szekely and
Rizzo, Annals of Statistics 42, 2014), which is the same number and cannot make HSIC(K, K) negative, so no
root of a negative number is ever taken.

Shapes: n images, D width, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from frepa_dist.evaluate.features import Encoder, load_encoder
from frepa_dist.evaluate.views import View, ViewLoader, list_views, stack_images
from frepa_dist.spectrum import gaussian_high_pass, gaussian_low_pass
from shards.read.draws import sample_rng
from shards.support.errors import DataError
from shards.support.progress import Progress
from shards.support.settings import Settings

Float64 = npt.NDArray[np.float64]

MIN_IMAGES = 4  # the estimator divides by n - 3
NUM_GROUPS = 50  # of the jackknife
NORMAL_95 = 1.959964


def centered_kernel(features: npt.NDArray[Any]) -> Float64:
    """U-centered linear kernel of features (n, D): (n, n) with zero diagonal and zero row sums.

    Raises:
        DataError: fewer than 4 rows, or features that are not finite.
    """
    n = len(features)
    if n < MIN_IMAGES:
        raise DataError(f"debiased CKA of {n} images", allowed=f"at least {MIN_IMAGES} images")
    if not np.isfinite(features).all():
        raise DataError(
            "the features hold NaN or infinity", fix="check that the encoder's weights are finite"
        )
    x = np.asarray(features, np.float64)
    # HSIC ignores a common shift; taking it out first keeps rounding from drowning small differences
    x = x - x.mean(axis=0)
    return u_center(x @ x.T)


def u_center(kernels: Float64) -> Float64:
    """U-center symmetric kernels (..., n, n)."""
    n = kernels.shape[-1]
    others = ~np.eye(n, dtype=bool)
    kernels = kernels * others
    rows = kernels.sum(axis=-1)
    kernels -= (rows[..., :, None] + rows[..., None, :]) / (n - 2)
    kernels += rows.sum(axis=-1)[..., None, None] / ((n - 1) * (n - 2))
    return kernels * others


def debiased_hsic(k: Float64, l: Float64) -> float:  # noqa: E741 (the papers' names)
    """Unbiased HSIC of two U-centered kernels (n, n); negative where they share less than chance."""
    n = len(k)
    return float(np.vdot(k, l)) / (n * (n - 3))


def cka_of_kernels(first: Float64, second: Float64) -> Float64:
    """CKA of all pairs of U-centered kernels, (L, n, n) and (M, n, n) -> (L, M).

    0 where one of the representations does not vary: nothing is shared. Where both are the same array, the
    diagonal is exactly 1.
    """
    k, l = first.reshape(len(first), -1), second.reshape(len(second), -1)  # noqa: E741
    shared = k @ l.T
    own, others = (np.diag(shared),) * 2 if first is second else ((x**2).sum(axis=1) for x in (k, l))
    scale = np.sqrt(own[:, None] * others[None, :])
    return np.divide(shared, scale, out=np.zeros_like(shared), where=scale > 0)


def debiased_linear_cka(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Debiased linear CKA of two representations of the same images.

    Args:
        x: (n, D) features, n >= 4.
        y: (n, E) features of the same images in the same order.

    Returns:
        1 for equal representations up to rotation, shift and scale; about 0 for independent ones. An unbiased
        estimate of 0 is now and then negative: it is returned as it is. 0 where one does not vary.
    """
    if len(x) != len(y):
        raise DataError(f"{len(x)} rows of features against {len(y)}", allowed="the same images in both")
    return float(cka_of_kernels(centered_kernel(x)[None], centered_kernel(y)[None])[0, 0])


def jackknife_error(x: npt.NDArray[Any], y: npt.NDArray[Any], num_groups: int = NUM_GROUPS) -> float | None:
    """Standard error of the debiased CKA over images, by leaving out one group of them at a time.

    A bootstrap would not do: it repeats images, and a pair of equal images looks like similarity that both
    representations share, which is what the estimator was debiased against.

    Args:
        x: (n, D) features.
        y: (n, E) features.
        num_groups: as many groups of neighboring rows, or n where that is less.

    Returns:
        The standard error, None where the groups leave fewer than 4 images.
    """
    errors = jackknife_errors(centered_kernel(x)[None], centered_kernel(y)[None], num_groups)
    return None if errors is None else float(errors[0, 0])


def jackknife_errors(first: Float64, second: Float64, num_groups: int = NUM_GROUPS) -> Float64 | None:
    """Standard errors of all pairs of U-centered kernels, (L, n, n) and (M, n, n) -> (L, M).

    See `jackknife_error`.
    """
    n = first.shape[-1]
    groups = np.array_split(np.arange(n), min(num_groups, n))
    if n - len(groups[0]) < MIN_IMAGES:
        return None
    values = []
    for group in groups:
        kept = np.delete(np.arange(n), group)
        # centering again what was cut out of a centered kernel gives the centered kernel of the subset
        k = u_center(first[:, kept[:, None], kept])
        values.append(cka_of_kernels(k, k if first is second else u_center(second[:, kept[:, None], kept])))
    spread = np.square(np.asarray(values) - np.mean(values, axis=0)).sum(axis=0)
    return np.asarray(np.sqrt((len(groups) - 1) / len(groups) * spread))


class CkaConfig(Settings):
    """What is compared.

    Attributes:
        num: most images of a modality.
        keep: share of the patches in a subset.
        cutoff_cycles: of the Gaussian filters, in cycles per image side; 13.4 is that of the HF tokens.
        batch_size: images at a time.
        seed: of the choice of images and of the random subsets.
    """

    num: int = Field(default=512, ge=MIN_IMAGES)
    keep: float = Field(default=0.25, gt=0, lt=1)
    cutoff_cycles: float = Field(default=13.4, gt=0)
    batch_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)


class CkaRow(Settings):
    """CKA of the full image with one reduced input.

    Attributes:
        modality: of the images; modalities are never mixed, their difference alone would make any two
            representations look alike.
        variant: name of the reduced input.
        num_images: n.
        cka: debiased linear CKA.
        error: its jackknife standard error, None where there are too few images.
    """

    modality: str
    variant: str
    num_images: int
    cka: float
    error: float | None

    def interval(self) -> tuple[float, float] | None:
        """Approximate 95% interval, by the normal distribution."""
        if self.error is None:
            return None
        return self.cka - NORMAL_95 * self.error, min(1.0, self.cka + NORMAL_95 * self.error)


class CkaResult(Settings):
    """All rows, and what they were measured on."""

    encoder: str
    images: str
    config: CkaConfig
    rows: list[CkaRow]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        lines = ["debiased linear CKA with the full image (95% interval by the jackknife)"]
        for row in self.rows:
            interval = row.interval()
            shown = (
                f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "too few images for an interval"
            )
            lines.append(f"{row.modality:15} {row.variant:30} {row.cka:6.3f}  {shown}  n = {row.num_images}")
        return "\n".join(lines)


def run_cka(
    encoder: str,
    images: Path | str,
    *,
    num: int = 512,
    seed: int = 0,
    modality: str | None = None,
    device: str | None = None,
    keep: float = 0.25,
    cutoff_cycles: float = 13.4,
    batch_size: int = 64,
) -> CkaResult:
    """Compare the features of full images with those of their parts.

    Args:
        encoder: see `features.SOURCES`.
        images: a dataset of shards, or a folder of image files.
        num: most images of a modality.
        seed: of the choice of images and of the random subsets.
        modality: of image files; of a dataset, the only one to use.
        device: where the encoder runs, None takes a GPU if there is one.
        keep: share of the patches in a subset.
        cutoff_cycles: of the Gaussian filters.
        batch_size: images at a time.

    Raises:
        ConfigError: the encoder has no tokens, or the modality is not known.
        DataError: there are fewer than 4 images of a modality, or something cannot be read.
    """
    config = CkaConfig(num=num, seed=seed, keep=keep, cutoff_cycles=cutoff_cycles, batch_size=batch_size)
    loaded = load_encoder(encoder, device)
    rows = []
    found = list_views(images, loaded.grid, num=config.num, seed=config.seed, modality=modality)
    for name, loaders in found.items():
        if len(loaders) < MIN_IMAGES:
            raise DataError(
                f"CKA of {len(loaders)} images of {name}", where=images, allowed=f"at least {MIN_IMAGES}"
            )
        rows += compare_parts(loaded, name, loaders, config)
    return CkaResult(encoder=loaded.name, images=str(images), config=config, rows=rows)


def compare_parts(
    encoder: Encoder, modality: str, loaders: Sequence[ViewLoader], config: CkaConfig
) -> list[CkaRow]:
    """CKA of the full image with each of its parts, for images of one modality."""
    features: dict[str, list[npt.NDArray[np.float32]]] = {}
    with Progress(len(loaders), f"cka, {modality}") as progress:
        for start in range(0, len(loaders), config.batch_size):
            views = [load() for load in loaders[start : start + config.batch_size]]
            for name, rows in embed_parts(encoder, views, start, config).items():
                features.setdefault(name, []).append(rows.cpu().numpy())
            progress.update(len(views))
    full, *parts = [(name, np.concatenate(chunks)) for name, chunks in features.items()]
    return [
        CkaRow(
            modality=modality,
            variant=name,
            num_images=len(part),
            cka=debiased_linear_cka(full[1], part),
            error=jackknife_error(full[1], part),
        )
        for name, part in parts
    ]


def embed_parts(
    encoder: Encoder, views: Sequence[View], start: int, config: CkaConfig
) -> dict[str, torch.Tensor]:
    """Embed full images, subsets of their tokens, and filtered images: name -> (B, D), the full one first.

    "LF" has two readings in the paper's table: the lowest quarter kept, or the highest quarter removed; both
    are here. Filters work on normalized images, so that a channel whose mean a high-pass removes is left at
    the mean that the encoder was trained around.

    Args:
        encoder: with tokens.
        views: B views.
        start: number of the first of them, which the random subsets are keyed by.
        config: what is compared.
    """
    images = encoder.normalize(stack_images(views))
    order = torch.from_numpy(np.stack([view.hf_order for view in views]))
    drawn = [
        sample_rng(config.seed, 0, start + number, "cka tokens").permutation(order.shape[1])
        for number in range(len(views))
    ]
    subsets = token_subsets(order, torch.from_numpy(np.stack(drawn)), config.keep)
    return {
        "full image": encoder.embed(images),
        **{name: encoder.embed(images, ids) for name, ids in subsets.items()},
        "high-passed image": encoder.embed(gaussian_high_pass(images, config.cutoff_cycles)),
        "low-passed image": encoder.embed(gaussian_low_pass(images, config.cutoff_cycles)),
    }


def token_subsets(order: torch.Tensor, drawn: torch.Tensor, keep: float) -> dict[str, torch.Tensor]:
    """Subsets of the tokens of images by name, each (B, K).

    Args:
        order: (B, N) all tokens, strongest high-frequency response first.
        drawn: (B, N) all tokens, in a random order.
        keep: share of the tokens that a subset keeps, or leaves out.
    """
    num_tokens = order.shape[1]
    num_kept = max(1, round(keep * num_tokens))
    kept, rest = f"{keep:.0%}", f"{1 - keep:.0%}"
    return {
        f"HF tokens only ({kept})": order[:, :num_kept],
        f"LF tokens only (lowest {kept})": order[:, num_tokens - num_kept :],
        f"HF tokens removed ({rest} kept)": order[:, num_kept:],
        f"random tokens ({kept})": drawn[:, :num_kept],
    }

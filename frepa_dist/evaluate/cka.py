"""Debiased linear CKA: how alike two representations of the same images are (Table 1 of RetMAE).

CKA (Kornblith et al., arXiv 1905.00414) from a few hundred images is biased upward: independent noise scores
well above 0. The unbiased estimator of HSIC (Song et al., JMLR 13, 2012, eq. 5; used for CKA by Nguyen et
al., arXiv 2010.15327) mends that. It is computed here as an inner product of U-centered kernels (Szekely &
Rizzo, 2014), which is the same number and cannot make HSIC(K, K) negative, so no root of a negative number is
ever taken.

Shapes: n images, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from frepa_dist.evaluate.features import Encoder, check_token_subsets
from frepa_dist.evaluate.pixels import View
from frepa_dist.spectrum import gaussian_high_pass, gaussian_low_pass
from shards.draws import sample_rng
from shards.support.errors import DataError
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
        raise DataError("the features hold NaN or infinity", fix="check that the encoder's weights are finite")
    x = np.asarray(features, np.float64)
    # HSIC ignores a common shift; taking it out first keeps rounding from drowning small differences
    x = x - x.mean(axis=0)
    return _u_center(x @ x.T)


def _u_center(kernel: Float64) -> Float64:
    n = len(kernel)
    kernel = kernel.copy()
    np.fill_diagonal(kernel, 0.0)
    rows = kernel.sum(axis=1)
    kernel -= (rows[:, None] + rows[None, :]) / (n - 2)
    kernel += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(kernel, 0.0)
    return kernel


def debiased_hsic(k: Float64, l: Float64) -> float:  # noqa: E741 (the papers' names)
    """Unbiased HSIC of two U-centered kernels (n, n); negative where they share less than chance."""
    n = len(k)
    return float(np.vdot(k, l)) / (n * (n - 3))


def cka_of_kernels(k: Float64, l: Float64) -> float:  # noqa: E741
    """CKA of two U-centered kernels; 0 where one of the representations does not vary (nothing is shared)."""
    scale = math.sqrt(debiased_hsic(k, k)) * math.sqrt(debiased_hsic(l, l))
    return debiased_hsic(k, l) / scale if scale > 0 else 0.0


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
    return cka_of_kernels(centered_kernel(x), centered_kernel(y))


def jackknife_error(x: npt.NDArray[Any], y: npt.NDArray[Any], num_groups: int = NUM_GROUPS) -> float:
    """Standard error of the debiased CKA over images, by leaving out one group of them at a time.

    A bootstrap would not do: it repeats images, and a pair of equal images looks like similarity that both
    representations share, which is what the estimator was debiased against.

    Args:
        x: (n, D) features.
        y: (n, E) features.
        num_groups: as many groups of neighboring rows, or n where that is less.

    Returns:
        The standard error; NaN never, infinity where the groups leave fewer than 4 images.
    """
    n = len(x)
    groups = np.array_split(np.arange(n), min(num_groups, n))
    if n - len(groups[0]) < MIN_IMAGES:
        return math.inf
    # U-centering is a projection, so the kernels of a subset can be cut out of the centered whole
    k, l = centered_kernel(x), centered_kernel(y)  # noqa: E741
    values = []
    for group in groups:
        kept = np.setdiff1d(np.arange(n), group, assume_unique=True)
        values.append(cka_of_kernels(_u_center(k[np.ix_(kept, kept)]), _u_center(l[np.ix_(kept, kept)])))
    spread = np.square(np.asarray(values) - np.mean(values)).sum()
    return float(np.sqrt((len(groups) - 1) / len(groups) * spread))

"""High-frequency (HF) tokens: which patches of an image hold its fine detail (RetMAE, ICLR 2026).

The score, in this order: channel; its logarithm, where the parameters ask for it; soft field of view, its
outside filled with the mean inside; background subtraction and Butterworth high-pass (and low-pass, where
asked for) as ONE real multiplier, (1 - Gaussian) x Butterworth, periodic on the image's very size; response;
response zero outside the eroded field of view; mean |response| in each patch, and 0 for a patch that lies
outside the eroded field of view by more than half: no kept token lies on the rim.

`hf_response_reference` is the definition, in float64; `hf_response` is the same in float32, and held to it.

Lengths scale with S, the shorter side of the image: the width of the square images the papers use. So an
image and its transpose have the same tokens.

Shapes: H, W image height and width in pixels; h, w cells of a response map; N patches, row-major; K kept.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import scipy.fft
from pydantic import Field

from shards.hf.field_of_view import FieldOfView, soft_field_of_view
from shards.hf.marks import find_marks, paint_over
from shards.support.errors import ConfigError, DataError
from shards.support.settings import Settings

Image = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

DEFINITION_VERSION = 1  # raise it whenever the same parameters give other tokens
DTYPES = (np.uint8, np.uint16, np.int16, np.float32, np.float64)
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class HFParams(Settings):
    """What defines the HF tokens of an image; lengths are shares of its shorter side S.

    Attributes:
        channel: what a colour image is reduced to; a grey image is taken as it is.
        clip: the lowest and the highest level that count, for images that are not 8-bit.
        mark_contrast: small bright marks (lettering, callipers, lead letters, highlights) that exceed what is
            around them by this share of the range are painted over first; 0: none are.
        fov: how the field of view is found, `field_of_view.FieldOfView`; `none` takes the whole frame.
        fov_level: `body` begins above this level, in images that are not 8-bit; None: Otsu's threshold.
        fov_paper: `adaptive` takes paper white that reaches the frame for surround, too.
        fov_threshold: level of the rim, as a share of the way from the surround's level to the inside's.
        fov_convex: fill dents of the field of view, such as shadows at the rim.
        fov_erosion: distance from the rim at which the soft mask is one half.
        fov_softness: width of the soft mask's ramp from 0 to 1.
        frame_taper: width of the ramp to the mean at the frame's edges, where the whole frame is the field of
            view: the filter is periodic, and opposite edges differ.
        log_offset: the response is that of log(level + this share of the mean level inside), so that detail
            counts by its contrast to what is around it: a vessel takes away a share of the light, much or
            little. A smaller share lifts the noise of dark parts. None: of the level itself, as published.
        background_sigma: of the Gaussian background that is subtracted.
        cutoff_cycles: of the Butterworth high-pass, in cycles per S.
        low_pass_cycles: of a Butterworth low-pass, in cycles per S: what is finer is noise to it. None: none.
        order: of both Butterworth filters: gains f^2n / (f^2n + cutoff^2n) and low^2n / (low^2n + f^2n).
        binarize: the response is zero where the soft mask is below this.
    """

    channel: Literal["green", "luminance"] = "green"
    clip: tuple[float, float] | None = None
    mark_contrast: float = Field(0.0, ge=0, lt=1)
    fov: FieldOfView = "adaptive"
    fov_level: float | None = None
    fov_paper: bool = True
    fov_threshold: float = Field(0.15, gt=0, lt=1)
    fov_convex: bool = True
    fov_erosion: float = Field(0.02, ge=0, le=0.25)
    fov_softness: float = Field(0.04, gt=0, le=0.5)
    frame_taper: float = Field(0.025, ge=0, le=0.25)
    log_offset: float | None = Field(None, gt=0, le=10)
    background_sigma: float = Field(0.04, gt=0, le=1)
    cutoff_cycles: float = Field(13.4, gt=0)
    low_pass_cycles: float | None = Field(None, gt=0)
    order: int = Field(2, ge=1, le=8)
    binarize: float = Field(0.5, gt=0, lt=1)

    def digest(self) -> str:
        """Identify the definition: 12 hex digits over its version and all parameters."""
        text = json.dumps([DEFINITION_VERSION, self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


DEFAULT = HFParams()


def hf_response(image: Image, params: HFParams = DEFAULT) -> Float32:
    """High-frequency response of an image, in float32.

    Args:
        image: (H, W) or (H, W, 3) RGB; uint8, uint16, int16, float32 or float64.
        params: the definition's parameters.

    Returns:
        (H, W) signed response, 0 outside the field of view; in the image's own intensity units, or as
            relative contrast with `log_offset`.

    Raises:
        DataError: the array is no image (its shape, its type), or holds NaN or infinity.
    """
    soft, inside = _soft_mask(image, params)
    channel = _channel(image, params, np.float32)
    if params.log_offset is not None:
        channel = _logarithm(channel, soft, params.log_offset)
    filled = _fill(channel, soft)
    response = _filter_float32(filled, params)
    if inside is not None:
        response *= inside
    return response


def hf_response_reference(image: Image, params: HFParams = DEFAULT) -> Float64:
    """High-frequency response by the float64 definition; arguments and result as of `hf_response`."""
    soft, inside = _soft_mask(image, params)
    channel = _channel(image, params, np.float64)
    weight = soft.astype(np.float64)
    if params.log_offset is not None:
        level = channel - min(channel.min(), 0)
        mean = (level * weight).sum() / max(weight.sum(), 1e-12)
        channel = np.log(level + params.log_offset * mean) if mean > 0 else np.zeros_like(level)
    channel -= _any_level(channel)
    mean = (channel * weight).sum() / max(weight.sum(), 1e-12)
    filled = weight * channel + (1 - weight) * mean
    height, width = filled.shape
    multiplier = _multiplier(np.fft.fftfreq(height), np.fft.fftfreq(width), min(height, width), params)
    response = np.fft.ifft2(np.fft.fft2(filled) * multiplier).real
    return response if inside is None else response * inside


def field_of_view(image: Image, params: HFParams = DEFAULT) -> Bool:
    """Where the response counts: the field of view without its rim, (H, W)."""
    _, inside = _soft_mask(image, params)
    return np.ones(image.shape[:2], bool) if inside is None else inside > 0


def hf_scores(response: npt.NDArray[np.floating[Any]], patch_size: int) -> Float32:
    """Mean |response| of each patch, (N,) row-major; rows and columns that fill no patch are left out.

    A patch scores 0 if more than half of it lies outside the field of view, where the response is exactly 0.
    """
    rows, columns = response.shape[0] // patch_size, response.shape[1] // patch_size
    if rows == 0 or columns == 0:
        return np.zeros(0, np.float32)
    size = np.abs(response[: rows * patch_size, : columns * patch_size])
    inside = cv2.threshold(size, 0, 1, cv2.THRESH_BINARY)[1]
    scores = cv2.resize(size, (columns, rows), interpolation=cv2.INTER_AREA)
    share = cv2.resize(inside, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(scores * (share >= 0.5), np.float32).ravel()


def rank_tokens(scores: npt.NDArray[np.floating[Any]], keep: float) -> npt.NDArray[np.uint16]:
    """The round(keep * N) patches with the highest scores, strongest first, ties by the lower index.

    Raises:
        ConfigError: `keep` is not in (0, 1], or there are more patches than uint16 can number.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep = {keep}", allowed="0 < keep <= 1")
    if scores.size > 1 << 16:
        raise ConfigError(f"{scores.size} patches", allowed="at most 65536", fix="take larger patches")
    order = np.argsort(-scores, kind="stable")
    return order[: round(keep * scores.size)].astype(np.uint16)


def hf_token_indices(
    image: Image, patch_size: int = 16, keep: float = 0.25, params: HFParams = DEFAULT
) -> npt.NDArray[np.uint16]:
    """The HF tokens of an image: (round(keep * N),) patch indices, ranked as by `rank_tokens`."""
    return rank_tokens(hf_scores(hf_response(image, params), patch_size), keep)


def _channel(image: Image, params: HFParams, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Reduce an image to one channel (H, W), clipped and with its marks painted over."""
    image = _clip(image, params)
    if image.ndim == 2:
        channel = image.astype(dtype)
    elif params.channel == "green":
        channel = image[:, :, 1].astype(dtype)
    else:
        channel = np.asarray(cv2.transform(image.astype(dtype), np.array([LUMINANCE], dtype)))
    marks = find_marks(image, params.mark_contrast) if params.mark_contrast > 0 else None
    return channel if marks is None else paint_over(channel, marks)


def _clip(image: Image, params: HFParams) -> Image:
    """Bring levels that say nothing, such as metal in CT, to those that count; 8-bit images stay."""
    if params.clip is None or image.dtype == np.uint8:
        return image
    return np.clip(image, *params.clip).astype(image.dtype)


def _soft_mask(image: Image, params: HFParams) -> tuple[Float32, Float32 | None]:
    """Soft field of view in [0, 1] (H, W), and its binary form, which is None for the whole frame."""
    if image.ndim not in (2, 3) or image.size == 0 or (image.ndim == 3 and image.shape[2] != 3):
        raise DataError(f"an array of shape {image.shape} is no image", allowed="(H, W) or (H, W, 3)")
    if image.dtype not in DTYPES:
        raise DataError(f"an image of {image.dtype}", allowed=", ".join(np.dtype(d).name for d in DTYPES))
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise DataError("the image holds NaN or infinity")
    height, width = image.shape[:2]
    side = min(height, width)
    soft = None
    if params.fov != "none":
        soft = soft_field_of_view(
            _clip(image, params),
            params.fov,
            threshold=params.fov_threshold,
            level=None if image.dtype == np.uint8 else params.fov_level,
            paper=params.fov_paper,
            convex=params.fov_convex,
            erosion=params.fov_erosion * side,
            softness=params.fov_softness * side,
        )
    if soft is None:
        length = params.frame_taper * side
        return np.outer(_taper(height, length), _taper(width, length)), None
    return soft, cv2.threshold(soft, params.binarize, 1, cv2.THRESH_BINARY)[1]


def _taper(size: int, length: float) -> Float32:
    """Window of ones that falls to zero over `length` pixels at both ends."""
    pixel = np.arange(size)
    from_end = np.minimum(pixel, size - 1 - pixel) + 0.5
    return np.minimum(from_end / max(length, 1e-6), 1).astype(np.float32)


def _any_level(channel: npt.NDArray[Any]) -> Any:
    """One pixel's value; the filter is blind to it, and a flat image less it is 0, free of rounding noise."""
    return channel[channel.shape[0] // 2, channel.shape[1] // 2]


def _logarithm(channel: Float32, soft: Float32, offset: float) -> Float32:
    """Logarithm of the level above black plus `offset` of the mean inside, in place; 0 where all is black.

    Zero is black, but where there are negative values.
    """
    lowest = cv2.minMaxLoc(channel)[0]
    if lowest < 0:
        channel -= lowest
    mean = cv2.sumElems(cv2.multiply(channel, soft))[0] / max(cv2.sumElems(soft)[0], 1e-12)
    if mean <= 0:
        return np.zeros_like(channel)
    channel += offset * mean
    return np.asarray(cv2.log(channel, channel))


def _fill(channel: Float32, soft: Float32) -> Float32:
    """Fill the outside with the mean inside, in place, less that mean, to which the filter is blind."""
    channel -= _any_level(channel)
    channel *= soft
    mean = cv2.sumElems(channel)[0] / max(cv2.sumElems(soft)[0], 1e-12)
    return np.asarray(cv2.scaleAdd(soft, -mean, channel, channel))


def _multiplier(
    fy: npt.NDArray[np.floating[Any]], fx: npt.NDArray[np.floating[Any]], side: int, params: HFParams
) -> npt.NDArray[Any]:
    """(1 - Gaussian) x Butterworth filters at frequencies in cycles per pixel, (len(fy), len(fx))."""
    y2, x2 = np.square(fy)[:, None], np.square(fx)[None, :]
    exponent = -2 * (np.pi * params.background_sigma * side) ** 2
    gaussian = np.exp(exponent * y2) * np.exp(exponent * x2)
    power = (y2 + x2) ** params.order
    gain = (1 - gaussian) * (power / (power + (params.cutoff_cycles / side) ** (2 * params.order)))
    if params.low_pass_cycles is not None:
        limit = (params.low_pass_cycles / side) ** (2 * params.order)
        gain *= limit / (limit + power)
    return np.asarray(gain)


@lru_cache(maxsize=8)
def _packed_multiplier(height: int, width: int, params: HFParams) -> Float32:
    """The multiplier in the layout of OpenCV's packed spectrum of a real image (CCS), (H, W)."""
    rows = np.arange(height)
    columns = (np.arange(width) + 1) // 2
    side = min(height, width)
    packed = _multiplier(np.minimum(rows, height - rows) / height, columns / width, side, params)
    # the columns of frequency 0 and, for an even width, 1/2 are spectra of real columns: packed downward
    real = [0, width - 1] if width % 2 == 0 else [0]
    packed[:, real] = _multiplier(((rows + 1) // 2) / height, columns[real] / width, side, params)
    return packed.astype(np.float32)


@lru_cache(maxsize=8)
def _half_multiplier(height: int, width: int, params: HFParams) -> Float32:
    """The multiplier in the layout of a real FFT, (H, W // 2 + 1)."""
    side = min(height, width)
    return _multiplier(np.fft.fftfreq(height), np.fft.rfftfreq(width), side, params).astype(np.float32)


def _filter_float32(filled: Float32, params: HFParams) -> Float32:
    """Apply the multiplier, periodic on the image's very size, in place where possible.

    OpenCV's transform is the fastest for sizes of factors 2, 3 and 5, and quadratic in any other prime.
    """
    height, width = filled.shape
    if cv2.getOptimalDFTSize(height) == height and cv2.getOptimalDFTSize(width) == width:
        spectrum = cv2.dft(filled, filled)
        spectrum *= _packed_multiplier(height, width, params)
        return np.asarray(cv2.dft(spectrum, spectrum, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE))
    transformed = scipy.fft.rfft2(filled)
    transformed *= _half_multiplier(height, width, params)
    return np.asarray(scipy.fft.irfft2(transformed, s=filled.shape))

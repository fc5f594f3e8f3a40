"""The second measure of near duplicates: do two images show the same fine structure?

Photographs of one organ look alike in the large: a 64-bit difference hash calls one of eight pairs of
different fundus images near, and their thumbnails of 32 x 32 pixels correlate by up to .999. What differs is
the course of the vessels. So a pattern is the band-passed image, brought to the same strength everywhere, and
zero near the rim of what is lit; the measure is the correlation of two patterns. Its error rates are in
BENCHMARKS.md.

Two images are compared in several frames and mirrored, since a copy may have been trimmed, cropped or
flipped.

Shapes: S side of a pattern, F frames, n stored and m given images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from shards.read.windows import to_bytes

SIDE = 64
SAME = 0.72
"""Least correlation that tells a copy; `tools/bench_leakage.py` says how often other images reach it."""

SYMMETRIC = 0.6
"""A pattern that correlates so much with a mirror image of itself shows the camera, not the patient."""

WHOLE, TRIMMED, CROPPED = 0, 1, 2
CROPS = {2: 0.95, 3: 0.9, 4: 0.85, 5: 0.8, 6: 0.75}
"""Frames: the image; without its dark border; and its center, with this share of its sides."""

_MIRRORS = {"": (1, 1), "mirrored": (1, -1), "upside down": (-1, 1), "turned by 180 degrees": (-1, -1)}
_LIKELY = dict(list(_MIRRORS.items())[:2])
_WAYS = {
    (WHOLE, WHOLE): ("", _MIRRORS),
    (TRIMMED, TRIMMED): ("other border", _MIRRORS),
    (WHOLE, TRIMMED): ("stored without its border", _MIRRORS),
    (TRIMMED, WHOLE): ("stored with a border", _MIRRORS),
    **{(WHOLE, frame): (f"stored is its center ({share:.0%})", _LIKELY) for frame, share in CROPS.items()},
    **{
        (frame, WHOLE): (f"center ({share:.0%}) of the stored one", _LIKELY) for frame, share in CROPS.items()
    },
}
"""Frame of the stored and of the given image, what it says when they agree, and the mirrors to try."""

_LIT = 0.1  # of the range of brightness: what is above counts as lit
_RIM = 3  # pixels of a pattern next to the rim that are left out
_BACKGROUND, _NEIGHBORHOOD = 3.0, 6.0  # standard deviations in pixels of a pattern
_CLIP = 3.0  # in standard deviations of the neighborhood

Image = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Patterns = npt.NDArray[np.float16]


class Match(NamedTuple):
    """A stored and a given image that show the same, by their places, and how they had to be compared."""

    stored: int
    given: int
    correlation: float
    how: str


def cut_frames(pixels: npt.NDArray[Any]) -> list[Image]:
    """The frames of an image (H, W) or (H, W, 3), uint8 or Hounsfield units."""
    image = to_bytes(pixels)
    height, width = image.shape[:2]
    cropped = []
    for share in CROPS.values():
        top, left = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
        cropped.append(image[top : height - top, left : width - left])
    return [np.ascontiguousarray(frame) for frame in (image, _trim(image), *cropped)]


def make_patterns(frames: list[Image]) -> Patterns:
    """Patterns (F, S * S) of the frames of an image, each of norm 1; 0 where nothing is to be told apart."""
    return np.stack([_pattern(frame) for frame in frames]).astype(np.float16)


def find_matches(stored: Patterns, given: Patterns, least: float = SAME) -> list[Match]:
    """Find the pairs that show the same in any two frames, mirrored or not; of each pair the best way.

    Args:
        stored: (n, F, S * S).
        given: (m, F, S * S).
        least: correlation.
    """
    best = np.full((len(stored), len(given)), -1, np.float32)
    way = np.zeros(best.shape, np.uint8)
    names: list[str] = []
    for (mine, theirs), (framed, mirrors) in _WAYS.items():
        wanted = given[:, theirs].astype(np.float32).T
        images = stored[:, mine].astype(np.float32).reshape(-1, SIDE, SIDE)
        for mirrored, (vertical, horizontal) in mirrors.items():
            found = images[:, ::vertical, ::horizontal].reshape(len(stored), -1) @ wanted
            way[found > best] = len(names)
            np.maximum(best, found, out=best)
            names.append(", ".join(filter(None, (framed, mirrored))))
    pairs = np.argwhere(best >= least).tolist()
    return [Match(row, column, float(best[row, column]), names[way[row, column]]) for row, column in pairs]


def mirror_all(pixels: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """An image (H, W, ...) in all the mirrors in which patterns are compared."""
    return [
        np.ascontiguousarray(pixels[::vertical, ::horizontal]) for vertical, horizontal in _MIRRORS.values()
    ]


def _grey(image: Image) -> Image:
    """Of colors the green channel, in which vessels are darkest and most cameras sharpest."""
    return image if image.ndim == 2 else np.ascontiguousarray(image[:, :, 1])


def _lit(grey: Float32) -> npt.NDArray[np.bool_]:
    """Where an image is brighter than its dark border."""
    low, high = np.percentile(grey, [1, 95])
    return np.asarray(grey > low + _LIT * (high - low))


def _trim(image: Image) -> Image:
    """Without dark border; all of it where almost nothing is lit."""
    small = cv2.resize(_grey(image), (128, 128), interpolation=cv2.INTER_AREA).astype(np.float32)
    lit = _lit(small)
    rows, columns = (np.flatnonzero(lit.mean(axis=axis) > 0.03) for axis in (1, 0))
    if len(rows) < 32 or len(columns) < 32:
        return image
    tall, wide = image.shape[0] / len(small), image.shape[1] / len(small)
    return image[
        int(rows[0] * tall) : int((rows[-1] + 1) * tall),
        int(columns[0] * wide) : int((columns[-1] + 1) * wide),
    ]


def _pattern(image: Image) -> Float32:
    grey = cv2.resize(_grey(image), (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    lit = _lit(_blur(grey, 1)).astype(np.uint8)
    kernel = np.ones((2 * _RIM + 1, 2 * _RIM + 1), np.uint8)
    inside = cv2.erode(lit, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1).astype(np.float32)
    tone = np.log(grey - grey.min() + 10)  # a change of brightness or contrast becomes a small offset
    detail = (tone - _blur(tone * inside, _BACKGROUND) / (_blur(inside, _BACKGROUND) + 1e-3)) * inside
    spread = _blur(detail**2, _NEIGHBORHOOD) / (_blur(inside, _NEIGHBORHOOD) + 1e-3)
    even = np.clip(detail / np.sqrt(spread + 1e-5), -_CLIP, _CLIP) * inside
    even /= max(float(np.linalg.norm(even)), 1e-6)
    mirrored = [even[::vertical, ::horizontal] for vertical, horizontal in _MIRRORS.values()][1:]
    if max(float((even * other).sum()) for other in mirrored) > SYMMETRIC:
        even[:] = 0
    return np.asarray(even.ravel(), np.float32)


def _blur(image: Float32, sigma: float) -> Float32:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)

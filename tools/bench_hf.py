"""HF tokens: images per second on one core, of the naive way, the float64 definition and the fast path.

    python tools/bench_hf.py [IMAGE_FOLDER] [--size 512] [--images 16] [--rounds 7]

Without a folder it draws synthetic fundus images. All ways run in the same process on the same images, in
turn within each round; the figures are medians over rounds. The naive way is what one writes first: NumPy's
float64 FFT, SciPy's Gaussians and labels, a fixed threshold for the field of view.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from shards.hf import tokens as hf_tokens
from shards.hf.modalities import find_modality

Image = npt.NDArray[np.uint8]
PATCH, KEEP = 16, 0.25
PARAMS = find_modality("fundus").hf


def naive_tokens(image: Image) -> npt.NDArray[np.int64]:
    """The score's steps, one by one, in float64, with a fixed threshold for the field of view."""
    green = image[:, :, 1].astype(np.float64)
    height, width = green.shape
    labels, num = ndimage.label(green > 0.04 * green.max())
    sizes = ndimage.sum(np.ones_like(green), labels, range(1, num + 1))
    view = ndimage.binary_fill_holes(labels == 1 + int(np.argmax(sizes)))
    view = ndimage.binary_erosion(view, iterations=round(0.02 * width))
    soft = ndimage.gaussian_filter(view.astype(np.float64), 0.015 * width)
    level = np.log(green + 0.2 * green[view].mean())
    filled = soft * level + (1 - soft) * level[view].mean()
    detail = filled - ndimage.gaussian_filter(filled, 0.04 * width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    gain = 1 / (1 + (24 / width / np.maximum(radius, 1e-12)) ** 4)
    gain /= 1 + (radius * width / 85) ** 4
    response = np.abs(np.fft.ifft2(np.fft.fft2(detail) * gain).real) * (soft >= 0.5)
    rows, columns = height // PATCH, width // PATCH
    patches = response[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
    scores = patches.mean(axis=(1, 3)).ravel()
    return np.argsort(-scores, kind="stable")[: round(KEEP * scores.size)]


def reference_tokens(image: Image) -> npt.NDArray[np.uint16]:
    """Tokens of the float64 definition."""
    response = hf_tokens.hf_response_reference(image, PARAMS)
    return hf_tokens.rank_tokens(hf_tokens.hf_scores(response, PATCH), KEEP)


def fast_tokens(image: Image) -> npt.NDArray[np.uint16]:
    """Tokens of the fast path."""
    return hf_tokens.hf_token_indices(image, PATCH, KEEP, PARAMS)


def synthetic_fundus(size: int, rng: np.random.Generator) -> Image:
    """Draw a vignetted disc with branching vessels, lesions and noise on a black surround."""
    scale = size / 512
    center, radius = rng.uniform(0.48, 0.52, 2) * size, rng.uniform(0.42, 0.48) * size
    image = np.zeros((size, size, 3), np.float32)
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(y - center[0], x - center[1])
    image[:] = np.array([180, 90, 40], np.float32) * (1 - 0.4 * (distance / radius) ** 2)[:, :, None]
    root = center + rng.uniform(-0.5, 0.5, 2) * radius
    cv2.circle(image, (int(root[1]), int(root[0])), int(30 * scale), (250, 200, 120), -1, cv2.LINE_AA)
    for _ in range(14):
        point, angle = root.copy(), rng.uniform(0, 2 * np.pi)
        for width in np.linspace(5, 1, 25) * scale:
            angle += rng.normal(0, 0.25)
            after = point + 12 * scale * np.array([np.sin(angle), np.cos(angle)])
            ends = [(int(p[1]), int(p[0])) for p in (point, after)]
            cv2.line(image, ends[0], ends[1], (120, 45, 25), max(1, round(width)), cv2.LINE_AA)
            point = after
    for _ in range(12):
        spot = center + rng.uniform(-0.6, 0.6, 2) * radius
        at = (int(spot[1]), int(spot[0]))
        cv2.circle(image, at, max(1, round(3 * scale)), (90, 30, 20), -1, cv2.LINE_AA)
    image += rng.normal(0, 3, image.shape)
    image[distance > radius] = np.abs(rng.normal(0, 1.5, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def load_images(folder: Path | None, size: int, num: int) -> list[Image]:
    """Read `num` images spread over a folder, or draw them; (size, size, 3) RGB."""
    if folder is None:
        return [synthetic_fundus(size, np.random.default_rng(seed)) for seed in range(num)]
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif"))
    if not files:
        sys.exit(f"{folder}: no .jpg, .png or .tif image in it")
    chosen = [cv2.imread(str(file)) for file in files[:: max(1, len(files) // num)][:num]]
    resized = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in chosen]
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in resized]


def overlap(first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> float:
    """Share of tokens that two rankings have in common."""
    return np.intersect1d(first, second).size / max(1, first.size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cv2.setNumThreads(1)  # nothing else here is threaded
    images = load_images(args.folder, args.size, args.images)
    ways: dict[str, Callable[[Image], npt.NDArray[np.integer]]] = {
        "naive (numpy + scipy.ndimage)": naive_tokens,
        "definition (float64)": reference_tokens,
        "fast path (float32)": fast_tokens,
    }
    defined = [reference_tokens(image) for image in images]
    agreement = {
        name: np.mean([overlap(t, way(i)) for t, i in zip(defined, images, strict=True)])
        for name, way in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for image in images:
                way(image)
            seconds[name].append((time.perf_counter() - start) / len(images))
    baseline = np.array(next(iter(seconds.values())))
    source = args.folder or "synthetic fundus"
    print(f"{len(images)} images ({source}), {args.size} px, one thread, median of {args.rounds} rounds")
    print(f"{'way':32}{'ms/image':>10}{'images/s':>10}{'x naive':>9}{'same tokens':>13}")
    for name, times in seconds.items():
        median = float(np.median(times))
        ratio = float(np.median(baseline / np.array(times)))
        print(f"{name:32}{1000 * median:10.2f}{1 / median:10.0f}{ratio:9.1f}{agreement[name]:13.4f}")


if __name__ == "__main__":
    main()

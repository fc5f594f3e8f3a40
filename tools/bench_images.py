"""Images to measure on: synthetic CT and MRI slices, pydicom's own CT slices, files of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
WINDOW = (-1024, 3071)  # Hounsfield units that are stored


def synthetic_ct(noise: float, rng: np.random.Generator, size: int = 512) -> Array:
    """An axial slice in Hounsfield units: air, fat, organs, lungs, bone, a table, and noise of a kernel."""
    image = np.full((size, size), -1000.0, np.float32)
    k = size / 512

    def ellipse(x: float, y: float, a: float, b: float, value: float) -> None:
        cv2.ellipse(image, ((x * k, y * k), (2 * a * k, 2 * b * k), rng.uniform(-8, 8)), value, -1)

    ellipse(256, 260, 215, 150, -95)
    ellipse(256, 260, 195, 130, 45)
    for x in (165, 350):
        ellipse(x, 240, 62, 85, -830)
    ellipse(256, 360, 26, 24, 350)
    for angle in np.linspace(0, 2 * np.pi, 14):
        ellipse(256 + 190 * np.cos(angle), 260 + 124 * np.sin(angle), 10, 5, 400)
    for _ in range(60):
        x, y = rng.uniform(120, 400, 2)
        ellipse(x, y, *rng.uniform(2, 14, 2), rng.uniform(20, 180))
    cv2.line(image, (40, 430), (470, 430), -200, 4)
    image = cv2.GaussianBlur(image, (0, 0), 0.8)
    grain = cv2.GaussianBlur(rng.normal(0, 1, image.shape).astype(np.float32), (0, 0), 0.7)  # the kernel's
    image += grain * (noise / grain.std())
    y, x = np.mgrid[:size, :size]
    image[np.hypot(x - size / 2, y - size / 2) > size / 2] = WINDOW[0]  # outside the scanner's circle
    return np.clip(np.rint(image), *WINDOW).astype(np.int16)


def synthetic_mri(noise: float, rng: np.random.Generator, size: int = 512) -> Array:
    """A magnitude image scaled to 8 bits: smooth tissue with a bias field, Rician noise."""
    hu = synthetic_ct(0, rng, size).astype(np.float32)
    bias = 1 + 0.3 * np.linspace(-1, 1, size, dtype=np.float32)[:, None]
    signal = np.clip(hu + 1000, 0, 1300) / 1300 * 200 * bias
    real, imaginary = signal + rng.normal(0, noise, signal.shape), rng.normal(0, noise, signal.shape)
    return np.clip(np.rint(np.hypot(real, imaginary)), 0, 255).astype(np.uint8)


def real_ct() -> list[Array]:
    """The CT slices of 512 pixels that pydicom brings."""
    import pydicom
    from pydicom.data import get_testdata_file

    slices = []
    for name in ("693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"):
        path = get_testdata_file(name, download=False)
        dataset = pydicom.dcmread(str(path)) if path else None
        if dataset is not None:
            values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            slices.append(np.clip(values, *WINDOW).astype(np.int16))
    return slices


def grey_files(folder: Path, num: int) -> list[Array]:
    """Read some images of a folder, grey, at their own size."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [cv2.imread(str(p), cv2.IMREAD_GRAYSCALE) for p in files[:: max(1, len(files) // num)][:num]]

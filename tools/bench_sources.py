"""Sources for the benchmark of the build: synthetic images in the formats that hospitals have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from bench_hf import synthetic_fundus
from bench_images import synthetic_ct
from numpy.typing import NDArray
from PIL import Image


class Kind(NamedTuple):
    """A kind of source: how `num` images of it are written, and as what they are built."""

    modality: str
    write: Callable[[Path, int], None]


def pictures(num: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """Fundus photographs, no two equal."""
    drawn = [synthetic_fundus(size, np.random.default_rng(seed)) for seed in range(6)]
    for n in range(num):
        yield np.roll(drawn[n % len(drawn)], (n, n // 512), (0, 1))


def write_jpeg(folder: Path, num: int) -> None:
    """JPEG 92, 512 pixels: stored as they are."""
    for n, image in enumerate(pictures(num, 512)):
        cv2.imwrite(str(folder / f"{n}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])


def write_png(folder: Path, num: int) -> None:
    """PNG, 512 pixels."""
    for n, image in enumerate(pictures(num, 512)):
        cv2.imwrite(str(folder / f"{n}.png"), image[..., ::-1])


def write_tiff(folder: Path, num: int) -> None:
    """TIFF with LZW, 2048 pixels: shrunk to a sixteenth."""
    for n, image in enumerate(pictures(max(4, num // 8), 2048)):
        Image.fromarray(image).save(folder / f"{n}.tif", compression="tiff_lzw")


def write_dicom(folder: Path, num: int, *, is_packed: bool = False) -> None:
    """CT slices, int16 Hounsfield units; uncompressed, or JPEG 2000 lossless."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

    rng = np.random.default_rng(0)
    drawn = [synthetic_ct(25, rng) for _ in range(8)]
    for n in range(num):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
        dataset.SeriesInstanceUID, dataset.InstanceNumber = f"1.2.{1 + n // 40}", n % 40
        dataset.Modality, dataset.PatientID = "CT", f"p{n // 40}"
        dataset.Rows = dataset.Columns = 512
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "HU"
        dataset.PixelData = np.roll(drawn[n % len(drawn)], (n, n // 512), (0, 1)).tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if is_packed:
            dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        dataset.save_as(folder / f"{n}.dcm", enforce_file_format=True)


def write_nifti(folder: Path, num: int) -> None:
    """MRI volumes of 40 slices, int16, in gzip."""
    import nibabel

    rng = np.random.default_rng(0)
    for n in range(max(1, num // 40)):
        slices = [
            np.hypot(synthetic_ct(0, rng, 256) + 1024.0, rng.normal(0, 20, (256, 256))) for _ in range(40)
        ]
        volume = np.stack(slices, axis=-1).astype(np.int16)
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(folder / f"{n}.nii.gz")


KINDS = {
    "jpeg 512": Kind("fundus", write_jpeg),
    "png 512": Kind("fundus", write_png),
    "tiff 2048": Kind("fundus", write_tiff),
    "dicom ct 512": Kind("ct", write_dicom),
    "dicom ct 512, JPEG 2000": Kind("ct", partial(write_dicom, is_packed=True)),
    "nifti.gz 256x256x40": Kind("mri", write_nifti),
}

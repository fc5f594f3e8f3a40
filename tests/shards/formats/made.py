"""Files of every format, made for the tests: a few KB each, their content known."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pydicom
import tifffile
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from shards.formats.common import Decoded, Header, ReadOptions
from shards.formats.registry import open_object, read_header
from shards.stores.blobs import BytesBlob

CT, MR, XRAY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.1"

SECRETS = {
    "PatientName": "Grimhild^Ottokar",
    "PatientID": "PID-774411",
    "PatientBirthDate": "19481203",
    "PatientAddress": "Rabenweg 7",
    "InstitutionName": "Klinik Finsterwald",
    "ReferringPhysicianName": "Zwackelmann^P",
    "StationName": "SCANNER-XK9",
    "DeviceSerialNumber": "SN-556677",
    "ManufacturerModelName": "Tomoplex-3000",
    "StudyDate": "20190417",
    "StudyTime": "134455.123",
    "AcquisitionDateTime": "20190417134455",
    "StudyDescription": "KNIE LINKS, HERR OTTOKAR",
    "SeriesDescription": "AXIAL GRIMHILD",
    "ImageComments": "SEEN BY DR ZWACKELMANN",
    "AccessionNumber": "ACC-99887",
    "ProtocolName": "PROTO-GRIMHILD",
    "OperatorsName": "Wanninger^H",
    "BodyPartExamined": "GRIMHILDS KNEE",
    "ConvolutionKernel": "KERNEL-XK9",
}
"""Tags of a patient; a code field among them holds what somebody typed."""


def header_of(data: bytes, name: str = "", **options: Any) -> Header:
    return read_header(BytesBlob(data, name), ReadOptions(**options))


def decode(data: bytes, name: str = "", unit: int = 0, **options: Any) -> Decoded:
    with open_object(BytesBlob(data, name), ReadOptions(**options)) as opened:
        return opened.decode(unit)


def pydicom_file(name: str) -> bytes:
    """One of the files that lie in pydicom's own package; nothing is fetched."""
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(path).read_bytes()


def make_dicom(pixels: np.ndarray, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """A DICOM file of (H, W), (H, W, 3), or several frames with NumberOfFrames; None leaves a tag out."""
    is_color = pixels.shape[-1] == 3
    size = pixels.shape[-3:-1] if is_color else pixels.shape[-2:]
    dataset = Dataset()
    values = {
        "SOPClassUID": CT,
        "SOPInstanceUID": generate_uid(entropy_srcs=["object"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=["series"]),
        "Modality": "CT",
        "PatientID": "patient-7",
        "Rows": size[0],
        "Columns": size[1],
        "SamplesPerPixel": 3 if is_color else 1,
        "PlanarConfiguration": 0 if is_color else None,
        "PhotometricInterpretation": "RGB" if is_color else "MONOCHROME2",
        "BitsAllocated": pixels.dtype.itemsize * 8,
        "BitsStored": pixels.dtype.itemsize * 8,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
    } | tags
    values.setdefault("HighBit", values["BitsStored"] - 1)
    with pydicom.config.disable_value_validation():
        for keyword, value in values.items():
            if value is not None:
                setattr(dataset, keyword, value)
        if "PixelData" in dataset:
            dataset["PixelData"].VR = "OW"
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def make_nifti(volume: np.ndarray, *, affine: Any = None, is_gzip: bool = False, **fields: Any) -> bytes:
    """A NIfTI-1 file; `slope` and `inter` scale, other fields go into the header."""
    image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine, dtype=volume.dtype)
    image.header.set_slope_inter(fields.pop("slope", 1), fields.pop("inter", 0))
    for name, value in fields.items():
        image.header[name] = value
    image.header["vox_offset"] = 352
    header = image.header.as_byteswapped(">" if volume.dtype.byteorder == ">" else "<")
    data = header.binaryblock + bytes(4) + volume.tobytes(order="F")
    return gzip.compress(data, mtime=0) if is_gzip else data


def make_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def make_npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def make_hdf5(array: np.ndarray, key: str = "data", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset(key, data=array, **options)
    return buffer.getvalue()


def draw_slide(height: int = 4300, width: int = 2100) -> np.ndarray:
    """White glass with a pink disc of tissue in the middle, (H, W, 3)."""
    slide = np.full((height, width, 3), 244, np.uint8)
    rows, columns = np.ogrid[:height, :width]
    is_tissue = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 < (width // 3) ** 2
    slide[is_tissue] = (200, 120, 170)
    return slide


def make_slide(slide: np.ndarray, *, mpp: float | None = 0.5) -> bytes:
    """A tiled TIFF with a second level at a quarter of the size."""
    buffer = io.BytesIO()
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": 3}
    options = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb"}
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(slide, **options, **resolution)
        writer.write(slide[::4, ::4], subfiletype=1, **options)
    return buffer.getvalue()

"""Which reader reads an object: told by content, by the suffix only where content cannot say.

| content | packages (extra) |
|---|---|
| PNG, JPEG, TIFF, BMP, WebP; NPY, NPZ | none |
| DICOM | pydicom, pylibjpeg and its decoders (`dicom`) |
| NIfTI, in gzip or not | nibabel (`nifti`) |
| HDF5 | h5py (`hdf5`) |
| slides: SVS, NDPI, SCN, BIF, MRXS, large tiled TIFF | openslide-python, openslide-bin (`slides`) |

Readers are imported when the first object of their kind comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from shards.formats import pictures
from shards.formats.common import Header, Opened, ReadOptions, Unreadable, missing_reader
from shards.formats.magic import HEAD_BYTES, sniff
from shards.stores.blobs import Blob
from shards.support.errors import DataError

__all__ = ["claims_image", "find_images", "open_object", "read_header", "sniff"]

_SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif", ".mrxs")
_OTHER_SUFFIXES = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz", ".npy", ".npz", ".h5", ".hdf5")
SUFFIXES = frozenset({*pictures.SUFFIXES, *_OTHER_SUFFIXES, *_SLIDE_SUFFIXES})
_EXTRAS = {
    "dicom": ("pydicom", "dicom"),
    "nifti": ("nibabel", "nifti"),
    "nifti_gz": ("nibabel", "nifti"),
    "hdf5": ("h5py", "hdf5"),
    "slide": ("openslide", "slides"),
}


class _Reader(NamedTuple):
    read_header: Callable[[Blob, ReadOptions], Header]
    open: Callable[[Blob, ReadOptions], Opened]


def claims_image(name: str) -> bool:
    """Whether a file's suffix is that of a format that is read."""
    return name.lower().endswith(tuple(SUFFIXES))


def find_images(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Files below a folder that have one of the suffixes, sorted; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=folder)
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(tuple(suffixes))
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError("no image in this folder", where=folder, allowed=" ".join(sorted(suffixes)))
    return found


def read_header(blob: Blob, options: ReadOptions) -> Header:
    """Tell what an object is, from as few of its bytes as possible.

    64 KiB do for most objects; TIFF, HDF5, NPZ and slides need the whole, and so does what has long metadata
    in front of its size.

    Raises:
        Unreadable: it is no image, or one that is not wanted or cannot be read.
        ChangedObject: it is not what was listed.
        OSError: a local file cannot be read.
        EnvironmentFault: a remote one cannot.
    """
    return _find_reader(blob).read_header(blob, options)


def open_object(blob: Blob, options: ReadOptions) -> Opened:
    """Open an object for the decoding of its units; close it afterwards.

    Raises:
        Unreadable: as `read_header`, or it turns out to be damaged.
        ChangedObject: as above.
        OSError: as above.
        EnvironmentFault: as above, or there is no room for a temporary file.
    """
    return _find_reader(blob).open(blob, options)


def _find_reader(blob: Blob) -> _Reader:
    head = blob.head(HEAD_BYTES)
    if not head:
        raise Unreadable("zero_bytes")
    kind = sniff(head, blob.name)
    if kind is None:
        raise Unreadable("not_an_image")
    if kind == "tiff" and (blob.name.lower().endswith(_SLIDE_SUFFIXES) or pictures.is_large_and_tiled(blob)):
        kind = "slide"
    try:
        reader = _load(kind)
    except ModuleNotFoundError as error:
        package, extra = _EXTRAS.get(kind, ("", ""))
        if not package or (error.name or package).split(".")[0] != package:
            raise
        raise missing_reader(package, extra) from None
    if reader is None:
        raise Unreadable("unsupported_format", kind)
    return reader


def _load(kind: str) -> _Reader | None:
    if kind in ("png", "jpeg", "tiff", "bmp", "webp"):
        return _Reader(lambda blob, _: pictures.read_header(blob), pictures.open_picture)
    if kind in ("npy", "npz"):
        from shards.formats import arrays

        return _Reader(arrays.read_header, arrays.open_array)
    if kind == "dicom":
        from shards.formats import dicom

        return _Reader(dicom.read_header, dicom.open_dicom)
    if kind in ("nifti", "nifti_gz"):
        from shards.formats import nifti

        return _Reader(nifti.read_header, nifti.open_nifti)
    if kind == "hdf5":
        from shards.formats import hdf5

        return _Reader(hdf5.read_header, hdf5.open_hdf5)
    if kind == "slide":
        from shards.formats import slides

        return _Reader(slides.read_header, slides.open_slide)
    return None

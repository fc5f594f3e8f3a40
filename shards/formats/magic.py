"""What a file is, by its first bytes."""

from __future__ import annotations

import zlib

HEAD_BYTES = 65536
"""Read of every object first: enough to name any format, and for most headers."""

_MAGIC = (
    (b"DICM", 128, "dicom"),  # before the others: the 128 bytes in front may be the start of a TIFF
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"\xff\xd8\xff", 0, "jpeg"),
    (b"II*\x00", 0, "tiff"),
    (b"MM\x00*", 0, "tiff"),
    (b"II+\x00", 0, "tiff"),
    (b"MM\x00+", 0, "tiff"),
    (b"BM", 0, "bmp"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"\x89HDF\r\n\x1a\n", 0, "hdf5"),
    (b"\x93NUMPY", 0, "npy"),
    (b"n+1\x00", 344, "nifti"),
    (b"n+2\x00", 4, "nifti"),
    (b"ni1\x00", 344, "nifti_pair"),
    (b"ni2\x00", 4, "nifti_pair"),
    (b"\x00\x00\x00\x0cjP  ", 0, "jpeg2000"),
    (b"PK\x03\x04", 0, "zip"),
    (b"\x1f\x8b", 0, "gzip"),
)
_NIFTI_HEAD_BYTES = 540  # the longer header, of NIfTI-2
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_DICOM_STARTS = (b"\x02\x00\x00\x00", b"\x08\x00", b"\x00\x08")  # the lowest groups, of both byte orders
_VALUE_TYPES = frozenset({b"UL", b"OB", b"CS", b"UI", b"DA", b"TM", b"SH", b"LO"})  # of their first elements


def sniff(head: bytes, name: str = "") -> str | None:
    """Name the format of a file, None when it is none we know.

    Args:
        head: its first bytes: 540 are enough, for gzip a few KB.
        name: for DICOM without its preamble (told by the suffix, or the start of its first element), for NPZ
            among ZIP files, and for the slides that are a picture at first sight.
    """
    if name.lower().endswith(".mrxs"):
        return "slide"
    found = _find_magic(head)
    if found == "gzip":
        inside = _find_magic(inflate_head(head, _NIFTI_HEAD_BYTES))
        return "nifti_gz" if inside == "nifti" else "gzip"
    if found == "zip":
        return "npz" if name.lower().endswith(".npz") else "zip"
    if found is None and _is_bare_dicom(head, name):
        return "dicom"
    return found


def _find_magic(head: bytes) -> str | None:
    return next((known for magic, offset, known in _MAGIC if head.startswith(magic, offset)), None)


def inflate_head(head: bytes, num_bytes: int) -> bytes:
    """The first bytes inside a gzip file, of which only the head is there; fewer where it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, num_bytes)
    except zlib.error:
        return b""


def _is_bare_dicom(head: bytes, name: str) -> bool:
    """DICOM without preamble and magic: its elements start at once."""
    if not head.startswith(_DICOM_STARTS) or len(head) < 8:
        return False
    return head[4:6] in _VALUE_TYPES or name.lower().endswith(_DICOM_SUFFIXES)

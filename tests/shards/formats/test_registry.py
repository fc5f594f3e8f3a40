"""Which reader reads what; readers that are missing; damage of every kind to every format."""

from __future__ import annotations

import gzip
import io
import json
import sys
import time
import warnings
import zipfile
from types import FunctionType

import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from shards.formats.common import REASONS, ReadOptions, Unreadable, decoder_faults
from shards.formats.registry import claims_image, open_object, read_header, sniff
from shards.stores.blobs import BytesBlob
from tests.shards.formats.made import (
    decode,
    header_of,
    make_dicom,
    make_hdf5,
    make_nifti,
    make_npy,
    make_npz,
    make_slide,
    pydicom_file,
)
from tests.shards.images import draw, encode

GREY, COLOR = draw(1, 48, 40, channels=1), draw(0, 48, 40)
VOLUME = np.stack([GREY.astype(np.int16) * n - 900 for n in range(4)])
FILES = {
    "png": encode(COLOR, "PNG"),
    "jpeg": encode(COLOR, "JPEG"),
    "tiff": encode(COLOR, "TIFF"),
    "bmp": encode(COLOR, "BMP"),
    "webp": encode(COLOR, "WEBP"),
    "dicom": make_dicom(VOLUME[1], RescaleSlope=1, RescaleIntercept=-5, WindowCenter=3, WindowWidth=9),
    "dicom jpeg": make_dicom(
        COLOR, Modality="US", PixelData=encapsulate([encode(COLOR, "JPEG")] * 2), NumberOfFrames=2,
        PhotometricInterpretation="YBR_FULL_422", syntax=JPEGBaseline8Bit,
    ),
    "dicom rle": pydicom_file("MR_small_RLE.dcm"),
    "dicom jpeg 2000": pydicom_file("MR_small_jp2klossless.dcm"),
    "dicom jpeg-ls": pydicom_file("MR_small_jpeg_ls_lossless.dcm"),
    "dicom deflated": pydicom_file("image_dfl.dcm"),
    "nifti": make_nifti(VOLUME),
    "nifti_gz": make_nifti(VOLUME, is_gzip=True),
    "npy": make_npy(VOLUME),
    "npz": make_npz(data=VOLUME),
    "hdf5": make_hdf5(VOLUME),
    "hdf5 in chunks": make_hdf5(VOLUME, chunks=True, compression="gzip", shuffle=True, fletcher32=True),
}  # fmt: skip
SUFFIXES = {"npz": ".npz", "dicom": ".dcm"}


def name_of(kind: str) -> str:
    return "x" + SUFFIXES.get(kind.split()[0], "")


@pytest.mark.parametrize("kind", FILES)
def test_content_decides(kind):
    assert sniff(FILES[kind][:65536], name_of(kind)) == kind.split()[0]
    header = header_of(FILES[kind], name_of(kind))
    pixels = decode(FILES[kind], name_of(kind), unit=header.num_units - 1).pixels
    assert pixels.shape[:2] == (header.height, header.width)
    assert pixels.ndim == (3 if header.channels == 3 else 2)
    assert pixels.dtype in (np.uint8, np.int16, np.uint16, np.float32)


def test_a_wrong_suffix_does_not_matter():
    assert header_of(FILES["png"], "x.dcm").format == "png"
    assert header_of(FILES["dicom"], "x.jpg").format == "dicom"
    assert header_of(FILES["nifti_gz"], "x.gz").format == "nifti"


def test_names_that_claim_an_image():
    for name in ("a.PNG", "b.nii.gz", "c.nii", "d.DCM", "e.h5", "f.npz", "g.svs", "h.jpeg"):
        assert claims_image(name), name
    for name in ("a.txt", "b.gz", "c", "d.csv", "png"):
        assert not claims_image(name), name


def test_what_is_no_image():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.npy", make_npy(GREY))
    for data, reason in (
        (b"", "zero_bytes"),
        (b"words of a reader\n" * 9, "not_an_image"),
        (bytes(600), "not_an_image"),
        (encode(COLOR, "GIF"), "unsupported_format"),
        (encode(COLOR, "JPEG2000"), "unsupported_format"),
        (gzip.compress(b"words"), "unsupported_format"),
        (gzip.compress(FILES["png"]), "unsupported_format"),
        (archive.getvalue(), "unsupported_format"),
    ):
        for read in (header_of, decode):
            with pytest.raises(Unreadable) as caught:
                read(data)
            assert caught.value.reason == reason


def test_dicom_with_the_start_of_a_tiff():
    # allowed by the standard: the 128 bytes in front belong to whoever wants them
    assert pydicom_file("MR_small_RLE.dcm").startswith(b"II*\0")
    assert header_of(pydicom_file("MR_small_RLE.dcm")).format == "dicom"


MISSING = {
    "dicom": ("pydicom", "dicom"),
    "nifti": ("nibabel", "nifti"),
    "hdf5": ("h5py", "hdf5"),
    "slide": ("openslide", "slides"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_reader_says_what_to_install(kind, monkeypatch):
    package, extra = MISSING[kind]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for name in list(sys.modules):
        if name.startswith(f"shards.formats.{kind}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(f"shards.formats.{kind if kind != 'slide' else 'slides'}", raising=False)
    data = make_slide(np.full((4096, 300, 3), 200, np.uint8)) if kind == "slide" else FILES[kind]
    with pytest.raises(Unreadable) as caught:
        header_of(data, "x.tif" if kind == "slide" else "x")
    assert caught.value.reason == "missing_reader"
    assert f"pip install 'frepa[{extra}]'" in str(caught.value)


def test_a_package_missing_inside_a_reader_is_a_bug(monkeypatch):
    def broken(kind: str) -> None:
        raise ModuleNotFoundError("No module named 'shards.gone'", name="shards.gone")

    monkeypatch.setattr("shards.formats.registry._load", broken)
    with pytest.raises(ModuleNotFoundError):
        header_of(FILES["dicom"])


def as_if_in_shards(function: FunctionType) -> FunctionType:
    return FunctionType(function.__code__, {"__name__": "shards.pretended", "json": json})


def test_faults_are_told_by_their_place():
    def bug() -> None:
        raise ValueError("a bug")

    def bad_data() -> None:
        json.loads("{")

    def bug_in_a_callback() -> None:
        json.loads("1", parse_int=lambda _: None + 1)

    with pytest.raises(Unreadable) as caught, decoder_faults("json"):
        as_if_in_shards(bad_data)()
    assert caught.value.__cause__ is None  # it may quote what is private
    assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match="a bug"), decoder_faults("json"):
        as_if_in_shards(bug)()
    with pytest.raises(json.JSONDecodeError), decoder_faults("PIL"):
        as_if_in_shards(bad_data)()
    with pytest.raises(TypeError), decoder_faults("json"):
        as_if_in_shards(bug_in_a_callback)()
    for error in (MemoryError, KeyboardInterrupt):
        with pytest.raises(error), decoder_faults("json"):
            raise error


def read_all(data: bytes, name: str) -> None:
    """Read a file as a build does; anything but pixels or a reason is an error."""
    options = ReadOptions(max_pixels=10**6)
    try:
        header = read_header(BytesBlob(data, name), options)
        with open_object(BytesBlob(data, name), options) as opened:
            for unit in range(min(header.num_units, 2)):
                pixels = opened.decode(unit).pixels
                assert pixels.dtype in (np.uint8, np.int16, np.uint16, np.float32)
                assert pixels.shape[0] * pixels.shape[1] <= 10**6
    except Unreadable as error:
        assert error.reason in REASONS  # noqa: PT017 (either outcome is right)


@pytest.mark.parametrize("kind", FILES)
def test_cut_files_give_a_reason_or_pixels(kind):
    data = FILES[kind]
    places = {0, 1, 4, 100, 131, 132, 140, 200, 344, 348, 351, 352, 353, len(data) - 1, len(data) - 9}
    places |= set(np.random.default_rng(0).integers(0, len(data), 25).tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in sorted(places):
            read_all(data[:place], name_of(kind))


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bits_give_a_reason_or_pixels(kind):
    data, rng, began = FILES[kind], np.random.default_rng(1), time.monotonic()
    # most damage is done near the start, where headers are
    near = rng.integers(0, min(len(data), 800), 60)
    anywhere = rng.integers(0, len(data), 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in [*near, *anywhere]:
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            read_all(bytes(damaged), name_of(kind))
    assert time.monotonic() - began < 60

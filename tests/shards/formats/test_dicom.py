"""DICOM: transfer syntaxes, what is no image, limits."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

import shards.formats.dicom
import shards.formats.dicom_pixels
from shards.formats.common import ReadOptions, Unreadable
from shards.formats.dicom import codestream_size, open_dicom
from shards.formats.magic import HEAD_BYTES
from shards.formats.registry import read_header
from shards.stores.blobs import BytesBlob
from tests.shards.formats.made import (
    decode,
    header_of,
    make_dicom,
    pydicom_file,
)
from tests.shards.images import draw, encode

GREY = draw(3, channels=1)
SIGNED = GREY.astype(np.int16) * 8 - 1000


def reason_of(data: bytes, **options: object) -> str:
    with pytest.raises(Unreadable) as caught:
        decode(data, "x.dcm", **options)
    return caught.value.reason


LOSSLESS = [
    ("MR_small_RLE.dcm", "MR_small.dcm"),
    ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
    ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ("MR_small_bigendian.dcm", "MR_small.dcm"),
    ("MR_small_implicit.dcm", "MR_small.dcm"),
    ("SC_rgb_rle.dcm", "SC_rgb_jpeg_gdcm.dcm"),  # JPEG lossless, first order prediction
]


@pytest.mark.parametrize(("name", "plain"), LOSSLESS)
def test_lossless_syntaxes_agree(name, plain):
    one, other = decode(pydicom_file(name)).pixels, decode(pydicom_file(plain)).pixels
    np.testing.assert_array_equal(one, other)
    assert one.std() > 10


LOSSY = {
    "SC_rgb_dcmtk_+eb+cr.dcm": ((100, 100, 3), np.uint8),  # JPEG baseline, RGB
    "SC_rgb_dcmtk_+eb+cy+np.dcm": ((100, 100, 3), np.uint8),  # YBR_FULL
    "SC_rgb_dcmtk_+eb+cy+s2.dcm": ((100, 100, 3), np.uint8),  # YBR_FULL_422
    "SC_rgb_gdcm_KY.dcm": ((100, 100, 3), np.uint8),  # JPEG 2000, YBR_ICT
    "SC_ybr_full_422_uncompressed.dcm": ((100, 100, 3), np.uint8),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_color_comes_close_to_the_picture_that_all_these_files_show(name):
    expected = decode(pydicom_file("SC_rgb_rle.dcm")).pixels.astype(int)
    pixels = decode(pydicom_file(name)).pixels
    assert (pixels.shape, pixels.dtype) == LOSSY[name]
    assert np.median(np.abs(pixels - expected)) <= 4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("693_J2KI.dcm", np.int16),  # JPEG 2000, lossy
        ("JPGExtended.dcm", np.int16),  # JPEG with 12 bits
        ("JPEGLSNearLossless_16.dcm", np.uint16),
        ("SC_rgb_rle_16bit.dcm", np.uint16),
        ("image_dfl.dcm", np.uint8),  # deflated
        ("examples_palette.dcm", np.uint8),
    ],
)
def test_other_syntaxes(name, dtype):
    data = pydicom_file(name)
    header, pixels = header_of(data), decode(data).pixels
    assert pixels.dtype == dtype
    assert pixels.shape == ((header.height, header.width, 3) if header.channels == 3 else pixels.shape[:2])
    assert header.is_deep == (dtype != np.uint8)
    assert pixels.std() > 1


def test_frames():
    data = pydicom_file("examples_ybr_color.dcm")
    header = header_of(data)
    assert (header.num_units, header.is_volume, header.series) == (30, True, None)
    frames = [decode(data, unit=unit).pixels for unit in (0, 1, 29)]
    assert all(frame.shape == (240, 320, 3) for frame in frames)
    assert all((one != other).any() for one, other in pairwise(frames))

    made = np.stack([GREY + n for n in range(3)])
    data = make_dicom(made, NumberOfFrames=3)
    for unit in range(3):
        np.testing.assert_array_equal(decode(data, unit=unit).pixels, made[unit])


def test_deflated():
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(SIGNED)))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert header_of(buffer.getvalue()).height == SIGNED.shape[0]
    np.testing.assert_array_equal(decode(buffer.getvalue()).pixels, SIGNED)


def test_a_file_without_a_preamble():
    whole = make_dicom(SIGNED)
    bare = whole[144 + int.from_bytes(whole[140:144], "little") :]  # without the file meta information too
    for data in (bare, whole[132:]):
        for name in ("x.dcm", "IM00001"):
            np.testing.assert_array_equal(decode(data, name).pixels, SIGNED)
    for name, reason in (("ExplVR_BigEndNoMeta.dcm", "no_pixels"), ("no_meta.dcm", "not_an_image")):
        assert reason_of(pydicom_file(name)) == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test-SR.dcm", "no_pixels"),
        ("DICOMDIR", "no_pixels"),
        ("rtplan.dcm", "no_pixels"),
        ("rtdose_1frame.dcm", "no_pixels"),
        ("liver_1frame.dcm", "no_pixels"),  # a segmentation
        ("waveform_ecg.dcm", "no_pixels"),
        ("MR_truncated.dcm", "truncated"),
        ("JPEG2000-embedded-sequence-delimiter.dcm", "damaged"),
    ],
)
def test_objects_without_images(name, reason):
    assert reason_of(pydicom_file(name)) == reason


def test_scouts_of_a_ct_are_left_out():
    data = make_dicom(SIGNED, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert reason_of(data) == "localizer"
    assert decode(make_dicom(SIGNED, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))


def test_no_more_than_the_head_is_read():
    class Counting(BytesBlob):
        num_read = 0

        def head(self, num_bytes: int) -> bytes:
            self.num_read = max(self.num_read, num_bytes)
            return super().head(num_bytes)

        def read(self) -> bytes:
            pytest.fail("read whole")

    large = np.zeros((1024, 1024), np.int16)
    blob = Counting(make_dicom(large), "x.dcm")
    assert read_header(blob, ReadOptions()).height == 1024
    assert blob.num_read == HEAD_BYTES
    private = pydicom.dcmread(io.BytesIO(make_dicom(large)))
    private.private_block(0x0009, "TEST", create=True).add_new(1, "OB", bytes(3 * HEAD_BYTES))
    buffer = io.BytesIO()
    private.save_as(buffer)
    blob = Counting(buffer.getvalue(), "x.dcm")
    assert read_header(blob, ReadOptions()).height == 1024
    assert HEAD_BYTES < blob.num_read < len(buffer.getvalue())


def test_more_pixels_than_allowed_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(shards.formats.dicom, "get_decoder", lambda *_: pytest.fail("decoded"))
    assert reason_of(make_dicom(GREY), max_pixels=GREY.size - 1) == "too_many_pixels"
    assert reason_of(make_dicom(GREY, Rows=65535, Columns=65535)) == "too_many_pixels"
    assert reason_of(make_dicom(GREY, NumberOfFrames=2_000_000_000)) == "too_many_units"
    assert reason_of(make_dicom(GREY, NumberOfFrames=-2)) == "damaged"
    assert reason_of(make_dicom(GREY, Rows=0)) == "damaged"


def test_fewer_pixels_than_claimed():
    assert reason_of(make_dicom(GREY, Rows=GREY.shape[0] * 4)) in ("truncated", "damaged")
    data = make_dicom(GREY)
    assert reason_of(data[:-500]) == "truncated"
    with pytest.raises(Unreadable) as caught:
        header_of(data[:-500])
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("side", [8000, 60000])
def test_a_frame_that_claims_to_be_larger_than_its_tags(side, monkeypatch):
    jpeg = bytearray(encode(GREY, "JPEG"))
    assert codestream_size(bytes(jpeg)) == GREY.shape
    at = jpeg.find(b"\xff\xc0") + 5
    jpeg[at : at + 4] = side.to_bytes(2, "big") * 2
    data = make_dicom(GREY, Modality="US", PixelData=encapsulate([bytes(jpeg)]), syntax=JPEGBaseline8Bit)
    monkeypatch.setattr(
        "pydicom.pixels.decoders.base.Decoder.as_array", lambda *_, **__: pytest.fail("decoded")
    )
    assert reason_of(data) == "damaged"


def test_sizes_in_codestreams():
    dataset = pydicom.dcmread(io.BytesIO(pydicom_file("MR_small_jp2klossless.dcm")))
    assert codestream_size(next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))) == (
        64,
        64,
    )
    assert codestream_size(b"\xff\xd8\xff\xff\xe0") is None
    assert codestream_size(b"") is None


def test_a_deflated_bomb_is_bounded(monkeypatch):
    monkeypatch.setattr(shards.formats.dicom, "_MAX_INFLATED_BYTES", 1 << 16)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(np.zeros((900, 900), np.uint8))))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert len(buffer.getvalue()) < 5000
    assert reason_of(buffer.getvalue()) == "too_many_pixels"


def test_values_that_do_not_begin_at_the_lowest_bit_are_refused():
    values = GREY.astype(np.uint16) * 16
    left = {"BitsStored": 12, "HighBit": 15}
    assert reason_of(make_dicom(values << 4, **left)) == "unsupported_format"
    assert reason_of(make_dicom(values << 4, BitsStored=12, HighBit=12)) == "unsupported_format"
    for high_bit in (11, None):  # 11 is what the standard asks for
        data = make_dicom(values, BitsStored=12, HighBit=high_bit)
        np.testing.assert_array_equal(decode(data, "x.dcm").pixels, values)


def test_an_unknown_syntax():
    data = make_dicom(GREY, PixelData=encapsulate([b"\1\2" * 50]), syntax=RLELossless)
    assert reason_of(data) == "damaged"
    data = make_dicom(GREY, PixelData=encapsulate([b"\1\2" * 50]), syntax="1.2.840.10008.1.2.4.100")  # MPEG2
    assert reason_of(data) == "unsupported_format"


def test_a_decoder_that_is_not_installed(monkeypatch):
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(Unreadable) as caught:
        decode(pydicom_file("MR_small_jpeg_ls_lossless.dcm"))
    assert caught.value.reason == "missing_reader"
    assert "JPEG-LS" in str(caught.value)
    assert "frepa[dicom]" in str(caught.value)


def test_a_bug_of_ours_is_not_bad_data(monkeypatch):
    monkeypatch.setattr(shards.formats.dicom_pixels, "_narrow", lambda *_, **__: None + 1)
    with pytest.raises(TypeError):
        decode(make_dicom(SIGNED))


def test_a_closed_object_gives_nothing_up():
    opened = open_dicom(BytesBlob(make_dicom(np.stack([GREY, GREY]), NumberOfFrames=2)), ReadOptions())
    assert sum(1 for _ in opened.arrays()) == 2
    opened.close()


def test_the_reader_is_imported_only_when_it_is_needed():
    code = (
        "import sys, shards.formats.registry; "
        "print([m for m in ('pydicom', 'nibabel', 'h5py', 'openslide') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

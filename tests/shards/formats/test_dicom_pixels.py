"""DICOM: the pipeline from stored values to the modality's."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from tests.shards.formats.made import (
    MR,
    XRAY,
    decode,
    make_dicom,
)
from tests.shards.images import draw

GREY = draw(3, channels=1)
DEEP = GREY.astype(np.uint16) << 4
SIGNED = GREY.astype(np.int16) * 8 - 1000


def test_ct_becomes_hounsfield_units():
    data = make_dicom(DEEP, RescaleSlope=1, RescaleIntercept=-1024)
    decoded = decode(data)
    assert decoded.is_hounsfield
    assert decoded.pixels.dtype == np.int16
    np.testing.assert_array_equal(decoded.pixels, DEEP.astype(int) - 1024)
    assert not decode(make_dicom(DEEP, Modality="MR", RescaleSlope=1, RescaleIntercept=-1024)).is_hounsfield
    other_unit = make_dicom(DEEP, RescaleSlope=1, RescaleIntercept=-1024, RescaleType="US")
    assert not decode(other_unit).is_hounsfield
    assert not decode(make_dicom(GREY)).is_hounsfield


def test_a_fractional_slope():
    decoded = decode(make_dicom(DEEP, RescaleSlope="0.25", RescaleIntercept="3.5"))
    assert decoded.pixels.dtype == np.float32
    np.testing.assert_allclose(decoded.pixels, DEEP * 0.25 + 3.5)


def test_rescaling_by_frame():
    def item(slope: int) -> Dataset:
        transformation, groups = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, -slope
        groups.PixelValueTransformationSequence = [transformation]
        return groups

    frames = np.stack([DEEP, DEEP])
    data = make_dicom(frames, NumberOfFrames=2, PerFrameFunctionalGroupsSequence=[item(1), item(2)])
    for unit in (0, 1):
        pixels = decode(data, unit=unit).pixels
        np.testing.assert_array_equal(pixels, (DEEP.astype(int) - 1) * (unit + 1))
    shared = make_dicom(frames, NumberOfFrames=2, SharedFunctionalGroupsSequence=[item(3)])
    np.testing.assert_array_equal(decode(shared, unit=1).pixels, (DEEP.astype(int) - 1) * 3)


def lookup_table(entries: list[int], first: int = 0) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, 16])
    item.add_new("LUTData", "US", entries)
    return [item]


def test_a_modality_table():
    entries = [(n * n) % 5000 for n in range(256)]
    table = make_dicom(GREY.astype(np.uint16), Modality="CR", ModalityLUTSequence=lookup_table(entries, 10))
    expected = np.array(entries)[np.clip(GREY.astype(int) - 10, 0, 255)]
    np.testing.assert_array_equal(decode(table).pixels, expected)


def test_monochrome1_is_inverted_with_its_window():
    xray = {"Modality": "DX", "SOPClassUID": XRAY, "PhotometricInterpretation": "MONOCHROME1"}
    decoded = decode(make_dicom(GREY, **xray))
    assert decoded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(decoded.pixels, 255 - GREY)
    deep = decode(make_dicom(DEEP, **xray, BitsStored=12, WindowCenter=1000, WindowWidth=401))
    np.testing.assert_array_equal(deep.pixels, 4095 - DEEP.astype(int))
    assert deep.window == (4095 - 1199.5, 4095 - 799.5)
    scaled = decode(make_dicom(DEEP, **xray, BitsStored=12, RescaleSlope=2, RescaleIntercept=5))
    np.testing.assert_array_equal(scaled.pixels, (4095 * 2 + 10) - (DEEP.astype(int) * 2 + 5))


@pytest.mark.parametrize(
    ("function", "window"),
    [(None, (0.0, 399.0)), ("LINEAR_EXACT", (0.0, 400.0)), ("SIGMOID", (0.0, 400.0))],
)
def test_windows_are_passed_on(function, window):
    data = make_dicom(DEEP, WindowCenter=[200, 40], WindowWidth=[400, 80], VOILUTFunction=function)
    assert decode(data).window == window
    assert decode(make_dicom(DEEP, WindowCenter=40, WindowWidth=0)).window is None
    assert decode(make_dicom(DEEP)).window is None


def test_the_window_of_a_voi_table():
    table = lookup_table([5, 5, 5, 9, 12, 14, 14, 14], first=100)
    assert decode(make_dicom(DEEP, VOILUTSequence=table)).window == (102.0, 105.0)
    assert decode(make_dicom(DEEP, VOILUTSequence=lookup_table([7, 7]))).window is None


def test_padding_becomes_the_lowest_value():
    pixels = SIGNED.copy()
    pixels[:5], pixels[5:9] = -2000, -1990
    ct = make_dicom(pixels, PixelPaddingValue=-2000, RescaleSlope=1, RescaleIntercept=0)
    assert (decode(ct).pixels[:5] == -1024).all()
    assert (decode(ct).pixels[5:9] == -1990).all()
    both = make_dicom(
        pixels, Modality="MR", SOPClassUID=MR, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990
    )
    values = decode(both).pixels
    assert (values[:9] == SIGNED[9:].min()).all()
    np.testing.assert_array_equal(values[9:], SIGNED[9:])

    white = DEEP.copy()
    white[:5] = 4095  # the collimated rim of an inverted X-ray
    xray = make_dicom(
        white,
        Modality="CR",
        SOPClassUID=XRAY,
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=12,
        PixelPaddingValue=4095,
    )
    values = decode(xray).pixels
    assert (values[:5] == values[5:].min()).all()
    wrong_sign = pydicom.dcmread(io.BytesIO(make_dicom(pixels, Modality="MR", SOPClassUID=MR)))
    wrong_sign.add_new("PixelPaddingValue", "US", 65536 - 2000)
    buffer = io.BytesIO()
    wrong_sign.save_as(buffer)
    assert (decode(buffer.getvalue()).pixels[:5] == -1990).all()


def test_bits_that_do_not_fill_a_byte():
    six = GREY >> 2
    values = decode(make_dicom(six, Modality="US", BitsStored=6)).pixels
    assert values.dtype == np.uint8
    np.testing.assert_allclose(values, six * (255 / 63), atol=0.5)


def test_a_palette_gives_its_colors():
    tables = {}
    for number, color in enumerate(("Red", "Green", "Blue")):
        entries = ((np.arange(256) * (number + 1)) % 256).astype(np.uint16) * 257
        tables[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{color}PaletteColorLookupTableData"] = entries.tobytes()
    pixels = decode(
        make_dicom(GREY, Modality="US", PhotometricInterpretation="PALETTE COLOR", **tables)
    ).pixels
    expected = np.stack([GREY.astype(int) * n % 256 for n in (1, 2, 3)], axis=-1)
    np.testing.assert_array_equal(pixels, expected)

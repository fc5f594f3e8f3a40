"""NIfTI: which voxel lands where, scaling, units, gzip, limits."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest

import shards.formats.volumes
from shards.formats.common import ReadOptions, Unreadable
from shards.formats.intensity import IntensityRule, measure_window, to_stored
from shards.formats.magic import HEAD_BYTES
from shards.formats.nifti import open_nifti
from shards.formats.registry import open_object, read_header
from shards.stores.blobs import BytesBlob, FileBlob
from tests.shards.formats.made import decode, header_of, make_nifti

VOLUME = np.random.default_rng(0).integers(0, 3000, (7, 6, 5)).astype(np.int16)  # right, front, top


def reason_of(data: bytes, **options: object) -> str:
    with pytest.raises(Unreadable) as caught:
        decode(data, **options)
    return caught.value.reason


EXPECTED = {  # rows, then columns, of the first slice: written out, not computed by the reader's rule
    "axial": lambda v, k: [[v[x, y, k] for x in (6, 5, 4, 3, 2, 1, 0)] for y in (5, 4, 3, 2, 1, 0)],
    "coronal": lambda v, k: [[v[x, k, z] for x in (6, 5, 4, 3, 2, 1, 0)] for z in (4, 3, 2, 1, 0)],
    "sagittal": lambda v, k: [[v[k, y, z] for y in (5, 4, 3, 2, 1, 0)] for z in (4, 3, 2, 1, 0)],
}
NUM_SLICES = {"axial": 5, "coronal": 6, "sagittal": 7}


@pytest.mark.parametrize("axis", EXPECTED)
@pytest.mark.parametrize("is_gzip", [False, True])
def test_slices_are_seen_as_in_dicom(axis, is_gzip):
    data = make_nifti(VOLUME, is_gzip=is_gzip)
    header = header_of(data, slice_axis=axis)
    assert header.num_units == NUM_SLICES[axis]
    assert header.is_volume
    for unit in (0, NUM_SLICES[axis] - 1):
        pixels = decode(data, unit=unit, slice_axis=axis).pixels
        np.testing.assert_array_equal(pixels, EXPECTED[axis](VOLUME, unit))
        assert pixels.shape == (header.height, header.width)
        assert pixels.dtype == np.int16


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SLA", "IAL"])
@pytest.mark.parametrize("axis", EXPECTED)
def test_any_orientation_gives_the_same_slices(codes, axis):
    image = nibabel.Nifti1Image(VOLUME, np.diag([1.0, 2, 3, 1]))
    to = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(to)
    assert nibabel.aff2axcodes(turned.affine) == tuple(codes)
    data = make_nifti(np.asarray(turned.dataobj), affine=turned.affine)
    for unit in range(NUM_SLICES[axis]):
        pixels = decode(data, unit=unit, slice_axis=axis).pixels
        np.testing.assert_array_equal(pixels, EXPECTED[axis](VOLUME, unit))
    facts = header_of(data, slice_axis=axis).facts
    assert facts["slice_thickness_mm"] == {"axial": 3, "coronal": 2, "sagittal": 1}[axis]


def test_volumes_follow_each_other():
    series = np.stack([VOLUME, VOLUME + 1, VOLUME + 2], axis=3)
    data = make_nifti(series)
    assert header_of(data).num_units == 15
    for unit in (0, 4, 5, 14):
        expected = EXPECTED["axial"](series[..., unit // 5], unit % 5)
        np.testing.assert_array_equal(decode(data, unit=unit).pixels, expected)


def test_scaling():
    data = make_nifti(VOLUME, slope=0.5, inter=-7)
    decoded = decode(data)
    assert decoded.pixels.dtype == np.float32
    np.testing.assert_allclose(decoded.pixels, np.array(EXPECTED["axial"](VOLUME, 0)) * 0.5 - 7)


@pytest.mark.parametrize(
    ("stored", "given"),
    [("u1", "u1"), ("i1", "i2"), ("u2", "u2"), ("i4", "f4"), ("f4", "f4"), ("f8", "f4"), (">i2", "i2")],
)
def test_types(stored, given):
    volume = (VOLUME % 100).astype(stored)
    decoded = decode(make_nifti(volume))
    assert decoded.pixels.dtype == np.dtype(given)
    np.testing.assert_array_equal(decoded.pixels, EXPECTED["axial"](VOLUME % 100, 0))


def test_color():
    volume = np.zeros((7, 6, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    volume["R"], volume["B"] = VOLUME % 256, 9
    data = make_nifti(volume)
    pixels = decode(data).pixels
    assert header_of(data).channels == 3
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[..., 0], EXPECTED["axial"](VOLUME % 256, 0))
    assert (pixels[..., 1] == 0).all()
    assert (pixels[..., 2] == 9).all()


def test_hounsfield_units_are_told_by_air_anywhere_in_the_volume():
    ct = VOLUME.copy() % 100
    ct[0, 0, 4] = -1000  # only the last slice has air
    assert [decode(make_nifti(ct), unit=unit).is_hounsfield for unit in (0, 4)] == [True, True]
    assert not decode(make_nifti(VOLUME)).is_hounsfield
    assert decode(make_nifti((ct + 1024).astype(np.uint16), inter=-1024)).is_hounsfield
    rule = IntensityRule(kind="hounsfield", scope="volume")
    assert to_stored(decode(make_nifti(ct)), rule).dtype == np.int16


def test_one_window_for_the_volume():
    with open_object(BytesBlob(make_nifti(VOLUME)), ReadOptions()) as opened:
        window = measure_window(opened.arrays(), IntensityRule())
    np.testing.assert_allclose(window, np.percentile(VOLUME, (0.5, 99.5)))
    assert decode(make_nifti(VOLUME, cal_min=5, cal_max=900)).window == (5, 900)
    assert decode(make_nifti(VOLUME)).window is None


def test_flat_pictures_and_affines_that_say_nothing():
    flat = make_nifti(VOLUME[:, :, 0])
    assert header_of(flat).num_units == 1
    assert not header_of(flat).is_volume
    np.testing.assert_array_equal(decode(flat).pixels, EXPECTED["axial"](VOLUME, 0))
    empty = make_nifti(VOLUME, srow_x=0, srow_y=0, srow_z=0)
    np.testing.assert_array_equal(decode(empty).pixels, EXPECTED["axial"](VOLUME, 0))


def test_files_are_read_piece_by_piece(tmp_path, monkeypatch):
    path = tmp_path / "x.nii"
    path.write_bytes(make_nifti(VOLUME))
    monkeypatch.setattr(FileBlob, "read", lambda _: pytest.fail("read whole"))
    blob = FileBlob(str(path), path.stat().st_size)
    with open_object(blob, ReadOptions()) as opened:
        np.testing.assert_array_equal(opened.decode(2).pixels, EXPECTED["axial"](VOLUME, 2))


def test_the_header_needs_only_the_head(monkeypatch):
    class Head(BytesBlob):
        def head(self, num_bytes: int) -> bytes:
            assert num_bytes <= HEAD_BYTES
            return super().head(num_bytes)

        def read(self) -> bytes:
            pytest.fail("read whole")

    noise = np.random.default_rng(1).integers(0, 30000, (64, 64, 40)).astype(np.int16)
    assert read_header(Head(make_nifti(noise, is_gzip=True), "x.nii.gz"), ReadOptions()).num_units == 40


def test_a_large_volume_is_inflated_into_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(shards.formats.volumes, "_MAX_IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = make_nifti(VOLUME, is_gzip=True)
    with open_object(BytesBlob(data), ReadOptions()) as opened:
        np.testing.assert_array_equal(opened.decode(3).pixels, EXPECTED["axial"](VOLUME, 3))
    assert list(tmp_path.iterdir()) == []


def test_several_gzip_members_are_one_stream():
    plain = make_nifti(VOLUME)
    data = gzip.compress(plain[:500]) + gzip.compress(plain[500:])
    np.testing.assert_array_equal(decode(data, "x.nii.gz").pixels, EXPECTED["axial"](VOLUME, 0))


def test_cut_and_damaged_files():
    for is_gzip in (False, True):
        data = make_nifti(VOLUME, is_gzip=is_gzip)
        assert reason_of(data[: len(data) * 2 // 3]) == "truncated"
    flipped = bytearray(make_nifti(VOLUME, is_gzip=True))
    flipped[-6] ^= 1  # the sum at the end
    assert reason_of(bytes(flipped)) == "damaged"


def test_claims_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("shards.formats.nifti.inflate_gzip", lambda *_: pytest.fail("inflated"))

    def claim(*dims: int, **options: object) -> str:
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.int16)
        header["dim"][: len(dims) + 1] = (len(dims), *dims)
        header["vox_offset"] = 352
        return reason_of(gzip.compress(header.binaryblock + bytes(200_000)), **options)

    assert claim(30000, 30000, 3) == "too_many_pixels"
    assert claim(9000, 9000, 60) == "too_many_pixels"  # 9.7 GB
    assert claim(512, 512, 300) == "truncated"  # more than gzip can make of this file
    assert claim(1, 1, 20000, 100) == "too_many_units"
    assert claim(50, 50, 3, max_pixels=2499) == "too_many_pixels"


def test_what_is_no_image():
    assert reason_of(make_nifti(VOLUME.astype(np.complex64))) == "unsupported_format"
    vectors = np.zeros((7, 6, 5, 1, 3), np.float32)
    assert reason_of(make_nifti(vectors)) == "unsupported_format"
    assert reason_of(gzip.compress(b"words " * 100)) == "unsupported_format"
    pair = bytearray(make_nifti(VOLUME))
    pair[344:348] = b"ni1\0"
    assert reason_of(bytes(pair)) == "unsupported_format"


def test_nifti_2():
    image = nibabel.Nifti2Image(VOLUME, np.eye(4))
    data = image.to_bytes()
    np.testing.assert_array_equal(decode(data).pixels, EXPECTED["axial"](VOLUME, 0))
    assert header_of(gzip.compress(data)).num_units == 5


def test_closing_frees_the_file(tmp_path):
    opened = open_nifti(BytesBlob(make_nifti(VOLUME), "x.nii"), ReadOptions())
    assert len(list(opened.arrays())) == 5
    opened.close()

"""NPY, NPZ and HDF5: what axes mean, what is refused, what is read."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

import shards.formats.volumes
from shards.formats.common import ReadOptions, Unreadable
from shards.formats.registry import open_object, read_header
from shards.stores.blobs import BytesBlob, FileBlob
from tests.shards.formats.made import decode, header_of, make_hdf5, make_npy, make_npz
from tests.shards.images import draw

MAKERS = {
    "npy": make_npy,
    "npz": lambda array: make_npz(data=array),
    "hdf5": make_hdf5,
    "hdf5 in chunks": lambda array: make_hdf5(array, chunks=True, compression="gzip"),
}
NAMES = {"npy": "x.npy", "npz": "x.npz", "hdf5": "x.h5", "hdf5 in chunks": "x.h5"}
COLOR, GREY = draw(0), draw(1, channels=1)


def reason_of(data: bytes, name: str, **options: object) -> str:
    reasons = set()
    for read in (header_of, decode):
        with pytest.raises(Unreadable) as caught:
            read(data, name, **options)
        reasons.add(caught.value.reason)
    assert len(reasons) == 1, reasons
    return reasons.pop()


LAYOUTS = {  # array, units, is it a volume, the last unit's pixels
    "grey": (GREY, 1, False, GREY),
    "color": (COLOR, 1, False, COLOR),
    "channels first": (COLOR.transpose(2, 0, 1), 1, False, COLOR),
    "one channel": (GREY[:, :, None], 1, False, GREY),
    "one channel first": (GREY[None], 1, False, GREY),
    "volume": (np.stack([GREY // 2, GREY // 3, GREY // 4, GREY]), 4, True, GREY),
    "colors": (np.stack([COLOR // 2, COLOR]), 2, False, COLOR),
    "colors first": (np.stack([COLOR // 2, COLOR]).transpose(0, 3, 1, 2), 2, False, COLOR),
    "grey, one channel": (np.stack([GREY // 2, GREY])[:, None], 2, False, GREY),
    "grey, one channel last": (np.stack([GREY // 2, GREY])[..., None], 2, False, GREY),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind, layout):
    array, num_units, is_volume, expected = LAYOUTS[layout]
    data = MAKERS[kind](array)
    header = header_of(data, NAMES[kind])
    decoded = decode(data, NAMES[kind], unit=num_units - 1)
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert decoded.pixels.flags["C_CONTIGUOUS"]
    assert not decoded.is_verbatim
    assert (header.num_units, header.is_volume, header.is_deep) == (num_units, is_volume, False)
    assert (header.height, header.width) == expected.shape[:2]
    assert header.channels == (3 if expected.ndim == 3 else 1)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("stored", "given"),
    [("?", "u1"), ("i1", "i2"), ("<u2", "u2"), (">u2", "u2"), ("i8", "f4"), ("f2", "f4"), ("f8", "f4")],
)
def test_types(kind, stored, given):
    array = (GREY > 100) if stored == "?" else (GREY % 100).astype(stored)
    pixels = decode(MAKERS[kind](array), NAMES[kind]).pixels
    assert pixels.dtype == np.dtype(given)
    np.testing.assert_array_equal(pixels, array * np.uint8(255) if stored == "?" else array)


@pytest.mark.parametrize("kind", MAKERS)
def test_fortran_order(kind):
    volume = np.asfortranarray(np.stack([GREY, GREY // 2, GREY // 3, GREY // 4]))
    np.testing.assert_array_equal(decode(MAKERS[kind](volume), NAMES[kind], unit=1).pixels, GREY // 2)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_refused(kind):
    make, name = MAKERS[kind], NAMES[kind]
    assert reason_of(make(np.zeros((4, 5, 6, 7, 8), np.uint8)), name) == "unsupported_format"
    assert reason_of(make(np.zeros((9, 4, 5, 6), np.uint8)), name) == "unsupported_format"
    assert reason_of(make(np.zeros(50, np.uint8)), name) == "unsupported_format"
    assert reason_of(make(np.zeros((8, 8), np.complex64)), name) == "unsupported_format"
    assert reason_of(make(np.zeros((8, 8), [("a", "u1"), ("b", "f4")])), name) == "unsupported_format"
    assert reason_of(make(np.zeros((8, 0), np.uint8)), name) == "unsupported_format"
    assert reason_of(make(GREY), name, max_pixels=GREY.size - 1) == "too_many_pixels"
    assert decode(make(GREY), name, max_pixels=GREY.size)


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/tmp/frepa-unpickled"),)  # noqa: S108


def test_pickles_are_never_loaded(monkeypatch):
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    objects = np.array([[Bomb(), Bomb()], [None, 1]], object)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, objects, allow_pickle=True)
    assert reason_of(buffer.getvalue(), "x.npy") == "unsupported_format"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.npy", buffer.getvalue())
    assert reason_of(archive.getvalue(), "x.npz") == "unsupported_format"
    assert not Path("/tmp/frepa-unpickled").exists()  # noqa: S108


def npy_claiming(*shape: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(5000)


def test_claims_are_refused_before_anything_is_read():
    for shape, reason in (
        ((100, 200), "truncated"),
        ((10**6, 10**6), "too_many_pixels"),
        ((10**9, 64, 64), "too_many_units"),
        ((10**5, 640, 640), "too_many_pixels"),
    ):
        data = npy_claiming(*shape)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("data.npy", data)
        for name, content in (("x.npy", data), ("x.npz", archive.getvalue())):
            with pytest.raises(Unreadable) as caught:
                decode(content, name)
            assert caught.value.reason == reason


def test_hdf5_that_claims_more_than_it_holds():
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("data", (1000, 2000, 2000), np.uint16, chunks=(1, 2000, 2000), compression="gzip")
    assert len(buffer.getvalue()) < 10_000
    assert reason_of(buffer.getvalue(), "x.h5") == "truncated"
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("data", (4000, 2000, 2000), np.uint16, chunks=(4000, 2000, 2000))
    assert reason_of(buffer.getvalue(), "x.h5") == "too_many_pixels"


def test_a_zip_bomb_is_inflated_no_further_than_its_header_says(monkeypatch):
    content = make_npy(GREY) + bytes(50_000_000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.npy", content)
    taken = []
    monkeypatch.setattr(shards.formats.arrays, "_CHUNK_BYTES", 10_000)
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: (taken.append(n), read(self, n))[1])
    np.testing.assert_array_equal(decode(archive.getvalue(), "x.npz").pixels, GREY)
    assert 0 <= sum(taken) < 50_000


def test_keys():
    for make, name in ((make_hdf5, "x.h5"),):
        data = make(GREY, "scan/raw")
        np.testing.assert_array_equal(decode(data, name, hdf5_key="scan/raw").pixels, GREY)
        np.testing.assert_array_equal(decode(data, name, hdf5_key="/scan/raw/").pixels, GREY)
        for key in ("data", "scan", "scan/raw/more", "scan/other", ""):
            assert reason_of(data, name, hdf5_key=key) == "no_array"
    two = make_npz(first=COLOR, second=GREY)
    np.testing.assert_array_equal(decode(two, "x.npz", hdf5_key="second").pixels, GREY)
    assert reason_of(two, "x.npz") == "no_array"
    np.testing.assert_array_equal(decode(make_npz(arr_0=GREY), "x.npz").pixels, GREY)


def test_hdf5_may_not_reach_outside(tmp_path):
    secret = tmp_path / "secret.h5"
    secret.write_bytes(make_hdf5(GREY))
    raw = tmp_path / "secret.raw"
    raw.write_bytes(GREY.tobytes())

    def linking(make) -> bytes:
        path = tmp_path / "link.h5"
        with h5py.File(path, "w") as file:
            make(file)
        return path.read_bytes()

    def external_link(file):
        file["data"] = h5py.ExternalLink(str(secret), "data")

    def external_group(file):
        file["scan"] = h5py.ExternalLink(str(secret), "/")

    def soft_link(file):
        file["real"] = GREY
        file["data"] = h5py.SoftLink("/real")

    def external_storage(file):
        file.create_dataset("data", GREY.shape, np.uint8, external=[(str(raw), 0, GREY.size)])

    def virtual(file):
        layout = h5py.VirtualLayout(GREY.shape, np.uint8)
        layout[:] = h5py.VirtualSource(str(secret), "data", GREY.shape)
        file.create_virtual_dataset("data", layout)

    for make in (external_link, soft_link, external_storage, virtual):
        assert reason_of(linking(make), "x.h5") == "unsupported_format", make.__name__
    assert reason_of(linking(external_group), "x.h5", hdf5_key="scan/data") == "unsupported_format"


def test_one_image_of_many_is_read_alone(tmp_path, monkeypatch):
    volume = np.arange(200 * 64 * 64, dtype=np.uint32).reshape(200, 64, 64).astype(np.uint16)
    monkeypatch.setattr(FileBlob, "read", lambda _: pytest.fail("read whole"))
    for kind in ("npy", "npz", "hdf5 in chunks"):
        path = tmp_path / NAMES[kind]
        path.write_bytes(MAKERS[kind](volume))
        blob = FileBlob(str(path), path.stat().st_size)
        assert read_header(blob, ReadOptions()).num_units == 200
        with open_object(blob, ReadOptions()) as opened:
            np.testing.assert_array_equal(opened.decode(123).pixels, volume[123])

    reads = []
    original = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset,
        "__getitem__",
        lambda self, args, **k: (reads.append(args), original(self, args, **k))[1],
    )
    decode(make_hdf5(volume), "x.h5", unit=7)
    assert reads == [7]


def test_hounsfield_units_are_told_by_air():
    ct = np.stack([GREY.astype(np.int16)] * 30)
    ct[20:] -= 1000
    for kind in MAKERS:
        assert decode(MAKERS[kind](ct), NAMES[kind]).is_hounsfield
        assert not decode(MAKERS[kind](ct + 1000), NAMES[kind]).is_hounsfield


def test_all_images_of_an_array():
    with open_object(BytesBlob(make_npy(np.stack([GREY] * 4)), "x.npy"), ReadOptions()) as opened:
        assert [array.shape for array in opened.arrays()] == [GREY.shape] * 4

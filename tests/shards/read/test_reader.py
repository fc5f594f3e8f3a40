"""Reading by index: the right pixels, and an error that names the sample for every kind of damage."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zstandard

import shards.read.access
from shards.dataset import load_snapshot, read_index
from shards.decoding import Stored, decode_image, decode_map
from shards.hf.tokens import HFParams
from shards.read.kept import KeptSamples, exclusion_rows
from shards.read.reader import ShardReader
from shards.schema import hf_tar_path, index_path
from shards.stores.store import LocalStore
from shards.support.errors import DataError, EnvironmentFault

SHARD = "fundus/tiny-000001.tar"


@pytest.fixture
def root(tmp_path, write_dataset) -> Path:
    write_dataset(tmp_path, {"fundus": [10, 10, 10], "xray": [5]}, duplicates=(3, 12, 19))
    return tmp_path


@pytest.fixture
def reader(root) -> ShardReader:
    return ShardReader(root, load_snapshot(root))


def member_range(root: Path, shard: int, row: int, member: str) -> tuple[int, int]:
    table = read_index(root, load_snapshot(root).shards[shard])
    return table[f"{member}_offset"][row].as_py(), table[f"{member}_size"][row].as_py()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_samples_are_what_was_stored(reader, draw_image):
    for number in range(30):
        shard, row = divmod(number, 10)
        sample, image = reader.read(shard, row), draw_image(number)
        assert sample.key == f"sample{number:05d}"
        assert sample.image.shape == image.shape
        assert sample.image.dtype == np.uint8
        if number % 2 == 0:  # stored as PNG
            np.testing.assert_array_equal(sample.image, image)
        elif number % 5:  # JPEG of noise is coarse, but the channels are where they were
            errors = [
                [np.abs(1.0 * sample.image[..., a] - image[..., b]).mean() for a in range(3)]
                for b in range(3)
            ]
            assert np.argmin(errors, axis=1).tolist() == [0, 1, 2]
        assert sample.hf_map.shape == (image.shape[0] // 4, image.shape[1] // 4)
        assert sample.hf_map.max() == 255
        image_bytes, map_bytes = reader.read_bytes(shard, row), reader.read_bytes(shard, row, "hfmap")
        assert sample.num_bytes == len(image_bytes) + len(map_bytes)
        assert reader.labels(shard, row) == {"class": number % 3}


@pytest.mark.parametrize("member", ["image", "hfmap"])
def test_a_flipped_bit_is_noticed(reader, root, member):
    offset, size = member_range(root, 1, 4, member)
    flip_byte(root / SHARD, offset + size // 2)
    with pytest.raises(DataError, match=rf"{SHARD}, sample sample00014: .*{member}.*crc32c"):
        reader.read(1, 4)
    reader.read(1, 3)
    reader.read(1, 5)


def test_a_shard_that_was_cut_loses_only_what_it_lacks(reader, root):
    offset, size = member_range(root, 1, 6, "image")
    os.truncate(root / SHARD, offset + size - 1)
    for row in range(6):
        reader.read(1, row)
    with pytest.raises(DataError, match=rf"{SHARD}, sample sample00016: .*cut short: {size - 1} of {size}"):
        reader.read(1, 6)
    with pytest.raises(DataError, match="cut short: 0 of"):
        reader.read(1, 9)


def test_a_missing_shard_and_a_missing_index_are_named(reader, root):
    (root / SHARD).unlink()
    with pytest.raises(DataError, match=rf"{SHARD}, sample sample00010: .*no such file"):
        reader.read(1, 0)
    (root / index_path(SHARD)).unlink()
    blind = ShardReader(root, reader.snapshot)
    for _ in range(2):
        with pytest.raises(DataError, match=r"tiny-000001\.index\.parquet: no such file") as caught:
            blind.read(1, 0)
        assert len(caught.traceback) < 6  # the error that is remembered does not collect tracebacks
    assert reader.where(1, 0).endswith(f"{SHARD}, sample sample00010")
    assert ShardReader(root, reader.snapshot).where(1, 7).endswith(f"{SHARD}, row 7")


def test_bytes_that_are_no_image_or_no_map():
    with pytest.raises(DataError, match="here: decodes to nothing, the index says 4 x 5"):
        decode_image(b"not an image", Stored("png", "uint8", 4, 5, 3), "here")
    wrong = [b"not npy", b"", npy(np.zeros((3, 4), np.int16)), npy(np.zeros(5, np.uint8))]
    wrong += [npy(np.zeros((0, 4), np.uint8)), npy(np.zeros((3, 4), np.uint8))[:-1]]
    for data in (b"not zstd", *map(zstandard.compress, wrong)):
        with pytest.raises(DataError, match="here: the response map cannot be decoded"):
            decode_map(data, "here")
    for array in (np.zeros((4, 5), np.uint8), np.zeros((4, 5), ">i2"), np.zeros((4, 5, 1), np.int16)):
        with pytest.raises(DataError, match="here: the image cannot be decoded"):
            decode_image(zstandard.compress(npy(array)), Stored("npy.zst", "int16", 4, 5, 1), "here")
    data = zstandard.compress(npy(np.zeros((4, 6), np.int16)))
    with pytest.raises(DataError, match="here: decodes to 4 x 6 pixels"):
        decode_image(data, Stored("npy.zst", "int16", 4, 5, 1), "here")


def test_an_image_of_another_size_than_the_index_says(reader):
    reader._index(0).numbers["width"][2] += 1
    with pytest.raises(DataError, match="sample00002: decodes to 64 x 64 pixels, the index says 64 x 65"):
        reader.read(0, 2)


def test_open_files_are_bounded(root, monkeypatch):
    def num_open() -> int:
        links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum(link.is_symlink() and os.readlink(link).startswith(str(root)) for link in links)

    monkeypatch.setattr(shards.read.access, "MAX_OPEN_SHARDS", 2)
    reader = ShardReader(root, load_snapshot(root))
    for row in range(4):
        for shard in range(4):
            assert reader.read(shard, row).key
            assert num_open() <= 2
    for shard in (0, 1, 0, 2):
        reader.read(shard, 0)
    paths = [reader.snapshot.shards[shard].path for shard in (0, 2)]
    assert list(reader._access._descriptors) == paths  # the one that was used least recently was closed
    del reader
    assert num_open() == 0


def test_a_copy_for_another_process_opens_files_of_its_own(reader):
    reader.read(0, 0)
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._access._descriptors
    np.testing.assert_array_equal(copy.read(0, 1).image, reader.read(0, 1).image)


def test_exclusions_and_the_numbering_of_what_is_left(root):
    snapshot = load_snapshot(root)
    exclusions = exclusion_rows(root, snapshot)
    assert {shard: rows.tolist() for shard, rows in exclusions.items()} == {0: [3], 1: [2, 9]}
    left = [(s, r) for s, n in enumerate((10, 10, 10, 5)) for r in range(n) if r not in exclusions.get(s, ())]
    kept = KeptSamples(snapshot, exclusions)
    assert [kept.locate(i) for i in range(len(kept))] == left
    xray = KeptSamples(snapshot, exclusions, "xray")
    assert [xray.locate(i) for i in range(len(xray))] == [(3, row) for row in range(5)]


def test_no_duplicates_no_exclusions(tmp_path, write_dataset):
    assert exclusion_rows(tmp_path, write_dataset(tmp_path, {"fundus": [3]})) == {}


def test_a_table_of_duplicates_that_names_strangers(tmp_path, write_dataset):
    snapshot = write_dataset(tmp_path, {"fundus": [5, 5]}, duplicates=(9,))
    short = snapshot.shards[1].model_copy(update={"num_samples": 4})
    for infos in ([snapshot.shards[0]], [snapshot.shards[0], short]):
        with pytest.raises(DataError, match=r"tables/duplicates.*names samples that are not there"):
            exclusion_rows(tmp_path, snapshot.model_copy(update={"shards": infos}))


def test_hounsfield_units_come_back_as_they_were(tmp_path, write_dataset, draw_image):
    reader = ShardReader(tmp_path, write_dataset(tmp_path, {"ct": [4], "fundus": [2]}))
    for number in range(4):
        sample = reader.read(0, number)
        assert sample.image.dtype == np.int16
        np.testing.assert_array_equal(sample.image, draw_image(number, "ct"))
    assert reader.read(1, 0).image.dtype == np.uint8


def test_many_are_read_in_the_order_asked_and_errors_stay_in_place(reader, root):
    offset, size = member_range(root, 1, 4, "image")
    flip_byte(root / SHARD, offset + size // 2)
    places = [(2, 3), (1, 4), (0, 0), (1, 5), (2, 3)]
    samples = list(reader.read_many(places))
    assert isinstance(samples[1], DataError)
    for place, sample in zip(places, samples, strict=True):
        if place != (1, 4):
            np.testing.assert_array_equal(sample.image, reader.read(*place).image)


def test_a_fault_of_the_machine_is_no_bad_sample(reader, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(EnvironmentFault, match="Too many open files"):
        list(reader.read_many([(0, 0)]))


class TestHFVersions:
    PARAMS = HFParams(fov="none", cutoff_cycles=3.0)

    @pytest.fixture
    def versions(self, root, write_hf_version):
        return write_hf_version(root, "fundus", self.PARAMS)

    def test_the_version_that_is_asked_for(self, root, versions):
        other = ShardReader(root, versions, {"fundus": self.PARAMS.digest()})
        first = ShardReader(root, versions)
        for shard, row in ((0, 2), (2, 9)):
            old, new = first.read(shard, row), other.read(shard, row)
            np.testing.assert_array_equal(old.image, new.image)
            assert not np.array_equal(old.hf_map, new.hf_map)
        np.testing.assert_array_equal(first.read(3, 1).hf_map, other.read(3, 1).hf_map)  # xray has only one
        named = ShardReader(root, versions, versions.hf_digests)
        np.testing.assert_array_equal(named.read(0, 2).hf_map, first.read(0, 2).hf_map)

    def test_damage_of_its_tar_is_noticed(self, root, versions):
        path = root / hf_tar_path(SHARD, self.PARAMS.digest())
        os.truncate(path, 100)
        reader = ShardReader(root, versions, {"fundus": self.PARAMS.digest()})
        reader.read(0, 0)
        with pytest.raises(DataError, match=r"hf-\w+\.tar, sample sample00010: .* cut short: 0 of"):
            reader.read(1, 0)
        path.unlink()
        with pytest.raises(DataError, match=r"hf-\w+\.tar, sample sample00010: .*no such file"):
            ShardReader(root, versions, {"fundus": self.PARAMS.digest()}).read(1, 0)

    def test_an_index_of_other_samples_is_refused(self, root, versions):
        digest = self.PARAMS.digest()
        strange = root / index_path(hf_tar_path("fundus/tiny-000000.tar", digest))
        data = strange.read_bytes()
        (root / index_path(hf_tar_path(SHARD, digest))).write_bytes(data)
        shards = list(versions.shards)
        shards[1] = shards[1].model_copy(update={"hf": shards[0].hf})
        reader = ShardReader(root, versions.model_copy(update={"shards": shards}), {"fundus": digest})
        with pytest.raises(DataError, match="other samples than the shard's"):
            reader.read(1, 0)


def test_a_store_may_stand_for_the_folder(root, reader):
    again = ShardReader(LocalStore(root), reader.snapshot)
    np.testing.assert_array_equal(again.read(2, 5).image, reader.read(2, 5).image)

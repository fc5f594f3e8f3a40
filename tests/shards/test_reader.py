"""Reading by index: the right pixels, and an error that names the sample for every kind of damage."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zstandard

import shards.reader
from shards.reader import KeptSamples, ShardReader, exclusion_rows
from shards.schema import index_path, load_snapshot, read_index
from shards.support.errors import DataError

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
    with pytest.raises(DataError, match=rf"{SHARD}, sample sample00010: .*No such file"):
        reader.read(1, 0)
    index_path(root, SHARD).unlink()
    with pytest.raises(DataError, match=r"tiny-000001\.index\.parquet: cannot be read"):
        ShardReader(root, reader.snapshot).read(1, 0)
    assert reader.where(1, 0).endswith(f"{SHARD}, sample sample00010")
    assert ShardReader(root, reader.snapshot).where(1, 7).endswith(f"{SHARD}, row 7")


def test_bytes_that_are_no_image_or_no_map():
    with pytest.raises(DataError, match="here: decodes to nothing, the index says 4 x 5"):
        shards.reader._decode_image(b"not an image", (4, 5, 3), "here")
    wrong = [b"not npy", b"", npy(np.zeros((3, 4), np.int16)), npy(np.zeros(5, np.uint8))]
    wrong += [npy(np.zeros((0, 4), np.uint8)), npy(np.zeros((3, 4), np.uint8))[:-1]]
    for data in (b"not zstd", *map(zstandard.compress, wrong)):
        with pytest.raises(DataError, match="here: the response map cannot be decoded"):
            shards.reader._decode_map(data, "here")


def test_an_image_of_another_size_than_the_index_says(reader):
    reader._index(0).numbers["width"][2] += 1
    with pytest.raises(DataError, match="sample00002: decodes to 64 x 64 pixels, the index says 64 x 65"):
        reader.read(0, 2)


def test_open_files_are_bounded(root, monkeypatch):
    def num_open() -> int:
        links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum(link.is_symlink() and os.readlink(link).startswith(str(root)) for link in links)

    monkeypatch.setattr(shards.reader, "MAX_OPEN_SHARDS", 2)
    reader = ShardReader(root, load_snapshot(root))
    for row in range(4):
        for shard in range(4):
            assert reader.read(shard, row).key
            assert num_open() <= 2
    for shard in (0, 1, 0, 2):
        reader.read(shard, 0)
    assert list(reader._files) == [0, 2]  # the one that was used least recently was closed
    del reader
    assert num_open() == 0


def test_a_copy_for_another_process_opens_files_of_its_own(reader):
    reader.read(0, 0)
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._files
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

"""What the statistics say of a dataset, and what the page shows."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.audit.stats import MAX_CLASSES, ModalityStats, dataset_stats, write_stats_page
from shards.audit.stats_shard import MAX_LABEL_VALUES, NUM_BINS, ShardStats
from shards.builder.members import decode_stored, read_member
from shards.dataset import load_snapshot, read_index
from shards.hf.tokens import hf_response
from shards.schema import Counts
from shards.stores.store import LocalStore
from shards.support.errors import DataError, EnvironmentFault
from tests.shards.support.test_page import parse
from tests.shards.whole import HF, change_snapshot, change_tar, make_key, write_whole


@pytest.fixture
def root(tmp_path):
    write_whole(tmp_path / "root")
    return tmp_path / "root"


def read_pixels(root, modality):
    """Pixels of the samples of a modality that readers see, in order."""
    shards = [shard for shard in load_snapshot(root).shards if shard.modality == modality]
    rows = [(shard, row) for shard in shards for row in read_index(root, shard).to_pylist()]
    return [
        decode_stored(read_member(LocalStore(root), shard.path, row, "image"), row["image_ext"], row["dtype"])
        for shard, row in rows[:-1]
    ]


def test_counts_are_of_all_samples(root):
    stats = dataset_stats(root, jobs=1)
    ct, fundus = stats.modalities
    assert (ct.name, fundus.name) == ("ct", "fundus")
    assert stats.counts == load_snapshot(root).counts
    for item in stats.modalities:
        assert (item.num_shards, item.num_samples, item.num_skipped) == (2, 6, 1)
        assert item.sources == {"tiny": 6}
        assert item.left_out == {
            "duplicate bytes": 1,
            "duplicate pixels": 1,
            "excluded no_pixels": 1,
            "quarantined truncated": 1,
        }
        assert item.percentiles("source short side") == [100] * 5
        assert item.percentiles("source long side") == [120] * 5
        assert item.hf_digest == HF.digest()
    assert ct.measured.kinds == {"grey int16 npy.zst": 6}
    assert sum(fundus.measured.kinds.values()) == 6
    assert {"color png", "grey png", "color jpg"} == set(fundus.measured.kinds)
    assert fundus.classes("class") == [("a", 3), ("b", 3)]
    assert ct.measured.labels == {}


def test_lines_are_a_table(root):
    lines = dataset_stats(root, jobs=1).lines()
    assert str(root) in lines[0]
    assert re.fullmatch(
        r"modality +samples +skipped +shards +MB +short side +source short side +stored as", lines[1]
    )
    assert re.fullmatch(r"ct +6 +1 +2 +0\.\d +48 - 48 - 64 +100 +6 grey int16 npy\.zst", lines[2])
    text = "\n".join(lines)
    assert "  quarantined truncated: 1" in text
    assert "  label class: a 3, b 3" in text
    assert lines[-1] == (
        "together: 18 objects, 18 units, 10 samples, 2 quarantined, 2 excluded, 4 duplicates"
    )


def test_pixels_are_measured(root):
    stats = dataset_stats(root, jobs=1)
    for item, dtype, low, high in zip(
        stats.modalities, ("int16", "uint8"), (-1024, 0), (3072, 256), strict=True
    ):
        images = read_pixels(root, item.name)
        measured = item.measured
        assert measured.num_images == {dtype: 5}  # the excluded one is never looked at
        assert measured.histograms[dtype].shape == (NUM_BINS,)
        assert measured.histograms[dtype].sum() == pytest.approx(5)
        if item.name == "ct":
            counts = sum(np.histogram(i, NUM_BINS, (low, high))[0] / i.size for i in images)
            assert np.allclose(measured.histograms[dtype], counts)
        assert len(measured.energy) == len(measured.ring_tokens) == 5
        # by the definition, image by image
        for pixels, energy, ring in zip(images, measured.energy, measured.ring_patches, strict=True):
            rows, columns = pixels.shape[0] // 16, pixels.shape[1] // 16
            blocks = (
                np.square(hf_response(pixels, HF)).reshape(rows, 16, columns, 16).sum(axis=(1, 3)).ravel()
            )
            mean = np.abs(hf_response(pixels, HF)).reshape(rows, 16, columns, 16).mean(axis=(1, 3)).ravel()
            kept = np.argsort(-mean, kind="stable")[: round(0.25 * mean.size)]
            assert energy == pytest.approx(blocks[kept].sum() / blocks.sum(), rel=1e-4)
            assert ring == pytest.approx(1 - (rows - 2) * (columns - 2) / (rows * columns))
        assert measured.heat.mean() / 5 == pytest.approx(0.25, abs=0.02)


def test_sample_of_images_is_bounded_and_seeded(root):
    def captions(seed, num=2):
        stats = dataset_stats(root, num=num, seed=seed, jobs=1)
        assert all(sum(item.measured.num_images.values()) == num for item in stats.modalities)
        return [shown.caption for item in stats.modalities for shown in item.measured.shown]

    assert captions(3) == captions(3)
    assert len({tuple(captions(seed)) for seed in range(6)}) > 1
    assert len(captions(0)) == 4
    assert len(dataset_stats(root, num=5, num_shown=1, jobs=1).modalities[0].measured.shown) == 1


def test_excluded_samples_are_never_drawn(root):
    excluded = make_key("salt", 5)[:8]
    for seed in range(5):
        stats = dataset_stats(root, num=5, seed=seed, jobs=1)
        assert not any(excluded in shown.caption for shown in stats.modalities[0].measured.shown)


def test_without_images_no_tar_is_read(root):
    for shard in load_snapshot(root).shards:
        (root / shard.path).unlink()
    stats = dataset_stats(root, num=0, jobs=1)
    assert stats.modalities[0].num_samples == 6
    assert stats.modalities[0].hf_facts() == []
    assert stats.lines()


def test_processes_find_the_same(root):
    one, two = (dataset_stats(root, num=200, jobs=jobs) for jobs in (1, 2))
    assert one.lines() == two.lines()


def test_page(root, tmp_path):
    stats = dataset_stats(root, num_shown=1, jobs=1)
    write_stats_page(stats, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    words = " ".join(parse(text).body)
    for word in ("Summary", "ct", "fundus", "stored short side", "quarantined truncated", "outlined"):
        assert word in words
    assert "Hounsfield units" in text
    assert "grey level" in text
    assert text.count("<figcaption>strongest 25%") == 2
    assert text.count("<svg") == 4
    write_stats_page(stats, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault):
        write_stats_page(stats, tmp_path / "file" / "page.html")


def test_page_without_images(root, tmp_path):
    write_stats_page(dataset_stats(root, num=0, jobs=1), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<svg" not in text
    assert "data:image" not in text


def test_no_patient_enters(root, tmp_path):
    stats = dataset_stats(root, num_shown=1, jobs=1)
    write_stats_page(stats, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text() + "\n".join(stats.lines())
    patients = {
        value
        for shard in load_snapshot(root).shards
        for value in read_index(root, shard)["patient"].to_pylist()
    }
    assert patients
    assert not any(patient in text for patient in patients)


def test_labels_with_many_values_are_no_classes():
    measured = ShardStats("ct")
    measured.labels["id"] = Counter({str(number): 1 for number in range(MAX_LABEL_VALUES + 1)})
    measured.labels["grade"] = Counter({str(number): number for number in range(1, 31)})
    item = ModalityStats("ct", 1, 1, 1, 0, {}, {}, "", measured)
    assert item.classes("id") == []
    assert item.classes("grade")[0] == ("30", 30)
    assert len(item.classes("grade")) == MAX_CLASSES


def test_percentiles_of_counts():
    measured = ShardStats("ct")
    measured.sides["stored short side"] = Counter({10: 5, 20: 90, 30: 5})
    item = ModalityStats("ct", 1, 100, 1, 0, {}, {}, "", measured)
    values = np.repeat([10, 20, 30], [5, 90, 5])
    assert item.percentiles("stored short side") == [10, 20, 20, 30, 30]
    assert item.percentiles("stored short side")[2] == np.median(values)


def test_hf_definition_of_another_version(root):
    snapshot = load_snapshot(root)
    change_snapshot(root, hf={name: {**params, "unheard_of": 1} for name, params in snapshot.hf.items()})
    facts = dict(dataset_stats(root, jobs=1).modalities[0].hf_facts())
    assert len(facts) == 1  # where tokens lie is known, what they hold is not


def test_what_cannot_be_read(root, tmp_path):
    with pytest.raises(DataError, match="frepa shards build"):
        dataset_stats(tmp_path / "nothing")
    shard = load_snapshot(root).shards[0]
    rows = read_index(root, shard).to_pylist()

    def flip(data):
        for row in rows:
            data[row["image_offset"] + 20] ^= 1
        return data

    change_tar(root, shard.path, flip)
    with pytest.raises(DataError, match=r"bytes of image are damaged.*verify --deep"):
        dataset_stats(root, jobs=1)
    assert dataset_stats(root, num=0, jobs=1).counts == Counts(
        objects=18, units=18, samples=10, quarantined=2, excluded=2, duplicates=4
    )
    (root / shard.path.replace(".tar", ".index.parquet")).write_bytes(b"")
    with pytest.raises(DataError, match=r"index\.parquet"):
        dataset_stats(root, num=0, jobs=1)


def test_shards_of_one_modality_add_up(root):
    """A CT source of pictures beside one of Hounsfield units."""
    ct, fundus = (item.measured for item in dataset_stats(root, jobs=1).modalities)
    together = ShardStats("ct")
    for measured in (ct, fundus, fundus):
        together.add(measured)
    assert together.num_images == {"int16": 5, "uint8": 10}
    assert np.array_equal(together.histograms["uint8"], 2 * fundus.histograms["uint8"])
    assert np.array_equal(together.heat, ct.heat + 2 * fundus.heat)
    assert together.labels["class"] == {"a": 6, "b": 6}
    assert together.sides["stored short side"].total() == 18
    assert len(together.energy) == 15


@pytest.mark.real_data
def test_tokens_of_real_photographs_lie_on_tissue(tmp_path):
    from shards.builder.build import BuildConfig, build_dataset

    folder = os.environ.get("FREPA_TEST_DATA")
    if not folder:
        pytest.skip("FREPA_TEST_DATA does not name the folder of real images")
    source = Path(folder) / "fundus" / "drive" / "images"
    root = tmp_path / "root"
    build_dataset([str(source)], str(root), BuildConfig(modality="fundus", size=256, jobs=1))
    stats = dataset_stats(root, jobs=1)
    assert sum(stats.modalities[0].measured.num_images.values()) == 40
    facts = stats.modalities[0].measured
    assert np.mean(facts.ring_tokens) < 0.05 < np.mean(facts.ring_patches)
    assert np.median(facts.energy) > 0.5
    write_stats_page(stats, tmp_path / "page.html")

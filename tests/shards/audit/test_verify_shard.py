"""What an audit finds in a shard's files and in the content of its members."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import zstandard

from shards.audit.rehf import rehf_dataset
from shards.audit.verify_shard import compare_ranks
from shards.builder.members import decode_npy, decode_npy_zst, encode_npy
from shards.dataset import encode_table, load_snapshot
from shards.hf.tokens import HFParams, hf_response, hf_scores
from shards.schema import hf_tar_path, index_path
from tests.shards.damage import (
    CT,
    FUNDUS,
    OTHER,
    edit,
    find,
    flip,
    kinds,
    member,
    read,
    replace_member,
)
from tests.shards.whole import (
    change_index,
    change_snapshot,
    change_tar,
    reseal,
)


def test_missing_and_cut_files(root):
    (root / CT).unlink()
    change_tar(root, FUNDUS, lambda data: data[:-700])
    report = find(root)
    assert report.counts == {"missing_file": 1, "file_size": 1}
    assert {problem.where for problem in report.problems} == {CT, FUNDUS}
    (root / index_path(CT)).unlink()
    assert kinds(root) == {"missing_file": 2, "file_size": 1}


def test_index_that_is_not_the_one(root):
    change_tar(root, index_path(CT), flip(40))
    report = find(root)
    assert report.counts == {"index": 1}
    assert report.problems[0].where == index_path(CT)


@pytest.mark.parametrize("content", [b"garbage", encode_table(pa.table({"key": ["a", "b", "c"]}))])
def test_index_of_another_format_with_the_right_checksum(root, content):
    (root / index_path(CT)).write_bytes(content)
    shards = [
        shard.model_copy(update={"index_crc32c": google_crc32c.value(content)}) if shard.path == CT else shard
        for shard in load_snapshot(root).shards
    ]
    change_snapshot(root, shards=shards)
    assert kinds(root, deep=True) == {"index": 1}


def test_image_that_is_none(root):
    _, size = member(root, FUNDUS, 0, "image")
    replace_member(root, FUNDUS, 0, "image", bytes(size))
    assert kinds(root, deep=True) == {"image": 1}


def test_image_of_another_shape_or_type(root):
    change_index(root, FUNDUS, edit(0, height=999))
    change_index(root, CT, edit(0, channels=3))
    change_index(root, "ct/tiny-000001.tar", edit(0, dtype="uint8"))
    reseal(root)
    report = find(root, deep=True)
    assert {kind: number for kind, number in report.counts.items() if kind != "json"} == {"image": 3}


def test_image_of_other_pixels(root):
    change_index(root, FUNDUS, edit(0, pixel_hash="0" * 32))
    reseal(root)
    assert kinds(root, deep=True) == {"pixel_hash": 1}


@pytest.mark.parametrize("path", [CT, FUNDUS])
def test_tokens_and_maps_that_are_not_of_these_pixels(root, path):
    tokens = decode_npy(read(root, path, 0, "hf"))
    replace_member(root, path, 0, "hf", encode_npy(tokens[::-1].copy()))
    report = find(root, deep=True)
    assert report.counts == {"hf": 1}
    assert "hf.npy is not" in report.problems[0].what
    replace_member(root, path, 0, "hf", encode_npy(tokens.astype(np.int16)))
    assert kinds(root, deep=True) == {"hf": 1}
    replace_member(root, path, 0, "hf", encode_npy(tokens))
    stored = decode_npy_zst(read(root, path, 0, "hfmap"), "uint8").copy()
    stored[0, 0] ^= 128
    replace_member(root, path, 0, "hfmap", zstandard.compress(encode_npy(stored)))
    report = find(root, deep=True)
    assert report.counts == {"hf": 1}
    assert "hfmap is not" in report.problems[0].what


def test_tokens_of_another_processor_are_a_remark(root):
    stored = decode_npy_zst(read(root, CT, 0, "hfmap"), "uint8").copy()
    stored[1, 1] -= 1
    replace_member(root, CT, 0, "hfmap", zstandard.compress(encode_npy(stored)))
    report = find(root, deep=True)
    assert report.ok
    assert report.remark_counts == {"hf_rounded": 1}


def test_ranks_agree_within_rounding():
    image = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    scores = hf_scores(hf_response(image, HFParams(fov="none")), 16)
    tokens = np.argsort(-scores, kind="stable").astype(np.uint16)
    assert compare_ranks(tokens, scores) == (True, True)
    near = scores.copy()
    near[tokens[3]] = near[tokens[4]] * (1 - 1e-6)
    assert compare_ranks(tokens, near) == (True, False)
    for wrong in (tokens[::-1], tokens[:-1], np.zeros_like(tokens), tokens.astype(np.int64)):
        assert compare_ranks(wrong, scores) == (False, False)
    # many small rises must not add up to a large one
    drift = np.linspace(1, 1 + 1e-2, 1000).astype(np.float32)
    assert compare_ranks(np.arange(1000, dtype=np.uint16), drift) == (False, False)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"{}", b'{"height":1}', b'{"labels":{"class":"z"}}'])
def test_json_that_contradicts_the_index(root, content):
    _, size = member(root, FUNDUS, 0, "json")
    assert size < 512
    replace_member(root, FUNDUS, 0, "json", content)
    assert kinds(root, deep=True) == {"json": 1}


def test_hf_versions(root):
    rehf_dataset(root, "ct", OTHER, jobs=1)
    assert find(root, deep=True).ok
    tar = hf_tar_path(CT, OTHER.digest())
    change_tar(root, tar, flip(600))
    assert find(root).ok
    assert kinds(root, deep=True) == {"member_bytes": 1, "tar_bytes": 1}
    (root / tar).unlink()
    (root / index_path(hf_tar_path("ct/tiny-000001.tar", OTHER.digest()))).write_bytes(b"")
    report = find(root, deep=True)
    assert report.counts == {"missing_file": 1, "index": 1}
    assert tar in {problem.where for problem in report.problems}


def test_hf_version_of_other_samples_or_parameters(root):
    snapshot = load_snapshot(root)
    rehf_dataset(root, "ct", OTHER, jobs=1)
    after = load_snapshot(root)
    first, second = (shard for shard in after.shards if shard.modality == "ct")
    digest = OTHER.digest()
    for suffix in ("", ".index"):
        one = root / (
            hf_tar_path(first.path, digest) if not suffix else index_path(hf_tar_path(first.path, digest))
        )
        two = root / (
            hf_tar_path(second.path, digest) if not suffix else index_path(hf_tar_path(second.path, digest))
        )
        one.write_bytes(two.read_bytes())
    shards = [first.model_copy(update={"hf": second.hf}), *after.shards[1:]]
    change_snapshot(root, shards=shards)
    assert kinds(root) == {"hf_keys": 1}
    change_snapshot(root, shards=after.shards, hf_versions={})
    assert kinds(root)["hf_version"] == 2
    lacking = [first.model_copy(update={"hf": {}}), *after.shards[1:]]
    change_snapshot(root, shards=lacking, hf_versions=after.hf_versions)
    report = find(root)
    assert report.ok
    assert report.remark_counts["hf_incomplete"] == 1
    assert snapshot.hf_versions == {}


def test_hf_version_with_tokens_of_other_parameters(root):
    rehf_dataset(root, "ct", OTHER, jobs=1)
    snapshot = load_snapshot(root)
    digest, wrong = OTHER.digest(), HFParams(fov="none", cutoff_cycles=3)
    for shard in snapshot.shards[:2]:
        for path in (hf_tar_path(shard.path, digest), index_path(hf_tar_path(shard.path, digest))):
            (root / path).rename(root / path.replace(digest, wrong.digest()))
    shards = [
        s.model_copy(update={"hf": {wrong.digest(): s.hf[digest]}} if s.hf else {}) for s in snapshot.shards
    ]
    versions = {"ct": {wrong.digest(): wrong.model_dump(mode="json")}}
    change_snapshot(root, shards=shards, hf_versions=versions)
    report = find(root, deep=True)
    assert set(report.counts) == {"hf"}
    assert report.counts["hf"] >= 6

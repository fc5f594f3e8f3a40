"""Features through the cache and from several ranks are the same, and none is computed twice."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frepa_dist.evaluate import extract as extracting
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.extract import Extraction, Share, WholeView, extract, fill_share, launched_rank
from frepa_dist.evaluate.feature_cache import FeatureCache, encoder_digest, prune_cache
from frepa_dist.evaluate.feature_files import run_features
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.pictures import FilePictures, open_pictures
from shards.stores.atomic import TEMP_MARK
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.frepa_dist.evaluate.drawn import draw_labeled


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_labeled(folder, {"a": 60, "b": 180}, num_patients=3)
    (folder / "copy.png").write_bytes((folder / "a0.png").read_bytes())
    return open_pictures(folder)


@pytest.fixture
def count(monkeypatch):
    """How many pictures went through an encoder."""
    seen = []
    embed = Encoder.embed

    def counted(self, normalized, ids_keep=None):
        seen.append(len(normalized))
        return embed(self, normalized, ids_keep)

    monkeypatch.setattr(Encoder, "embed", counted)
    return lambda: sum(seen)


def test_a_second_run_does_no_forward_pass(pictures, small_encoder, tmp_path, count):
    settings = Extraction(batch_size=5, cache=tmp_path / "cache")
    plain = extract(small_encoder, pictures, Extraction(batch_size=5))
    assert count() == 13
    first = extract(small_encoder, pictures, settings)
    assert count() == 13 + 12  # the copy has the features of what it copies
    second = extract(small_encoder, pictures, settings)
    assert count() == 13 + 12
    np.testing.assert_array_equal(second, first)
    np.testing.assert_allclose(first, plain, atol=1e-5)
    # other names, the same content
    renamed = FilePictures(pictures.folder, pictures.names[::-1])
    np.testing.assert_array_equal(extract(small_encoder, renamed, settings), first[::-1])
    assert count() == 13 + 12
    assert not list((tmp_path / "cache").rglob("*tmp*"))


def test_several_ranks_give_the_same_bits(pictures, small_encoder, tmp_path):
    alone = extract(small_encoder, pictures, Extraction(batch_size=4, cache=tmp_path / "one"))
    both = extract(small_encoder, pictures, Extraction(batch_size=4, num_ranks=2, device="cpu"))
    np.testing.assert_array_equal(both, alone)


def test_ranks_of_a_launcher_share_the_work(pictures, small_encoder, tmp_path, count, monkeypatch):
    settings = Extraction(batch_size=4, cache=tmp_path)
    computed = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        result = run_features(small_encoder, pictures.folder, extraction=settings)
        computed.append(result.num_computed)
        with pytest.raises(ConfigError, match="each would do all of this"):
            extract(small_encoder, pictures, settings)
        with pytest.raises(ConfigError, match="meet in a cache"):
            run_features(small_encoder, pictures.folder, extraction=Extraction())
    assert computed == [4, 4, 4]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert count() == 12
    found = run_features(
        small_encoder, pictures.folder, extraction=settings, out=tmp_path / "all.safetensors"
    )
    assert count() == 12
    assert (found.num, found.width) == (13, 192)
    assert launched_rank({}) == (0, 1)


def test_what_a_dead_rank_left_undone_is_done_later(pictures, small_encoder, tmp_path, count):
    settings = Extraction(batch_size=4, cache=tmp_path)
    share = Share(small_encoder, pictures, pictures.digests(), WholeView(), settings, 1, 3)
    assert fill_share(share, load_encoder(small_encoder, "cpu")) == 4
    extract(small_encoder, pictures, settings)
    assert count() == 12


def test_a_damaged_file_is_computed_anew(pictures, small_encoder, tmp_path, count):
    settings = Extraction(batch_size=4, cache=tmp_path)
    first = extract(small_encoder, pictures, settings)
    torn, flipped, whole = sorted(tmp_path.rglob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    data = bytearray(flipped.read_bytes())
    data[-3] ^= 64
    flipped.write_bytes(data)
    assert whole.is_file()
    np.testing.assert_array_equal(extract(small_encoder, pictures, settings), first)
    assert count() == 12 + 8


def test_other_weights_structure_or_preparation_have_other_features(small_encoder, small_weights, tmp_path):
    encoder = load_encoder(small_encoder, "cpu")
    digest = encoder_digest(encoder)
    assert digest == encoder_digest(load_encoder(small_encoder, "cpu"))
    # where it lies does not matter
    save_file(small_weights, tmp_path / "same.safetensors")
    assert digest == encoder_digest(load_encoder(tmp_path / "same.safetensors", "cpu"))
    nudged = {name: value.clone() for name, value in small_weights.items()}
    nudged["blocks.0.norm1.bias"][0] += 1e-6
    save_file(nudged, tmp_path / "other.safetensors")
    others = [load_encoder(tmp_path / "other.safetensors", "cpu"), dataclasses.replace(encoder, min_max=True)]
    heads = load_encoder(small_encoder, "cpu")
    heads.module.blocks[0].attn.num_heads = 2
    digests = {encoder_digest(one) for one in [*others, heads]}
    assert len(digests) == 3
    assert digest not in digests
    with pytest.raises(ConfigError, match="does not show its weights"):
        encoder_digest(dataclasses.replace(encoder, module=None))


def test_the_cache_is_bounded_and_what_was_read_last_stays(tmp_path):
    cache = FeatureCache(tmp_path, "encoder", "view")
    rows = np.ones((1, 1000), np.float32)
    for name in ("first", "second", "third"):
        cache.write([name], rows)
    for path in tmp_path.rglob("*.safetensors"):
        assert path.stat().st_size < 5000
    ages = {name: age for age, name in enumerate(("first", "second", "third"))}
    for path in tmp_path.rglob("*.safetensors"):
        (name,) = (n for n in ages if n in cache_names(path))
        os.utime(path, (1000 + ages[name], 1000 + ages[name]))
    assert set(cache.read(["first"])) == {"first"}  # now it is the newest
    deleted, left = prune_cache(tmp_path, 9000)
    assert (deleted, cache.names()) == (1, {"first", "third"})
    assert left < 9000
    young, old = (cache.folder / f"x.safetensors{TEMP_MARK}{pid}" for pid in (1, 2))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    assert prune_cache(tmp_path, 0) == (2, 0)
    assert list(cache.folder.iterdir()) == [young]
    assert prune_cache(tmp_path / "none", 0) == (0, 0)


def cache_names(path):
    return path.read_bytes()[:200].decode(errors="ignore")


def test_a_cache_without_room_or_place_is_an_error(pictures, small_encoder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        extract(small_encoder, pictures, Extraction(cache=tmp_path / "file"))
    with pytest.raises(ConfigError, match="would be lost"):
        run_features(small_encoder, pictures.folder)


def test_features_that_are_no_numbers_are_refused_and_not_kept(
    pictures, small_encoder, tmp_path, monkeypatch
):
    def broken(self, encoder, loaded, digests):
        return torch.full((len(loaded), 2), torch.nan)

    monkeypatch.setattr(extracting.WholeView, "embed", broken)
    with pytest.raises(DataError, match="NaN"):
        extract(small_encoder, pictures, Extraction(cache=tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))

"""The loader: the same bits whatever the workers, the ranks and the restarts, and clear errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from shards.hf.maps import hf_map
from shards.hf.tokens import HFParams, hf_response
from shards.read.crops import Crop, random_crop
from shards.read.draws import sample_rng
from shards.read.order import Slots
from shards.read.reader import Sample
from shards.read.stream import MicroBatch, StreamConfig, _receive
from shards.read.views import Request, cut_view
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.shards.streams import images_by_key, join, stream_of


@pytest.fixture(scope="module")
def whole(stream_root) -> list[list[MicroBatch]]:
    """Epoch 3, read at one go by one rank without workers."""
    return list(stream_of(stream_root).batches(3))


def test_what_a_micro_batch_holds(stream_root, whole):
    stream = stream_of(stream_root)
    assert stream.num_batches(3) == len(whole) == 44 // 8
    assert (stream.total_batches(0), stream.total_batches(3)) == (0, 3 * (44 // 8))
    assert stream.gradient_accumulation_steps == 4
    for k, batch in enumerate(whole):
        assert len(batch) == 4
        for m, micro in enumerate(batch):
            has_color = any(int(key[-2:]) % 5 for key in micro["key"])
            assert micro["image"].shape == (2, 3 if has_color else 1, 32, 32)
            assert micro["image"].dtype == torch.uint8
            assert micro["window"].tolist() == [[0, 255]] * 2
            assert micro["image"].is_contiguous()
            assert micro["hf_indices"].shape == (2, 4)
            assert micro["hf_indices"].dtype == torch.int64
            assert micro["mask_noise"].shape == (2, 16)
            assert micro["mask_noise"].dtype == torch.float32
            assert micro["slot"].tolist() == [2 * m, 2 * m + 1]
            assert micro["position"].tolist() == [8 * k + 2 * m, 8 * k + 2 * m + 1]
            assert micro["skipped"] == []
            assert micro["num_bytes"] > 500
    keys = [key for batch in whole for micro in batch for key in micro["key"]]
    assert len(set(keys)) == len(keys) == 40
    assert not set(keys) & {"sample00004", "sample00020"}
    noise = torch.cat([join(batch)["mask_noise"] for batch in whole])
    assert 0 <= noise.min() < 0.02
    assert 0.98 < noise.max() < 1
    assert len(noise.unique()) > 0.99 * noise.numel()
    indices = torch.cat([join(batch)["hf_indices"] for batch in whole])
    assert all(len(set(row)) == 4 and set(row) <= set(range(16)) for row in indices.tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_workers_and_resume_change_nothing(stream_root, whole, world_size, num_workers):
    start = 2
    for rank in {0, world_size - 1}:
        stream = stream_of(
            stream_root, rank, world_size, micro=2 if world_size < 4 else 1, num_workers=num_workers
        )
        share = 8 // world_size
        expected = [
            {name: value[rank * share : (rank + 1) * share] for name, value in join(batch).items()}
            for batch in whole
        ]
        next(stream.batches(7))  # an epoch that is given up
        for first in (0, start):
            got = [join(batch) for batch in stream.batches(3, first)]
            assert len(got) == len(whole) - first
            for a, b in zip(got, expected[first:], strict=True):
                assert a["key"] == b["key"]
                assert all(torch.equal(a[name], b[name]) for name in a if name != "key")


def test_epochs_give_other_orders_and_views(stream_root, whole):
    other = list(stream_of(stream_root).batches(4))
    views = [images_by_key(epoch) for epoch in (whole, other)]
    both = views[0].keys() & views[1].keys()
    assert len(both) > 30
    assert not any(torch.equal(views[0][key], views[1][key]) for key in both)
    assert [m["key"] for b in whole for m in b] != [m["key"] for b in other for m in b]
    assert not torch.equal(whole[0][0]["mask_noise"], other[0][0]["mask_noise"])


def test_a_view_belongs_to_its_epoch_and_place(stream_root):
    views = stream_of(stream_root)._loader.dataset
    same = [np.zeros(6, dtype=np.int64)] * 2  # one sample in six places
    slots = Slots(np.arange(6), np.arange(6), *same)
    images = torch.cat([views[Request(epoch, slots)]["image"] for epoch in (0, 1)])
    assert not any(torch.equal(images[i], images[j]) for i in range(12) for j in range(i))


def test_the_seed_of_the_views_leaves_the_order(stream_root, whole):
    other = list(stream_of(stream_root, seed=1).batches(3))
    assert [m["key"] for b in whole for m in b] == [m["key"] for b in other for m in b]
    assert not torch.equal(join(whole[0])["image"], join(other[0])["image"])
    assert not torch.equal(whole[0][0]["mask_noise"], other[0][0]["mask_noise"])


def test_the_global_random_state_is_left_alone(stream_root):
    before = torch.get_rng_state()
    next(stream_of(stream_root).batches(0))
    next(stream_of(stream_root, num_workers=1).batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_augmentation_epochs_show_the_same_views(stream_root):
    stream = stream_of(stream_root, augment=False)
    epochs = [images_by_key(stream.batches(e)) for e in (0, 1)]
    both = epochs[0].keys() & epochs[1].keys()
    assert both
    assert all(torch.equal(epochs[0][key], epochs[1][key]) for key in both)


def test_grey_images_are_repeated(stream_root, whole):
    images = images_by_key(whole)
    grey = [i for k, i in images.items() if int(k[-2:]) % 5 == 0]
    color = [i for k, i in images.items() if int(k[-2:]) % 5]
    assert grey
    assert all(torch.equal(i[0], i[1]) and torch.equal(i[0], i[2]) for i in grey)
    assert not any(torch.equal(i[0], i[1]) for i in color)


def test_hf_tokens_lie_where_the_detail_of_the_view_is():
    texture = np.zeros((256, 320), bool)
    texture[40:120, 60:200] = True
    noise = np.random.default_rng(0).integers(0, 255, texture.shape)
    image = np.where(texture, noise, 100).astype(np.uint8)
    params = HFParams(fov="none")
    sample = Sample("key", image, hf_map(hf_response(image, params), 4), 0)
    config = StreamConfig(root=".", image_size=128, patch_size=16, hf_keep=0.1)
    num_checked = flips = 0
    for position in range(60):
        rng = sample_rng(0, 0, position, "crop")
        crop = random_crop(rng, 256, 320, scale=(0.2, 1.0), ratio=(0.75, 1.33), flip=True)
        pixels, indices = cut_view(sample, crop, config)
        spread = pixels.reshape(8, 16, 8, 16).std(axis=(1, 3)).ravel()
        if (spread > 20).sum() >= 12:
            num_checked, flips = num_checked + 1, flips + crop.flip
            assert (spread[indices] > 10).all(), crop
    assert num_checked > 20
    assert 5 < flips < num_checked - 5


def test_a_flip_mirrors_the_tokens():
    image = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    sample = Sample("key", image, hf_map(hf_response(image, HFParams(fov="none")), 4), 0)
    config = StreamConfig(root=".", image_size=64, patch_size=16, hf_keep=1.0)
    (plain, tokens), (mirrored, mirrored_tokens) = (
        cut_view(sample, Crop(0, 0, 64, 64, flip), config) for flip in (False, True)
    )
    np.testing.assert_array_equal(plain[:, ::-1], mirrored)
    np.testing.assert_array_equal(tokens // 4 * 4 + 3 - tokens % 4, mirrored_tokens)


def test_start_at_the_end_and_beyond(stream_root):
    stream = stream_of(stream_root)
    assert list(stream.batches(0, 5)) == []
    for start in (6, -1):
        with pytest.raises(ConfigError, match=rf"no batch {start}; allowed: 0 to 5"):
            stream.batches(0, start)


def test_a_second_iterator_ends_the_first(stream_root):
    stream = stream_of(stream_root)
    first = stream.batches(0)
    next(first)
    second = stream.batches(1)
    with pytest.raises(AssertionError, match="a later call"):
        next(first)
    assert len(list(second)) == 5


def test_an_hf_version_that_is_not_there_is_refused(stream_root, tmp_path, write_dataset, write_hf_version):
    stored, params = HFParams(fov="none").digest(), HFParams(fov="none", cutoff_cycles=3.0)
    wanted = params.digest()
    stream_of(stream_root, hf_digests={"fundus": stored, "xray": stored})
    with pytest.raises(
        DataError, match=rf"3 of 3 shards of fundus .*{wanted}: .*tiny-000002.*{stored}.*frepa shards rehf"
    ):
        stream_of(stream_root, hf_digests={"fundus": wanted})
    with pytest.raises(ConfigError, match=r"hf_digests.ct: .*no 'ct'; allowed: fundus, xray"):
        stream_of(stream_root, hf_digests={"ct": wanted})
    write_dataset(tmp_path, {"fundus": [9, 14, 11], "xray": [12]}, duplicates=(4, 20))
    write_hf_version(tmp_path, "fundus", params, slice(2))
    with pytest.raises(DataError, match=rf"1 of 3 shards of fundus .*{wanted}: fundus/tiny-000002.tar;"):
        stream_of(tmp_path, hf_digests={"fundus": wanted})
    write_hf_version(tmp_path, "fundus", params)
    old, new = (
        [join(batch) for batch in stream_of(tmp_path, **settings, hf_keep=0.5).batches(0)]
        for settings in ({}, {"hf_digests": {"fundus": wanted}, "num_workers": 1})
    )
    moved = 0
    for a, b in zip(old, new, strict=True):
        assert torch.equal(a["image"], b["image"])
        is_xray = torch.tensor([int(key[-2:]) >= 34 for key in a["key"]])
        same = (a["hf_indices"] == b["hf_indices"]).all(dim=1)
        assert same[is_xray].all()
        moved += int((~same[~is_xray]).sum())
    assert moved > 20


def test_batches_that_do_not_divide(stream_root):
    with pytest.raises(ConfigError, match=r"batch of 8 .* 3 ranks x micro-batch 2"):
        stream_of(stream_root, world_size=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 225},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 0.2)},
        {"crop_ratio": (0.0, 1.0)},
        {"hf_keep": 0.0},
        {"bad_samples": "ignore"},
        {"shuffle": True},
        {"remote": "mount"},
        {"cache_bytes": 0},
        {"ct_windows": {"names": []}},
        {"ct_windows": {"names": ["liver"]}},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        StreamConfig(root=".", **wrong)


def test_a_fault_of_the_environment_comes_out_of_a_worker_as_it_is(stream_root, tmp_path, write_dataset):
    """And is no bad sample."""
    write_dataset(tmp_path, {"fundus": [9, 14, 11], "xray": [12]})
    stream = stream_of(tmp_path, num_workers=1, bad_samples="skip")
    for folder in ("fundus", "xray"):
        for shard in (tmp_path / folder).glob("*.tar"):
            shard.unlink()
            shard.symlink_to(shard)  # opening it fails, but not for want of a file
    with pytest.raises(EnvironmentFault, match=r"tar: cannot be read: Too many levels"):
        list(stream.batches(0))


def test_a_bug_in_a_worker_is_not_taken_for_its_death():
    def failing(error: Exception) -> Iterator[MicroBatch]:
        raise error
        yield

    with pytest.raises(RuntimeError, match="Caught"):
        _receive(failing(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback")), 1)
    with pytest.raises(OSError, match="reset"):
        _receive(failing(ConnectionResetError("reset")), 0)


@pytest.mark.parametrize("after", [0, 2])
def test_the_death_of_a_worker_is_an_error(stream_root, after):
    stream = stream_of(stream_root, num_workers=1)
    batches = stream.batches(0)
    for _ in range(after):
        next(batches)
    os.kill(stream._loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match=r"a loader process died .*/dev/shm"):
        list(batches)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_asks_all_processes_to_stop_is_for_the_trainer_to_answer(stream_root, number):
    stream = stream_of(stream_root, num_workers=1)
    batches = stream.batches(0)
    next(batches)
    worker = stream._loader._iterator._workers[0].pid
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    for process in (server, worker):
        os.kill(process, number)
    assert len(list(batches)) == stream.num_batches(0) - 1
    assert len(list(stream.batches(1))) == stream.num_batches(1)


TRAINER = """
import sys, time
from pathlib import Path
from shards.read.order import OrderConfig
from shards.read.stream import SampleStream, StreamConfig

config = StreamConfig(root=sys.argv[1], image_size=32, num_workers=2)
stream = SampleStream(config, OrderConfig(global_batch_size=8), 0, 1, 8)
batches = stream.batches(0)
next(batches)
print(*(worker.pid for worker in stream._loader._iterator._workers), flush=True)
time.sleep(100)
"""


def test_workers_end_with_a_killed_trainer(stream_root):
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(stream_root)], stdout=subprocess.PIPE, text=True
    ) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their trainer"
        time.sleep(0.05)

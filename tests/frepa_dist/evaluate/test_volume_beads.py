"""What a 2D head cannot answer and the volume encoder can, from NIfTI files through shards to the answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from frepa_dist.evaluate.volume import compare_heads
from frepa_dist.evaluate.volume_data import SliceImages, label_volumes, store_maps
from frepa_dist.evaluate.volume_training import VolumeTraining
from frepa_dist.models.volume import VolumeSettings
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.read.reader import ShardReader
from shards.read.volumes import list_volumes
from tools.volume_tasks import moving_bead, write_bead_volumes

NUM, SIDE = 240, 32


class Stub(nn.Module):
    """A random, frozen 2D encoder: stride 16, 32 channels, images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 32, 16, stride=16), nn.GELU(), nn.GroupNorm(1, 32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 0.3) / 0.2)


@pytest.fixture(scope="module")
def bead_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beads")
    labels = write_bead_volumes(folder / "source", NUM)
    config = BuildConfig(
        modality="mri", size=SIDE, min_side=SIDE, labels=labels, jobs=1, salt="0123456789abcdef"
    )
    build_dataset([folder / "source"], folder / "shards", config)
    return folder / "shards"


def test_the_set_of_slices_is_the_same_in_both_directions():
    right = moving_bead(3, to_the_right=True).astype(int)
    left = moving_bead(3, to_the_right=False).astype(int)
    columns = [volume.mean(axis=1).argmax(axis=1) // 4 for volume in (right, left)]
    assert sorted(columns[0]) == sorted(columns[1]) == list(range(8))
    assert set(np.diff(columns[0]) % 8) == {1}
    assert set(np.diff(columns[1]) % 8) == {7}
    starts = [moving_bead(s, to_the_right=True)[0].mean(axis=0).argmax() // 4 for s in range(200)]
    assert np.bincount(starts, minlength=8).min() > 10


def test_a_2d_head_fails_and_the_volume_encoder_answers(bead_dataset, tmp_path):
    snapshot = load_snapshot(bead_dataset)
    volumes = list_volumes(bead_dataset, snapshot)
    assert len(volumes) == NUM
    data = label_volumes(volumes, "label", 0, bead_dataset)
    images = SliceImages(ShardReader(bead_dataset, snapshot), data.volumes, SIDE, None)
    device = torch.device("cpu")
    maps = store_maps(Stub().eval(), images, data.volumes, tmp_path, device, num=64)
    settings = VolumeSettings(num_slices=8, overlap=2, width=64, depth=2)
    training = VolumeTraining(epochs=60, batch_size=16, learning_rate=2e-3, weight_decay=0.5)
    volume, control = compare_heads(None, 32, maps, data, settings, training, device, num_resamples=200)
    assert volume.accuracy >= 0.95
    assert volume.auroc_low > 0.9
    assert control.accuracy <= 0.7  # 60 test volumes: chance is 0.5, three standard errors above it 0.69
    assert volume.num_parameters == control.num_parameters

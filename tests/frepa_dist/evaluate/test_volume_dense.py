"""The dense head: a task that needs the next slice, its loss, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from frepa_dist.evaluate.volume_dense import DenseVolume, dense_loss, predict_masks, train_dense
from frepa_dist.evaluate.volume_training import VolumeTraining
from frepa_dist.models.volume import VolumeSettings
from shards.support.errors import ConfigError
from tools.volume_tasks import lasting_blobs

SETTINGS = VolumeSettings(num_slices=6, overlap=2, width=32, depth=2, patch=1, slice_chunk=64)


def create_stub():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.GELU())


def blobs(seed):
    volume, mask = lasting_blobs(seed)
    images = (torch.from_numpy(volume).float() / 255 - 0.3) / 0.2
    return DenseVolume(images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(mask).long())


def test_a_blob_is_marked_where_the_next_slice_has_it_too():
    volume, mask = lasting_blobs(0)
    bright = volume > 130
    again = np.roll(bright, -1, axis=0)
    again[-1] = False
    assert (mask == (bright & again)).mean() > 0.99
    assert 0.2 < mask[:-1].sum() / bright[:-1].sum() < 0.6


def test_a_2d_head_marks_what_it_cannot_know_and_the_volume_encoder_knows():
    train, test = [blobs(seed) for seed in range(48)], [blobs(1000 + seed) for seed in range(12)]
    training = VolumeTraining(epochs=24, learning_rate=2e-3)
    dice = {}
    for between in (True, False):
        settings = SETTINGS.model_copy(update={"between": between})
        _, _, result = train_dense(
            create_stub(), 16, 8, train, test, 2, settings=settings, training=training, head_width=16
        )
        (dice[between],) = result.dice
        assert len(result.dice_by_volume) == 12
    assert dice[True] > 0.9
    # all blobs marked: precision is the share that lasts, at most .4, so that Dice is at most .57
    assert dice[False] < 0.6


def test_volumes_of_any_length_and_size_in_one_batch():
    def some(num, size, numbers=None):
        images, masks = torch.randn(num, 3, size, size), torch.randint(-1, 3, (num, size, size))
        return DenseVolume(images, masks, None if numbers is None else np.array(numbers))

    volumes = [some(2, 32), some(9, 32), some(3, 48, [4, 6, 30])]
    training = VolumeTraining(epochs=1, batch_size=3)
    body, head, result = train_dense(
        create_stub(), 16, 8, volumes, volumes, 3, settings=SETTINGS, training=training, train_encoder=True
    )
    assert [predict_masks(body, head, v).shape for v in volumes] == [v.masks.shape for v in volumes]
    assert len(result.dice) == 2


def test_the_loss_is_cross_entropy_and_dice_over_known_pixels():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    masks = torch.randint(0, 3, (2, 5, 4))
    masks[1, 0] = -1
    known = masks >= 0
    shares = logits.softmax(dim=1).movedim(1, -1)[known]
    target = nn.functional.one_hot(masks[known], 3)
    dice = (2 * (shares * target).sum(0) + 1) / (shares.sum(0) + target.sum(0) + 1)
    expected = nn.functional.cross_entropy(logits.movedim(1, -1)[known], masks[known]) + 1 - dice[1:].mean()
    torch.testing.assert_close(dense_loss(logits, masks), expected)
    assert dense_loss(logits, torch.full_like(masks, -1)).isfinite()  # a batch may know nothing
    perfect = 50 * (nn.functional.one_hot(masks.clamp(min=0), 3).movedim(-1, 1).float() - 0.5)
    assert dense_loss(perfect, masks) < 1e-3


def test_what_is_refused():
    good = blobs(0)
    for volume, words in (
        (DenseVolume(good.images, good.masks[:3]), "do not fit"),
        (DenseVolume(good.images, good.masks + 1), "classes from 1 to 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            train_dense(create_stub(), 16, 8, [volume], [good], 2, settings=SETTINGS)

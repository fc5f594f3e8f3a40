"""Windows: the one conversion from stored values to [0, 1], and the draws of CT windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shards.read.draws import sample_rng
from shards.read.windows import (
    CT_WINDOWS,
    REFERENCE_WINDOW,
    WindowConfig,
    draw_window,
    to_bytes,
    to_unit_range,
)


def test_bytes_are_divided_by_255_exactly():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    got = to_unit_range(image, torch.tensor([[0.0, 255.0]]))
    assert got.shape == (1, 3, 16, 16)
    assert got.dtype == torch.float32
    assert torch.equal(got, (image.float() / 255).expand(1, 3, 16, 16))


def test_each_image_has_a_window_of_its_own():
    rng = np.random.default_rng(0)
    image = rng.integers(-1024, 3072, (4, 3, 8, 8), dtype=np.int16)
    window = np.array([[0, 255], [-1000, 1000], [-160.5, 239.25], [0, 80]], np.float32)
    low, high = (window[:, i, None, None, None] for i in (0, 1))
    expected = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)
    got = to_unit_range(torch.from_numpy(image), torch.from_numpy(window))
    np.testing.assert_array_equal(got.numpy(), expected)
    assert got.min() == 0
    assert got.max() == 1


def test_the_batch_is_left_as_it_was():
    image, window = torch.full((1, 1, 2, 2), 7, dtype=torch.int16), torch.tensor([[-5.0, 11.0]])
    to_unit_range(image, window)
    assert (image == 7).all()
    assert window.tolist() == [[-5, 11]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_device():
    image = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    window = torch.tensor([[0.0, 255.0]]).repeat(4, 1)
    there = image.cuda(), window.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = to_unit_range(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), to_unit_range(image, window))


def test_draws_stay_in_their_range_and_take_every_window():
    config = WindowConfig(level_jitter=0.1, width_jitter=0.25)
    windows = [draw_window(sample_rng(0, 0, position, "window"), config) for position in range(3000)]
    near: dict[str, int] = dict.fromkeys(CT_WINDOWS, 0)
    for low, high in windows:
        for name, (level, width) in CT_WINDOWS.items():
            if (
                width / 1.2501 <= high - low <= width * 1.2501
                and abs((low + high) / 2 - level) <= 0.1 * width
            ):
                near[name] += 1
    assert sum(near.values()) >= len(windows)
    assert min(near.values()) > 0.15 * len(windows)
    brain = [high - low for low, high in windows if high - low < 150]
    assert 63.9 < min(brain) < 66
    assert 97 < max(brain) < 100.1


def test_without_jitter_a_draw_is_the_named_window():
    config = WindowConfig(names=("full",), level_jitter=0, width_jitter=0)
    assert draw_window(np.random.default_rng(0), config) == REFERENCE_WINDOW
    twice = WindowConfig(names=("bone", "brain", "brain"), level_jitter=0, width_jitter=0)
    drawn = [draw_window(sample_rng(0, 0, p, "window"), twice) for p in range(900)]
    assert 0.6 < drawn.count((0, 80)) / len(drawn) < 0.73
    assert set(drawn) == {(0, 80), (-500, 1300)}


def test_bytes_for_people():
    pixels = np.array([[-1024, -1000, 0, 1000, 3071]], np.int16)
    assert to_bytes(pixels).tolist() == [[0, 0, 128, 255, 255]]
    plain = np.array([[1, 2]], np.uint8)
    assert to_bytes(plain) is plain

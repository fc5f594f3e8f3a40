"""What `corrupt` promises for every kind: keyed draws, sizes, types, and the plans behind them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from frepa_dist.corruption import CorruptionConfig, KindName, corrupt
from frepa_dist.corruption.plan import plan_corruptions
from frepa_dist.draws import SampleDraws
from shards.support.errors import ConfigError

KINDS = get_args(KindName)
ALL = CorruptionConfig(kinds=dict.fromkeys(KINDS, 1.0))


def only(kind: str, **settings: object) -> CorruptionConfig:
    return CorruptionConfig.model_validate({"kinds": {kind: 1.0}, **settings})


def make_images(num: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(num, channels, size, size, generator=torch.Generator().manual_seed(seed))


def keyed(num: int) -> SampleDraws:
    return SampleDraws(range(100, 100 + num), "cpu")


def test_an_image_is_corrupted_alike_in_every_batch() -> None:
    """Two ranks of three samples give what one rank of six gives, also in another order."""
    images, draws = make_images(14, 64), keyed(14)
    whole = corrupt(images, draws, ALL)
    assert len(set(whole.kind)) >= 5
    order = [13, 2, 7, 0, 1, 12, 3, 11, 4, 10, 5, 9, 6, 8]
    for cut in (1, 3, 14):
        for start in range(0, 14, cut):
            part = order[start : start + cut]
            result = corrupt(images[part], draws.select(part), ALL)
            assert result.kind == [whole.kind[i] for i in part]
            assert torch.equal(result.images, whole.images[part])
            assert torch.equal(result.hidden, whole.hidden[part])


def test_chunks_of_several_images_give_what_single_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the images of one kind are corrupted together."""
    for mode in ("published", "hermitian"):
        config = ALL.model_copy(update={"mode": mode})
        single = corrupt(make_images(20, 64), keyed(20), config)
        monkeypatch.setattr("frepa_dist.corruption.batch.CPU_CHUNK", 3)
        together = corrupt(make_images(20, 64), keyed(20), config)
        monkeypatch.undo()
        assert together.kind == single.kind
        assert torch.equal(together.hidden, single.hidden)
        torch.testing.assert_close(together.images, single.images, rtol=0, atol=2e-6)


def test_views_of_one_image_differ_and_repeat() -> None:
    config = only("histogram")
    first, again = (corrupt(make_images(2, 64), keyed(2), config, view=0) for _ in range(2))
    other = corrupt(make_images(2, 64), keyed(2), config, view=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.hidden, other.hidden)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "channels"), [(64, 1), (96, 3), (100, 4), (74, 3), (224, 1)])
def test_every_kind_takes_any_even_size(kind: str, size: int, channels: int) -> None:
    images = make_images(2, size, channels)
    for mode in ("published", "hermitian"):
        before = images.clone()
        result = corrupt(images, keyed(2), only(kind, mode=mode))
        assert torch.equal(images, before)
        assert result.images.shape == images.shape
        assert result.images.dtype == torch.float32
        assert result.hidden.shape == (2, 1, size, size)
        assert torch.isfinite(result.images).all()
        shown = ~result.hidden.expand_as(images)
        assert torch.equal(result.images[shown], images[shown])
        if kind != "none":
            assert not torch.equal(result.images, images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_flat_images_stay_finite_and_take_no_noise_of_their_own(kind: str, level: float) -> None:
    result = corrupt(torch.full((1, 3, 64, 64), level), keyed(1), only(kind, noise_strength=0))
    assert torch.isfinite(result.images).all()
    if kind == "histogram":
        torch.testing.assert_close(result.images, torch.full_like(result.images, level))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_half_precision_and_gradients_leave_no_trace(kind: str) -> None:
    config = only(kind)
    images = make_images(1, 64).requires_grad_()
    plain = corrupt(images.detach(), keyed(1), config).images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = corrupt(images, keyed(1), config)
    assert not result.images.requires_grad
    assert torch.equal(result.images, plain)
    half = corrupt(images.detach().bfloat16(), keyed(1), config).images
    assert half.dtype == torch.float32


def test_strided_images_are_taken() -> None:
    images = make_images(6, 64).to(memory_format=torch.channels_last)
    assert torch.equal(
        corrupt(images, keyed(6), ALL).images, corrupt(images.contiguous(), keyed(6), ALL).images
    )


def test_kinds_come_with_their_weights_whatever_their_order() -> None:
    weights = {"histogram": 3.0, "zero": 1.0, "frequency": 0.0}
    config = CorruptionConfig.model_validate({"kinds": weights})
    backward = CorruptionConfig.model_validate({"kinds": dict(reversed(weights.items()))})
    plans = plan_corruptions(keyed(4000), config, 64)
    kinds = [plan.kind for plan in plans]
    assert set(kinds) == {"histogram", "zero"}
    assert kinds.count("histogram") / 4000 == pytest.approx(0.75, abs=0.03)
    assert [plan.kind for plan in plan_corruptions(keyed(4000), backward, 64)] == kinds


def test_the_default_is_one_half_each_with_the_published_ranges() -> None:
    plans = plan_corruptions(keyed(2000), CorruptionConfig(), 512)
    frequency = [plan for plan in plans if plan.kind == "frequency"]
    tiles = [plan.mask for plan in plans if plan.kind == "histogram"]
    assert len(frequency) / 2000 == pytest.approx(0.5, abs=0.04)
    ratios = np.array([mask.mean() for mask in tiles if mask is not None])
    assert ratios.mean() == pytest.approx(0.625, abs=0.01)
    # uniform on [.5, .75], and the coins of 16 x 16 tiles
    assert ratios.std() == pytest.approx((0.25**2 / 12 + 0.625 * 0.375 / 256) ** 0.5, rel=0.1)
    strengths = np.array([plan.strength for plan in frequency])
    assert strengths.mean() == pytest.approx(5e-4, rel=0.03)
    assert strengths.std() == pytest.approx(1e-4, rel=0.1)
    widths = np.array([plan.width for plan in frequency])
    assert 0.15 <= widths.min() < 0.16
    assert 0.24 < widths.max() <= 0.25
    for plan in frequency[:20]:
        assert plan.mask is not None
        assert plan.mask.shape == (32, 32)
        assert not plan.mask[15:17, 15:17].any()


@pytest.mark.parametrize(
    ("kind", "size", "word"),
    [
        ("histogram", 32, "tile"),
        ("random_patches", 16, "patch"),
        ("frequency", 32, "cell"),
        ("none", 63, "even"),
    ],
)
def test_sizes_that_leave_nothing_to_hide_are_refused(kind: str, size: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        corrupt(make_images(1, size), keyed(1), only(kind))


def test_the_smallest_size_has_something_to_hide() -> None:
    frequency = plan_corruptions(keyed(50), only("frequency"), 34)
    assert any(plan.mask is not None and plan.mask.any() for plan in frequency)
    with pytest.raises(ConfigError, match="square"):
        corrupt(torch.zeros(1, 3, 64, 32), keyed(1), only("none"))


@pytest.mark.parametrize(
    "settings",
    [
        {"kinds": {}},
        {"kinds": {"zero": -1.0, "none": 2.0}},
        {"kinds": {"swirl": 1.0}},
        {"tile_ratio": (0.8, 0.5)},
        {"cell_ratio": (0.5, 1.5)},
        {"noise_width": (0.0, 0.2)},
        {"cells": 16},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CorruptionConfig.model_validate(settings)

"""Fine-tuning: layers learn at the rates of timm's own recipe, and what was switched on is off afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn

from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.finetune import (
    FineTuning,
    augment,
    class_weights,
    finetune,
    layer_scales,
    predict,
    set_drop_path,
)
from frepa_dist.evaluate.pictures import open_pictures
from shards.support.errors import ConfigError
from tests.frepa_dist.evaluate.drawn import draw_labeled


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_rates_are_those_of_timm(name):
    model = timm.create_model(name, num_classes=0)
    found = layer_scales(model, 0.7, name)
    for group in param_groups_layer_decay(model, layer_decay=0.7):
        for parameter in group["params"]:
            assert found[id(parameter)] == pytest.approx(group["lr_scale"])


def test_rates_of_our_own_networks_fall_toward_the_input():
    ours = load_encoder("random:tiny", "cpu").module
    found = layer_scales(ours, 0.5, "tiny")

    def of(name):
        return found[id(ours.get_parameter(name))]

    assert of("norm.weight") == of("blocks.11.mlp.fc1.weight") == 1
    assert of("blocks.10.mlp.fc1.weight") == 0.5
    assert of("blocks.0.attn.qkv.weight") == 0.5**11
    assert of("patch_embed.proj.weight") == of("cls_token") == of("pos_embed") == 0.5**12
    backbone = load_encoder("random:convnext_twin", "cpu").module
    assert len(set(layer_scales(backbone, 0.5, "twin").values())) > 3
    plain = nn.Linear(3, 3)
    assert set(layer_scales(plain, 1.0, "plain").values()) == {1.0}
    with pytest.raises(ConfigError, match=r"layers of this encoder are not known.*layer_decay=1"):
        layer_scales(plain, 0.5, "plain")


def test_drop_path_rises_with_depth_and_can_be_taken_back():
    module = load_encoder("random:tiny", "cpu").module
    set_drop_path(module, 0.3)
    rates = [child.drop_prob for child in module.modules() if isinstance(child, DropPath)]
    np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.3, len(module.blocks))[1:], 2))
    set_drop_path(module, 0.0)
    assert not any(isinstance(child, DropPath) for child in module.modules())


def test_views_stay_views():
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    same = FineTuning(min_area=1, flip=False, brightness=0)
    torch.testing.assert_close(
        augment(pixels, np.random.default_rng(0), same), pixels.float() / 255, atol=1e-5, rtol=0
    )
    # a ramp: where a view was cut can be read off its ends, and it never leaves the picture
    ramp = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32) * 8
    views = augment(ramp, np.random.default_rng(0), FineTuning(min_area=0.25, brightness=0))
    ends = views[:, 0, 16, [0, -1]] * 255 / 8
    spans = (ends[:, 1] - ends[:, 0]).abs()
    assert 0.5 * 32 - 2 <= float(spans.min()) < float(spans.max()) <= 32
    assert 10 < int((ends[:, 1] < ends[:, 0]).sum()) < 54  # mirrored
    bright = augment(pixels, np.random.default_rng(0), FineTuning(min_area=1, flip=False, brightness=0.5))
    assert float(bright.max()) <= 1
    ratios = bright.mean(dim=(1, 2, 3)) / (pixels.float() / 255).mean(dim=(1, 2, 3))
    assert float(ratios.min()) < 0.8
    assert float(ratios.max()) > 1.05


def test_balanced_classes_weigh_the_same():
    y = np.repeat([0, 1], [30, 10])
    weights = class_weights(y, 2).numpy()
    assert weights[0] * 30 == pytest.approx(weights[1] * 10)
    assert weights[y].mean() == pytest.approx(1)


@pytest.mark.parametrize("source", ["random:convnext_twin", "small"])
def test_an_encoder_learns_and_is_frozen_again(source, small_encoder, tmp_path):
    draw_labeled(tmp_path, {"dark": 110, "light": 140}, num_patients=8)
    pictures = open_pictures(tmp_path)
    y = np.array([int(name.startswith("light")) for name in pictures.names])
    encoder = load_encoder(small_encoder if source == "small" else source, "cpu")
    before = {name: value.clone() for name, value in encoder.module.named_parameters()}
    learned, held = np.arange(32)[::2], np.arange(32)[1::2]
    training = FineTuning(epochs=4, batch_size=8, brightness=0, balanced=True, encoder_learning_rate=1e-3)
    tuned = finetune(encoder, pictures, learned, y, 2, training)
    found = predict(tuned, pictures, held)
    assert np.mean(found.argmax(axis=1) == y[held]) > 0.9
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1)
    changed = [n for n, value in encoder.module.named_parameters() if (value != before[n]).any()]
    assert changed
    assert not any("decoder" in name for name in changed)
    total = sum(value.numel() for name, value in before.items() if name in changed)
    assert tuned.num_parameters == total + sum(p.numel() for p in tuned.head.parameters())
    assert not any(p.requires_grad for p in encoder.module.parameters())
    assert not encoder.module.training
    assert not any(isinstance(child, DropPath) for child in encoder.module.modules())

"""Layers of any encoder by name: what they give is what the network gives there."""

from __future__ import annotations

import pytest
import torch

from frepa_dist.evaluate.encoder import to_map
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.layers import LAST, layer_maps, list_layers, pool_layers, run_layers
from shards.support.errors import ConfigError


def images_for(encoder, num=2):
    size = (num, 3, encoder.image_size, encoder.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def test_blocks_of_a_vision_transformer_without_its_class_token(small_encoder):
    encoder = load_encoder(small_encoder, "cpu")
    images, model = images_for(encoder), encoder.module
    maps = layer_maps(encoder, images)
    assert list(maps) == ["patch_embed", *(f"blocks.{number}" for number in range(12)), LAST]
    assert list_layers(encoder) == list(maps)
    with torch.inference_mode():
        tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
        first = (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        for number in range(3):
            tokens = model.blocks[number](tokens)
        torch.testing.assert_close(maps["blocks.2"], to_map(tokens[:, 1:]))
        torch.testing.assert_close(maps[LAST].mean(dim=(2, 3)), encoder.embed(images))


@pytest.mark.parametrize("backbone", ["vit_pico", "swin_pico", "swinv2_pico", "convnext_twin", "resnet10"])
def test_last_block_of_each_stage_is_what_timm_gives_there(make_backbone_run, backbone):
    run, _ = make_backbone_run(backbone)
    encoder = load_encoder(str(run), "cpu")
    images = images_for(encoder)
    maps = layer_maps(encoder, images)
    with torch.inference_mode():
        stages = encoder.module.trunk.forward_intermediates(
            images, output_fmt="NCHW", intermediates_only=True
        )
    blocks = [name for name in maps if name not in ("patch_embed", "stem", LAST)]
    if backbone == "vit_pico":
        ends = blocks
    else:  # "layers.2.blocks.1", "stages.2.blocks.1", "layer3.0": what lies before the last dots is the stage
        ends = list({name.rsplit(".", 1)[0]: name for name in blocks}.values())
    assert len(ends) == len(stages[-len(ends) :])
    for name, expected in zip(ends, stages[-len(ends) :], strict=True):
        torch.testing.assert_close(maps[name], expected)
    torch.testing.assert_close(maps[LAST], encoder.map(images))


def test_some_layers_alone_and_what_is_made_of_them(small_encoder):
    encoder = load_encoder(small_encoder, "cpu")
    images = images_for(encoder)
    all_maps = layer_maps(encoder, images)
    chosen = pool_layers(encoder, images, ["blocks.3", LAST])
    assert list(chosen) == ["blocks.3", LAST]
    torch.testing.assert_close(chosen["blocks.3"], all_maps["blocks.3"].mean(dim=(2, 3)))
    largest = run_layers(encoder, images, lambda maps: maps.amax(dim=(1, 2, 3)), ["blocks.3"])
    torch.testing.assert_close(largest["blocks.3"], all_maps["blocks.3"].amax(dim=(1, 2, 3)))
    # no hook stays behind
    assert not any(module._forward_hooks for module in encoder.module.modules())


def test_layers_that_are_not_there_are_named(small_encoder):
    encoder = load_encoder(small_encoder, "cpu")
    with pytest.raises(ConfigError, match=r"no layer 'blocks\.12'.*blocks\.11"):
        layer_maps(encoder, images_for(encoder), ["blocks.12"])
    assert not any(module._forward_hooks for module in encoder.module.modules())


@pytest.mark.parametrize("name", ["gcvit_xxtiny", "pvt_v2_b0", "hiera_tiny_224", "mambaout_femto"])
def test_maps_are_square_where_timm_does_not_say_where_channels_are(name):
    encoder = load_encoder(f"timm:{name}", "cpu")
    maps = layer_maps(encoder, images_for(encoder, 1))
    assert len(maps) > 9
    assert all(layer.shape[2] == layer.shape[3] for layer in maps.values())

"""Masked modelling on hierarchical backbones: what is hidden, what is pooled, what starts where."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from frepa_dist.losses import masked_patch_loss
from frepa_dist.masking import random_masking
from frepa_dist.models.backbones import Backbone
from frepa_dist.models.masked_backbone import (
    HIDDEN,
    CellEncoder,
    MaskedBackbone,
    check_maskable,
    load_backbone_weights,
    show_cells,
)
from shards.support.errors import ConfigError, DataError

NAMES = ["swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]
SIZE, CELLS = 128, 16


def create(name="convnext_twin", **settings):
    torch.manual_seed(0)
    return MaskedBackbone(Backbone(name, SIZE), **settings)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIZE, SIZE, generator=generator), torch.rand(
        batch, CELLS, generator=generator
    )


def test_cells_are_shown_one_by_one():
    images, _ = inputs()
    ids = torch.tensor([[5, 0], [15, 6]])
    shown = show_cells(images, ids, 32)
    for image, full, keep in zip(shown, images, ids.tolist(), strict=True):
        for cell in range(CELLS):
            top, left = cell // 4 * 32, cell % 4 * 32
            place = (slice(None), slice(top, top + 32), slice(left, left + 32))
            expected = full[place] if cell in keep else torch.tensor(HIDDEN).view(3, 1, 1).expand(3, 32, 32)
            assert torch.equal(image[place], expected), cell
    images[0, :, 127, 127] = torch.inf
    assert torch.equal(show_cells(images, ids, 32)[0], shown[0])


@pytest.mark.parametrize("name", NAMES)
def test_hidden_cells_reach_the_loss_alone(name):
    model = create(name).eval()
    images, noise = inputs()
    with torch.no_grad():
        output = model(images, noise)
        ids, _, mask = random_masking(noise, 0.75)
        other = model(
            torch.where(model.unpatchify(mask[:, :, None].expand(-1, -1, 3072)) > 0, 7.0, images), noise
        )
    assert output.pred.shape == (2, CELLS, 32 * 32 * 3)
    assert output.latent.shape == (2, 4, model.width)
    assert torch.equal(output.mask, mask)
    assert torch.equal(other.pred, output.pred)  # the answer is nowhere in the input
    assert torch.equal(other.pooled, output.pooled)
    expected = masked_patch_loss(output.pred, model.patchify(images), mask, norm_pix_loss=True)
    torch.testing.assert_close(output.loss, expected)
    assert not torch.equal(other.loss, output.loss)
    # Z: the map's positions of the visible cells, averaged
    whole = model.encoder(show_cells(images, ids, 32))
    by_hand = torch.stack(
        [
            torch.stack([m[:, i // 4, i % 4] for i in keep]).mean(0)
            for m, keep in zip(whole, ids.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(output.pooled, by_hand)
    assert output.pooled.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    model = create(name)
    images, noise = inputs()
    output = model(images, noise)
    (output.loss + output.pooled.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.decoder_pred.weight.grad.any()
    # hidden cells whose features were all 0 would multiply it by a thousand in each LayerNorm
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm() < 10


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_bf16_beside_buffers_in_fp32(name):
    """As a DeepSpeed engine keeps them."""
    model = create(name)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    images, noise = inputs()
    with torch.no_grad():
        full = model(images, noise)
        model.bfloat16()
        for key, value in model.named_buffers():
            value.data = buffers[key]
        half = model(images, noise)
    assert half.latent.dtype == torch.bfloat16
    assert half.loss.dtype == half.pooled.dtype == torch.float32
    assert abs(float(half.loss - full.loss)) < 0.02 * float(full.loss)


def test_the_teacher_is_the_encoder_and_sees_its_cells_alone():
    model = create()
    teacher = CellEncoder(Backbone("convnext_twin", SIZE))
    own = teacher.state_dict().keys()
    assert {key for key in model.state_dict() if not key.startswith("decoder_pred.")} == set(own)
    teacher.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    images, noise = inputs()
    ids = noise.argsort(1)[:, :3]
    told = teacher(images, ids)
    assert told.shape == (2, model.width)
    torch.testing.assert_close(told, model.embed(images, ids))
    assert torch.equal(teacher(show_cells(images, ids, 32), ids), told)
    torch.testing.assert_close(told, model(images, noise, 1 - 3 / CELLS).pooled)
    torch.testing.assert_close(model.embed(images), model.map(images).mean(dim=(2, 3)))
    assert model.map(images).shape == (2, model.width, 4, 4)


def test_the_low_passed_target_changes_the_loss_alone():
    images, noise = inputs()
    plain, smooth = (create(target_low_pass_cycles=cycles)(images, noise) for cycles in (None, 6.0))
    assert torch.equal(plain.pred, smooth.pred)
    assert not torch.equal(plain.loss, smooth.loss)


def test_backbones_for_which_it_makes_no_sense():
    with pytest.raises(ConfigError, match="leave its patches out"):
        MaskedBackbone(Backbone("vit_pico", 64))
    backbone = Backbone("resnet10", 64)
    backbone.trunk.bn1 = nn.BatchNorm2d(32)
    with pytest.raises(ConfigError, match="BatchNorm"):
        check_maskable(backbone)


def test_weights_of_timms_names_of_a_run_and_of_another_method(tmp_path):
    start = create()
    for parameter in start.parameters():
        parameter.data += 0.1
    save_file(start.state_dict(), tmp_path / "own.safetensors")
    model = create()
    assert load_backbone_weights(model, tmp_path / "own.safetensors") == "encoder and head loaded"
    assert all(torch.equal(value, start.state_dict()[key]) for key, value in model.state_dict().items())

    trunk = {key.removeprefix("encoder.trunk."): value for key, value in start.encoder.state_dict().items()}
    trunk = {key.removeprefix("trunk."): value for key, value in trunk.items()}
    others = {"neck.0.weight": torch.ones(2), "decoder.head.weight": torch.ones(2)}
    frepa = {f"encoder.trunk.{key}": value for key, value in trunk.items()} | others
    for name, weights in (("timm", trunk), ("frepa", frepa)):
        save_file(weights, tmp_path / f"{name}.safetensors")
        model = create()
        head = model.decoder_pred.weight.clone()
        words = load_backbone_weights(model, tmp_path / f"{name}.safetensors")
        assert "head freshly initialized" in words
        assert torch.equal(model.decoder_pred.weight, head)
        assert all(torch.equal(value, trunk[key]) for key, value in model.encoder.trunk.state_dict().items())

    trunk.pop("stem.0.weight")
    save_file(trunk, tmp_path / "torn.safetensors")
    with pytest.raises(DataError, match=r"stem\.0\.weight is missing"):
        load_backbone_weights(create(), tmp_path / "torn.safetensors")

"""What an encoder sees beside the image, and what it predicts instead of it."""

from __future__ import annotations

import pytest
import torch

from frepa_dist.losses import masked_patch_loss
from frepa_dist.models import vit_mae
from frepa_dist.models.response import InputChannelConfig, append_input_channel
from frepa_dist.models.vit_mae import (
    VIT_SIZES,
    MaeEncoder,
)
from tests.frepa_dist.models.small_vit import (
    inputs,
    reference,
    small_model,
)

INPUT_CHANNELS = [InputChannelConfig(), InputChannelConfig(kind="frangi", scales=(0.05,))]


@pytest.mark.parametrize("channel", INPUT_CHANNELS, ids=lambda channel: channel.kind)
def test_an_input_channel_is_encoded_and_not_predicted(channel):
    model = small_model(input_channel=channel)
    images, noise = inputs(32, 16)
    assert model.patch_embed.proj.weight.shape == (192, 4, 8, 8)
    output = model(images, noise)
    assert output.pred.shape == (2, 16, 8 * 8 * 3)
    target = model.patchify(images)
    expected = masked_patch_loss(output.pred, target, output.mask, norm_pix_loss=True)
    assert torch.equal(output.loss, expected)
    assert torch.equal(model.unpatchify(target), images)
    output.loss.backward()
    assert model.patch_embed.proj.weight.grad[:, 3].any()
    # the channel is that of the images, whole, and stands behind them
    extended = append_input_channel(images, channel)
    tokens = model.patch_embed(extended) + model.pos_embed[:, 1:]
    whole = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1), tokens], dim=1)
    torch.testing.assert_close(model.encode(images), model.norm(model.run_blocks(model.blocks, whole)))


def test_masked_patches_hide_the_input_channel_too(monkeypatch):
    """What the encoder computes of the channel in masked patches reaches nothing."""
    model = small_model(input_channel=InputChannelConfig())
    images, noise = inputs(32, 16)
    before = model(images, noise)
    removed = model.unpatchify(before.mask[:, :, None].expand(-1, -1, 8 * 8 * 3))[:, :1] > 0
    real = vit_mae.append_input_channel

    def spoil(images, config):
        extended = real(images, config)
        return torch.cat([extended[:, :3], extended[:, 3:].masked_fill(removed, 99.0)], dim=1)

    monkeypatch.setattr(vit_mae, "append_input_channel", spoil)
    after = model(images, noise)
    assert torch.equal(after.pred, before.pred)
    monkeypatch.setattr(vit_mae, "append_input_channel", lambda x, c: real(x, c).mul(1.5))
    assert not torch.equal(model(images, noise).pred, before.pred)


def test_the_encoder_with_an_input_channel_takes_images_of_three():
    channel = InputChannelConfig()
    model = small_model(input_channel=channel)
    encoder = MaeEncoder(VIT_SIZES["tiny"], image_size=32, patch_size=8, in_channels=3, input_channel=channel)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    images, _ = inputs(32, 16)
    ids = torch.tensor([[3, 1], [0, 15]])
    assert torch.equal(encoder(images, ids), model.encode(images, ids))
    with torch.inference_mode():
        assert model.embed(images).shape == (2, 192)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixmim_predicts_the_low_passed_image_from_the_whole_one(norm_pix_loss):
    images, noise = inputs(32, 16)
    plain = small_model(norm_pix_loss=norm_pix_loss)(images, noise)
    smooth = small_model(norm_pix_loss=norm_pix_loss, target_low_pass_cycles=5.0)(images, noise)
    assert torch.equal(plain.pred, smooth.pred)
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    for y in range(32):
        for x in range(32):
            if (y - 16) ** 2 + (x - 16) ** 2 > 25:
                spectrum[:, :, y, x] = 0
    low = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
    target = torch.stack([reference.cut_patches(image, 8) for image in low])
    expected = masked_patch_loss(smooth.pred, target, smooth.mask, norm_pix_loss=norm_pix_loss)
    torch.testing.assert_close(smooth.loss, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(smooth.loss, plain.loss, rtol=1e-3)

from __future__ import annotations

import argparse
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from frepa_dist.losses import masked_patch_loss
from frepa_dist.models import vit_mae
from frepa_dist.models.init import interpolate_position_embedding, sincos_position_embedding
from frepa_dist.models.mae_checkpoint import load_mae_checkpoint
from frepa_dist.models.response import InputChannelConfig, append_input_channel
from frepa_dist.models.vit_mae import (
    VIT_SIZES,
    MaeEncoder,
    create_vit_mae,
    use_fused_attention,
)
from shards.support.errors import ConfigError, DataError

_SPEC = importlib.util.spec_from_file_location(
    "mae_reference", Path(__file__).parents[3] / "tools" / "mae_reference.py"
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)


def shapes_of(size: str, num_patches: int, patch_size: int = 16) -> dict[str, tuple[int, ...]]:
    s = VIT_SIZES[size]
    return reference.weight_shapes(
        s.width, s.depth, s.decoder_width, s.decoder_depth, num_patches, patch_size
    )


def random_weights(size: str, num_patches: int, patch_size: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes_of(size, num_patches, patch_size).items()
    }


def jiggle(model: nn.Module) -> None:
    """Move every weight off its initial value, so that no bias or norm is a no-op."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def small_model(size: str = "tiny", **settings) -> nn.Module:
    torch.manual_seed(0)
    model = create_vit_mae(size, image_size=32, patch_size=8, **settings)
    jiggle(model)
    return model


def inputs(image_size: int, num_patches: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator)
    return images, torch.rand(batch, num_patches, generator=generator)


@pytest.mark.parametrize(
    ("size", "image_size", "patch_size", "batch"),
    [("tiny", 64, 8, 3), ("small", 64, 16, 2), ("base", 224, 16, 1)],
)
def test_loss_and_prediction_equal_the_reference(size, image_size, patch_size, batch):
    torch.manual_seed(0)
    model = create_vit_mae(size, image_size=image_size, patch_size=patch_size)
    if size != "base":
        jiggle(model)
    images, noise = inputs(image_size, model.num_patches, batch)
    with torch.no_grad():
        output = model(images, noise)
        loss, pred, mask = reference.batch_loss(
            images, noise, model.state_dict(), VIT_SIZES[size].heads, VIT_SIZES[size].decoder_heads
        )
    assert abs(float(output.loss - loss)) < 1e-5
    assert (output.pred - pred).abs().max() < 1e-4
    assert torch.equal(output.mask, mask)


def test_gradients_equal_the_reference():
    model = small_model()
    images, noise = inputs(32, 16)
    model(images, noise).loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss, _, _ = reference.batch_loss(images, noise, weights, 3, 4)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in ("pos_embed", "decoder_pos_embed"):
            assert parameter.grad is None
            continue
        apart = (parameter.grad - weights[name].grad).norm() / weights[name].grad.norm()
        assert apart < 1e-5, name


@pytest.mark.parametrize("size", list(VIT_SIZES))
def test_names_and_shapes_are_the_official_ones(size):
    with torch.device("meta"):
        model = create_vit_mae(size)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes_of(size, 196)


def test_initial_weights():
    model = create_vit_mae("tiny", image_size=64, patch_size=16)
    state = model.state_dict()
    expected = reference.position_embedding(192, 4).float()
    torch.testing.assert_close(state["pos_embed"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        state["decoder_pos_embed"], reference.position_embedding(128, 4).float(), atol=1e-6, rtol=0
    )
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "pos_embed",
        "decoder_pos_embed",
    }
    bound = (6 / (192 + 16 * 16 * 3)) ** 0.5  # Xavier, the patch projection taken as a linear layer
    weight = state["patch_embed.proj.weight"]
    assert 0.98 * bound < weight.abs().max() <= bound
    bound = (6 / (192 + 576)) ** 0.5
    assert 0.98 * bound < state["blocks.3.attn.qkv.weight"].abs().max() <= bound
    assert not state["blocks.3.attn.qkv.bias"].any()
    assert not state["decoder_blocks.1.mlp.fc1.bias"].any()
    assert 0.015 < state["cls_token"].std() < 0.025
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_patches_are_cut_as_in_the_reference_and_put_back():
    model = small_model()
    images, _ = inputs(32, 16)
    patches = model.patchify(images)
    torch.testing.assert_close(patches[0], reference.cut_patches(images[0], 8), rtol=0, atol=0)
    assert torch.equal(model.unpatchify(patches), images)


def test_fused_and_explicit_attention_agree():
    model = small_model()
    images, noise = inputs(32, 16)
    losses, gradients = [], []
    for fused in (True, False):
        use_fused_attention(model, fused)
        assert all(block.attn.fused_attn is fused for block in [*model.blocks, *model.decoder_blocks])
        model.zero_grad()
        loss = model(images, noise).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(monkeypatch):
    images, noise = inputs(32, 16)
    recomputed = []
    real = vit_mae.checkpoint
    monkeypatch.setattr(vit_mae, "checkpoint", lambda f, *a, **k: (recomputed.append(f), real(f, *a, **k))[1])
    gradients = []
    for flag in (False, True):
        model = small_model(activation_checkpointing=flag)
        model(images, noise).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(recomputed) == 12 + 4
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-7)


def test_bf16_weights_compare_with_a_target_in_full_precision():
    model = small_model()
    images, noise = inputs(32, 16)
    with torch.no_grad():
        full = model(images, noise)
        half = model.bfloat16()(images, noise)
    assert half.pred.dtype == half.latent.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    assert abs(float(half.loss - full.loss)) < 0.02 * float(full.loss)
    # the target was made of the images as they came, not of rounded ones
    again = masked_patch_loss(half.pred, model.patchify(images), half.mask, norm_pix_loss=True)
    assert torch.equal(again, half.loss)


def test_encoding_all_tokens_or_some():
    model = small_model().eval()
    images, _ = inputs(32, 16)
    whole = model.encode(images)
    assert whole.shape == (2, 17, 192)
    order = torch.arange(16).flip(0).expand(2, -1)
    torch.testing.assert_close(model.encode(images, order)[:, 1:], whole[:, 1:].flip(1), rtol=1e-4, atol=1e-5)
    assert model.encode(images, order[:, :4]).shape == (2, 5, 192)


def test_the_encoder_alone_is_that_of_the_autoencoder():
    model = small_model()
    encoder = MaeEncoder(VIT_SIZES["tiny"], image_size=32, patch_size=8, in_channels=3)
    names = encoder.state_dict().keys()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in names})
    assert {k for k in model.state_dict() if "decoder" not in k and k != "mask_token"} == set(names)
    images, _ = inputs(32, 16)
    ids = torch.tensor([[3, 1], [0, 15]])
    assert torch.equal(encoder(images, ids), model.encode(images, ids))


def test_an_image_size_that_the_patches_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match="not a multiple"):
        create_vit_mae("tiny", image_size=100, patch_size=16)


def official(path: Path, weights: dict[str, torch.Tensor], **more) -> Path:
    args = argparse.Namespace(model="mae_vit_tiny", lr=1e-4, output_dir="runs", distributed=True)
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": args} | more, path)
    return path


def test_an_official_checkpoint_loads_strictly(tmp_path):
    weights = random_weights("tiny", 16)
    model = create_vit_mae("tiny", image_size=64)
    assert load_mae_checkpoint(model, official(tmp_path / "mae.pth", weights)) == "encoder and decoder loaded"
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_safetensors_of_the_same_names_load(tmp_path):
    weights = random_weights("tiny", 16)
    save_file(weights, tmp_path / "mae.safetensors")
    model = create_vit_mae("tiny", image_size=64)
    load_mae_checkpoint(model, tmp_path / "mae.safetensors")
    assert torch.equal(model.decoder_pred.weight, weights["decoder_pred.weight"])


def test_a_checkpoint_of_the_encoder_alone_leaves_the_decoder_fresh_and_says_so(tmp_path):
    weights = {
        k: v for k, v in random_weights("tiny", 16).items() if "decoder" not in k and k != "mask_token"
    }
    model = create_vit_mae("tiny", image_size=64)
    before = model.decoder_pred.weight.clone()
    words = load_mae_checkpoint(model, official(tmp_path / "mae.pth", weights))
    assert "decoder freshly initialized" in words
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert torch.equal(model.decoder_pred.weight, before)


def test_positions_are_interpolated_for_another_image_size(tmp_path):
    weights = random_weights("tiny", 16)
    model = create_vit_mae("tiny", image_size=128)
    words = load_mae_checkpoint(model, official(tmp_path / "mae.pth", weights))
    assert words.endswith("interpolated: pos_embed, decoder_pos_embed")
    assert torch.equal(model.pos_embed[:, 0], weights["pos_embed"][:, 0])
    assert torch.equal(model.pos_embed, interpolate_position_embedding(weights["pos_embed"], 64))


def test_interpolation_keeps_a_ramp_a_ramp():
    ramp = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), dim=-1)
    embedding = torch.cat([torch.zeros(1, 2), ramp.reshape(64, 2)])[None]
    grid = interpolate_position_embedding(embedding, 256)[0, 1:].reshape(16, 16, 2)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    # torch's cubic kernel (a = -0.75) bends a ramp by 0.047; borders are clamped
    torch.testing.assert_close(grid[4:12, 8, 0], expected[4:12], rtol=0, atol=0.05)
    torch.testing.assert_close(grid[8, 4:12, 1], expected[4:12], rtol=0, atol=0.05)
    assert interpolate_position_embedding(embedding, 64) is embedding


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.7.attn.proj.bias"), "blocks.7.attn.proj.bias is missing"),
        (lambda w: w.update(fc_norm=torch.zeros(3)), "fc_norm is unknown"),
        (
            lambda w: w.update({"norm.weight": torch.zeros(5)}),
            r"norm.weight has shape \(5,\), not \(192,\)",
        ),
        (lambda w: w.update(pos_embed=torch.zeros(1, 8, 192)), "pos_embed has shape"),
        (lambda w: w.pop("mask_token"), "mask_token is missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    weights = random_weights("tiny", 16)
    change(weights)
    with pytest.raises(DataError, match=words):
        load_mae_checkpoint(create_vit_mae("tiny", image_size=64), official(tmp_path / "mae.pth", weights))


def test_files_that_are_no_checkpoints(tmp_path):
    model = create_vit_mae("tiny", image_size=64)
    good = official(tmp_path / "mae.pth", random_weights("tiny", 16))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    numbers = tmp_path / "numbers.pth"
    torch.save([1, 2, 3], numbers)
    empty = tmp_path / "empty.pth"
    empty.touch()
    for path in (
        tmp_path / "missing.pth",
        tmp_path / "missing.safetensors",
        cut,
        text,
        numbers,
        empty,
        tmp_path,
    ):
        with pytest.raises(DataError) as caught:
            load_mae_checkpoint(model, path)
        assert caught.value.where == path


def test_no_class_but_the_namespace_is_let_through(tmp_path):
    path = official(tmp_path / "bad.pth", random_weights("tiny", 16), extra=functools.partial(print, "run"))
    with pytest.raises(DataError, match="safely"):
        load_mae_checkpoint(create_vit_mae("tiny", image_size=64), path)


def test_position_embedding_of_an_odd_grid():
    torch.testing.assert_close(
        sincos_position_embedding(64, 5), reference.position_embedding(64, 5).float(), atol=1e-6, rtol=0
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


def test_a_checkpoint_of_three_channels_starts_a_model_with_an_input_channel(tmp_path):
    weights = random_weights("tiny", 16)
    path = official(tmp_path / "mae.pth", weights)
    plain, model = (
        create_vit_mae("tiny", image_size=64),
        create_vit_mae("tiny", image_size=64, input_channel=InputChannelConfig()),
    )
    load_mae_checkpoint(plain, path)
    words = load_mae_checkpoint(model, path)
    assert words == (
        "encoder and decoder loaded; the patch projection of the added input channel starts at zero"
    )
    kernel = model.patch_embed.proj.weight
    assert torch.equal(kernel[:, :3], weights["patch_embed.proj.weight"])
    assert not kernel[:, 3].any()
    images, noise = inputs(64, 16)
    torch.testing.assert_close(model(images, noise).loss, plain(images, noise).loss, rtol=1e-5, atol=1e-6)
    # its own weights come back whole, and do not fit a model without the channel
    jiggle(model)
    save_file(model.state_dict(), tmp_path / "four.safetensors")
    again = create_vit_mae("tiny", image_size=64, input_channel=InputChannelConfig())
    assert load_mae_checkpoint(again, tmp_path / "four.safetensors") == "encoder and decoder loaded"
    assert torch.equal(again.patch_embed.proj.weight, kernel)
    with pytest.raises(DataError, match=r"patch_embed\.proj\.weight has shape"):
        load_mae_checkpoint(plain, tmp_path / "four.safetensors")


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


def test_pooled_tokens_and_the_map_leave_the_class_token_out():
    model = small_model().eval()
    images, noise = inputs(32, 16)
    output = model(images, noise)
    torch.testing.assert_close(output.pooled, output.latent[:, 1:].mean(dim=1))
    tokens = model.encode(images)[:, 1:]
    grid = model.map(images)
    assert grid.shape == (2, 192, 4, 4)
    torch.testing.assert_close(grid[1, :, 2, 3], tokens[1, 2 * 4 + 3])

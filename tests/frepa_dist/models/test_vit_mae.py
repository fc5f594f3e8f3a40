from __future__ import annotations

import pytest
import torch
from torch import nn

from frepa_dist.losses import masked_patch_loss
from frepa_dist.models import vit_mae
from frepa_dist.models.init import interpolate_position_embedding, sincos_position_embedding
from frepa_dist.models.vit_mae import (
    VIT_SIZES,
    MaeEncoder,
    create_vit_mae,
    use_fused_attention,
)
from shards.support.errors import ConfigError
from tests.frepa_dist.models.small_vit import (
    inputs,
    jiggle,
    reference,
    shapes_of,
    small_model,
)


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


def test_interpolation_keeps_a_ramp_a_ramp():
    ramp = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), dim=-1)
    embedding = torch.cat([torch.zeros(1, 2), ramp.reshape(64, 2)])[None]
    grid = interpolate_position_embedding(embedding, 256)[0, 1:].reshape(16, 16, 2)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    # torch's cubic kernel (a = -0.75) bends a ramp by 0.047; borders are clamped
    torch.testing.assert_close(grid[4:12, 8, 0], expected[4:12], rtol=0, atol=0.05)
    torch.testing.assert_close(grid[8, 4:12, 1], expected[4:12], rtol=0, atol=0.05)
    assert interpolate_position_embedding(embedding, 64) is embedding


def test_position_embedding_of_an_odd_grid():
    torch.testing.assert_close(
        sincos_position_embedding(64, 5), reference.position_embedding(64, 5).float(), atol=1e-6, rtol=0
    )


def test_pooled_tokens_and_the_map_leave_the_class_token_out():
    model = small_model().eval()
    images, noise = inputs(32, 16)
    output = model(images, noise)
    torch.testing.assert_close(output.pooled, output.latent[:, 1:].mean(dim=1))
    tokens = model.encode(images)[:, 1:]
    grid = model.map(images)
    assert grid.shape == (2, 192, 4, 4)
    torch.testing.assert_close(grid[1, :, 2, 3], tokens[1, 2 * 4 + 3])

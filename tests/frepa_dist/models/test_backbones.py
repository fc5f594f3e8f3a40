"""Every backbone gives a map after its final norm, image by image, at every size that fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frepa_dist.models.autoencoder import BackboneAutoencoder, create_autoencoder
from frepa_dist.models.backbones import (
    Backbone,
    BackboneSettings,
    PooledEncoder,
    create_backbone,
)
from frepa_dist.models.catalog import BACKBONES, check_image_size, find_backbone, fits_size, window_size
from frepa_dist.models.decoder import Decoder, stage_widths
from frepa_dist.models.vit_mae import use_fused_attention
from shards.support.errors import ConfigError
from shards.support.settings import validate

TWINS = ["vit_pico", "swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]


def noise(num=2, size=96, seed=0):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small(name, size=96, **settings):
    """An autoencoder whose norms, scales and biases are no longer what they started as."""
    torch.manual_seed(0)
    model = create_autoencoder(BackboneSettings(backbone=name, image_size=size, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_at_full_size(name):
    for size in (224, 512):
        with torch.device("meta"):
            model = create_autoencoder(BackboneSettings(backbone=name, image_size=size))
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = model.to_empty(device="cpu")
            output = model(torch.empty(3, 3, size, size), num_decoded=2)
            features = model.map(torch.empty(1, 3, size, size))
        side = size // BACKBONES[name].stride
        assert output.prediction.shape == (2, 3, size, size)
        assert output.embedding.shape == (3, 128, side, side)
        assert output.pooled.shape == (3, model.width)
        assert features.shape == (1, model.width, side, side)
        assert (model.patch_size == 16) == name.startswith("vit")


@pytest.mark.parametrize("name", BACKBONES)
def test_no_norm_depends_on_the_batch(name):
    with torch.device("meta"):
        model = Backbone(name, 224)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert list(model.buffers()) == [
        b for n, b in model.named_buffers() if "relative" in n or "mask" in n or "k_bias" in n
    ]


@pytest.mark.parametrize("name", TWINS)
def test_an_image_alone_gives_what_it_gives_in_a_batch(name):
    model = small(name).eval()
    images = noise(3)
    with torch.no_grad():
        whole = model(images)
        for row in range(3):
            alone = model(images[row : row + 1])
            torch.testing.assert_close(alone.prediction[0], whole.prediction[row], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone.pooled[0], whole.pooled[row], atol=1e-5, rtol=1e-4)
    assert (whole.pooled[0] - whole.pooled[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TWINS)
def test_the_map_is_after_the_final_norm(name):
    """timm's own pooled features are the mean of the map."""
    model = small(name).eval()
    with torch.no_grad():
        features = model.map(noise())
        torch.testing.assert_close(
            features.mean(dim=(2, 3)), model.encoder.trunk(noise()), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(model.embed(noise()), features.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    if not name.startswith("resnet"):  # which ends without a norm
        trunk = model.encoder.trunk
        norm = trunk.norm_pre if name.startswith("convnext") else trunk.norm
        scaled = (features - norm.bias[:, None, None]) / norm.weight[:, None, None]
        torch.testing.assert_close(scaled.mean(1), torch.zeros_like(scaled[:, 0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(scaled.std(1), torch.ones_like(scaled[:, 0]), atol=0.05, rtol=0)


def test_some_patches_of_a_vision_transformer():
    model = small("vit_pico").eval()
    everything = torch.arange(36).flip(0).expand(2, -1)
    with torch.no_grad():
        features = model.map(noise()).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.encoder(noise(), everything), features.flip(1), atol=1e-5, rtol=1e-4)
        some = torch.tensor([[3, 1, 7], [0, 2, 5]])
        tokens = model.encoder(noise(), some)
        hidden = noise()
        hidden[:, :, 32:] = 0  # rows of patches 12 and more
        torch.testing.assert_close(model.encoder(hidden, some), tokens)
        torch.testing.assert_close(model.embed(noise(), some), tokens.mean(1))
    assert tokens.shape == (2, 3, 64)
    assert (model.map(hidden).flatten(2)[0, :, 3] - tokens[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TWINS[1:])
def test_the_others_see_whole_images(name):
    with pytest.raises(ConfigError, match=r"none of its positions can be left out.*vit_"):
        small(name).embed(noise(), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("name", TWINS)
def test_gradients_with_and_without_activation_checkpointing(name):
    gradients, saved = [], []
    for flag in (False, True):
        model = small(name, activation_checkpointing=flag)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(noise(), num_decoded=1).prediction.square().mean()
        loss.backward()
        saved.append(sum(sizes))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert saved[1] < 0.6 * saved[0]
    for key, gradient in gradients[0].items():
        assert gradient is not None, f"{key} takes no part"
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_pico", "swin_pico"])
def test_fused_and_explicit_attention_agree(name):
    model = small(name, size=224).eval()
    embedded = []
    for fused in (True, False):
        use_fused_attention(model, fused)
        attention = [m for m in model.modules() if hasattr(m, "fused_attn")]
        assert attention
        assert all(m.fused_attn is fused for m in attention)
        with torch.no_grad():
            embedded.append(model.embed(noise(size=224)))
    torch.testing.assert_close(*embedded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TWINS)
def test_bf16_weights_predict_in_float32(name):
    model = small(name).eval()
    with torch.no_grad():
        full, half = model(noise()), model.bfloat16()(noise())
    assert half.prediction.dtype == half.pooled.dtype == torch.float32
    assert half.embedding.dtype == torch.bfloat16
    assert (half.prediction - full.prediction).abs().max() < 0.1 * full.prediction.abs().max()
    # more grey levels than bfloat16 has between two powers of two
    between = half.prediction[(half.prediction > 0.25) & (half.prediction < 0.5)]
    assert len(between.unique()) > 129


def test_drop_path_is_drawn_from_torch_s_generator():
    model = small("convnext_twin", drop_path=0.5).train()
    embedded = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        embedded.append(model.embed(noise(4)))
    assert torch.equal(embedded[0], embedded[1])
    assert not torch.equal(embedded[0], embedded[2])


def test_a_teacher_s_names_are_a_subset():
    settings = BackboneSettings(backbone="swin_pico", image_size=96)
    student, teacher = small("swin_pico").eval(), PooledEncoder(create_backbone(settings)).eval()
    state = student.state_dict()
    teacher.load_state_dict({key: state[key] for key in teacher.state_dict()})
    assert torch.equal(teacher(noise()), student.embed(noise()))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_multiple_of_32_from_224_to_512_fits(name):
    assert all(fits_size(name, size) for size in range(224, 513, 32))
    assert not fits_size(name, 500)


@pytest.mark.parametrize("size", [64, 96, 224, 256, 320, 384, 448, 512])
@pytest.mark.parametrize("name", ["swin_pico", "swinv2_pico"])
def test_windows_fill_the_maps(name, size):
    model = Backbone(name, size)
    sides = {}
    for stage in model.trunk.layers:
        for block in stage.blocks:
            side, window = block.input_resolution[0], block.window_size[0]
            assert side % window == 0
            sides[side] = window
    assert list(sides) == [size // stride for stride in (4, 8, 16, 32)]
    assert sides[size // 4] == window_size(size)


def test_windows_of_the_published_sizes():
    assert {size: window_size(size) for size in (224, 256, 512)} == {224: 7, 256: 8, 512: 8}


@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny", 500), ("vit_base", 230), ("resnet50", 240), ("swinv2_base", 544)]
)
def test_sizes_that_do_not_fit_are_refused_and_others_named(name, size):
    with pytest.raises(ConfigError, match=f"{size} does not fit {name}") as caught:
        check_image_size(name, size)
    named = [int(number) for number in caught.value.allowed.removeprefix("near it: ").split(", ")]
    assert len(named) == 4
    assert all(fits_size(name, other) and abs(other - size) <= 96 for other in named)
    with pytest.raises(ConfigError, match="does not fit"):
        validate(BackboneSettings, {"backbone": name, "image_size": size}, where="test")
    with pytest.raises(ConfigError, match="does not fit"):
        Backbone(name, size)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "vgg"}, "no such backbone; allowed: vit_tiny"),
        ({"std": [0, 1, 1]}, "'std' must be positive"),
        ({"drop_path": 1}, "less than 1"),
        ({"input_channel": "edges"}, "input_channel"),
        ({"neck": 3}, "unknown key 'neck'"),
    ],
)
def test_settings_that_are_wrong(settings, words):
    with pytest.raises(ConfigError, match=words):
        validate(BackboneSettings, settings, where="test")


def test_a_name_that_is_unknown():
    with pytest.raises(ConfigError, match="convnext_tiny"):
        find_backbone("vgg")


def test_settings_say_what_methods_ask():
    settings = validate(BackboneSettings, {"backbone": "vit_base", "init": "timm"}, where="test")
    assert (settings.patch_size, settings.num_patches, settings.init) == (16, 1024, "timm")
    assert BackboneSettings(backbone="swin_base").num_patches == 256


@pytest.mark.parametrize(
    ("name", "parts"),
    [("swin_pico", "bias_table"), ("swinv2_pico", "logit_scale"), ("vit_pico", "pos_embed")],
)
def test_what_should_not_decay_is_named(name, parts):
    model = small(name)
    names = model.no_weight_decay()
    assert names <= {key for key, _ in model.named_parameters()}
    assert any(parts in key for key in names)
    assert small("resnet10").no_weight_decay() == set()


def test_widths_of_the_decoder():
    assert stage_widths(128, 16, 16, 8) == [64, 32, 16, 16]
    assert stage_widths(320, 32, 16, 8) == [160, 80, 40, 24, 16]
    assert stage_widths(128, 32, 1, 1) == [64, 32, 16, 8, 4]


@pytest.mark.parametrize(("stride", "stages"), [(1, 0), (8, 3), (16, 4), (32, 5)])
def test_the_decoder_undoes_the_stride(stride, stages):
    decoder = Decoder(24, stride, out_channels=1)
    assert len(decoder.stages) == stages
    assert decoder(torch.randn(2, 24, 3, 3)).shape == (2, 1, 3 * stride, 3 * stride)


def test_a_stride_that_cannot_be_undone():
    with pytest.raises(ConfigError, match="stride of 14"):
        Decoder(24, 14)


def test_without_a_neck_the_map_is_the_embedding():
    model = small("resnet10", neck_width=None).eval()
    output = model(noise())
    assert torch.equal(output.embedding, model.map(noise()))
    assert isinstance(model, BackboneAutoencoder)
    assert not any(key.startswith("neck") for key in model.state_dict())

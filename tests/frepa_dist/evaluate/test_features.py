"""Encoders of every source give the same features for the same weights, and say what is wrong otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from frepa_dist.evaluate.extract import extract_features
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.models.vit_mae import create_vit_mae
from shards.support.errors import ConfigError, DataError, EnvironmentFault

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def noise(size=64, num=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)


def test_feature_is_the_mean_patch_token_of_normalized_images(small_encoder, small_weights):
    model = create_vit_mae("tiny", image_size=64).eval()
    model.load_state_dict(small_weights)
    normalized = (noise().float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.no_grad():
        tokens = model.encode(normalized)
    encoder = load_encoder(small_encoder, "cpu")
    assert (encoder.width, encoder.image_size, encoder.patch_size) == (192, 64, 16)
    torch.testing.assert_close(encoder.encode(noise()), tokens[:, 1:].mean(dim=1))


def test_subset_of_tokens_and_its_order(small_encoder):
    encoder = load_encoder(small_encoder, "cpu")
    everything = torch.arange(16).repeat(3, 1)
    torch.testing.assert_close(
        encoder.encode(noise(), everything), encoder.encode(noise()), atol=1e-5, rtol=0
    )
    some = torch.tensor([[3, 1, 7]]).repeat(3, 1)
    kept = encoder.encode(noise(), some)
    torch.testing.assert_close(kept, encoder.encode(noise(), some.flip(1)), atol=1e-5, rtol=0)
    assert (kept - encoder.encode(noise())).abs().max() > 1e-3
    # what is outside the kept patches is not seen
    hidden = noise()
    hidden[:, :, 48:] = 0
    torch.testing.assert_close(encoder.encode(hidden, some), kept)


def test_timm_gives_the_same_features_for_the_same_weights(small_weights, small_encoder, monkeypatch):
    ours = load_encoder(small_encoder, "cpu")
    parts = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
    weights = {name: value for name, value in small_weights.items() if name.startswith(parts)}
    create = timm.create_model

    def create_small(name, pretrained=False, **kwargs):
        model = create(name, pretrained=False, img_size=64, num_classes=5)
        model.load_state_dict(weights, strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", create_small)
    theirs = load_encoder("timm:vit_tiny_patch16_224", "cpu")
    assert theirs.grid == (224, 16)  # timm's configuration says so; the model itself takes 64
    normalized = ours.normalize(noise())
    some = torch.tensor([[3, 1, 7]]).repeat(3, 1)
    for ids in (None, some):
        torch.testing.assert_close(
            theirs.embed(normalized, ids), ours.embed(normalized, ids), atol=1e-5, rtol=0
        )


def test_a_run_gives_its_newest_checkpoint(run_dir, small_encoder):
    encoder = load_encoder(run_dir, "cpu")
    assert encoder.name.endswith("step 12")
    torch.testing.assert_close(encoder.encode(noise()), load_encoder(small_encoder, "cpu").encode(noise()))


def test_random_encoders_are_seeded_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (load_encoder(source, "cpu") for source in ("random:tiny", "random:tiny:0", "random:tiny:1"))
    assert torch.equal(torch.get_rng_state(), before)
    images = noise(224, 1)
    torch.testing.assert_close(a.encode(images), b.encode(images))
    assert (a.encode(images) - c.encode(images)).abs().max() > 1e-3


def test_a_convolutional_encoder_has_features_and_no_tokens():
    encoder = load_encoder("timm:test_efficientnet", "cpu")
    size = encoder.image_size
    assert encoder.encode(noise(size, 2)).shape == (2, encoder.width)
    with pytest.raises(ConfigError, match="no tokens"):
        encoder.encode(noise(size, 2), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="no tokens"):
        _ = encoder.grid


@pytest.mark.parametrize(
    "source", ["random:huge", "random:swin_pico:x", "random:tiny:x", "timm:no_such_model", "no/such/place"]
)
def test_sources_that_do_not_exist(source):
    with pytest.raises(ConfigError, match="a run folder, an exported folder"):
        load_encoder(source)


def test_files_and_folders_that_are_no_encoder(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not the weights of an MAE"):
        load_encoder(tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(DataError, match="timm can load"):
        load_encoder(tmp_path)


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    def refuse(name, pretrained):
        assert pretrained
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(EnvironmentFault, match="no route to host;"):
        load_encoder("timm:vit_tiny_patch16_224?pretrained")


def test_files_come_in_order_whatever_the_batch(tmp_path, small_encoder):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(7):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (70, 64 + number), dtype=np.uint8)).save(paths[-1])
    encoder = load_encoder(small_encoder, "cpu")
    features = extract_features(encoder, paths, batch_size=2)
    assert features.shape == (7, 192)
    np.testing.assert_allclose(
        extract_features(encoder, paths[::-1], batch_size=5)[::-1], features, atol=1e-5
    )


def test_features_that_are_not_finite_are_refused(tmp_path, small_weights):
    broken = {**small_weights, "norm.bias": torch.full((192,), torch.nan)}
    save_file(broken, tmp_path / "broken.safetensors")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="NaN"):
        extract_features(load_encoder(tmp_path / "broken.safetensors", "cpu"), [tmp_path / "a.png"])


FAMILIES = ["vit_pico", "swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_of_any_backbone(name, make_backbone_run):
    run, student = make_backbone_run(name)
    encoder = load_encoder(run, "cpu")
    assert (encoder.width, encoder.image_size, encoder.min_max) == (student.width, 64, True)
    assert encoder.patch_size == (16 if name == "vit_pico" else None)
    normalized = encoder.normalize(noise())
    features = encoder.map(normalized)
    assert features.shape == (3, student.width, *(2 * [64 // student.encoder.stride]))
    with torch.no_grad():
        torch.testing.assert_close(features, student.map(normalized))
    torch.testing.assert_close(encoder.embed(normalized), features.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    names = {key for key, _ in encoder.module.named_parameters()}
    assert names == {key for key, _ in student.encoder.named_parameters()}
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    if encoder.patch_size is None:
        with pytest.raises(ConfigError, match="can be left out"):
            encoder.embed(normalized, torch.zeros(3, 1, dtype=torch.long))


def test_images_are_scaled_by_their_range_where_the_run_did(make_backbone_run):
    scaling, plain = (
        load_encoder(make_backbone_run(name, min_max=flag)[0], "cpu")
        for name, flag in (("resnet10", True), ("convnext_twin", False))
    )
    dark = noise() // 4 + 30
    normalized = scaling.normalize(dark) * STD[:, None, None] + MEAN[:, None, None]
    torch.testing.assert_close(normalized.amin((1, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalized.amax((1, 2, 3)), torch.ones(3), atol=1e-6, rtol=0)
    expected = (dark.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    torch.testing.assert_close(plain.normalize(dark), expected)
    for encoder in (scaling, plain):  # floating point in [0, 1] is the same image
        torch.testing.assert_close(encoder.normalize(dark.float() / 255), encoder.normalize(dark))
    flat = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    assert torch.isfinite(scaling.encode(flat)).all()


def test_the_map_of_a_masked_autoencoder(run_dir, small_encoder):
    for source in (run_dir, small_encoder):
        encoder = load_encoder(source, "cpu")
        normalized = encoder.normalize(noise())
        features = encoder.map(normalized)
        assert features.shape == (3, 192, 4, 4)
        torch.testing.assert_close(features.mean((2, 3)), encoder.embed(normalized), atol=1e-5, rtol=1e-4)
        # row 1, column 2 is patch 6 alone
        hidden = noise()
        hidden[:, :, 32:] = 0
        alone = encoder.module.encode(normalized)[:, 1:][:, 6]
        torch.testing.assert_close(features[:, :, 1, 2], alone)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
        ),
        ("test_resnet", {}),
    ],
)
def test_the_map_of_a_timm_model_is_after_its_last_norm(name, settings, monkeypatch):
    create = timm.create_model
    torch.manual_seed(0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: create(name, **settings))
    encoder = load_encoder(f"timm:{name}", "cpu")
    with torch.no_grad():
        features = encoder.map(encoder.normalize(noise(64, 2)))
    assert features.shape[:2] == (2, encoder.width)
    assert features.shape[2] == features.shape[3] <= 8
    if "resnet" not in name:  # fresh norms: mean 0, variance 1 at every position
        torch.testing.assert_close(features.mean(1), torch.zeros_like(features[:, 0]), atol=1e-3, rtol=0)
        torch.testing.assert_close(features.var(1), torch.ones_like(features[:, 0]), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_encoders_of_every_backbone(name):
    images = noise(224, 1)
    a, b, c = (load_encoder(f"random:{name}{seed}", "cpu") for seed in ("", ":0", ":1"))
    torch.testing.assert_close(a.encode(images), b.encode(images))
    assert (a.encode(images) - c.encode(images)).abs().max() > 1e-3
    assert a.image_size == 224
    assert not a.min_max


def test_the_weights_of_a_backbone_s_run_without_the_run(make_backbone_run):
    run, _ = make_backbone_run("swin_pico")
    (path,) = run.rglob("student.safetensors")
    with pytest.raises(DataError, match="name the run folder"):
        load_encoder(path, "cpu")

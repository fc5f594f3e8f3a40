"""Weights of every source: loaded strictly, brought into shape where that makes sense, and said in words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from frepa_dist.export import export_encoder
from frepa_dist.models import initialize as module
from frepa_dist.models.autoencoder import create_autoencoder, initialize
from frepa_dist.models.backbones import BackboneSettings
from frepa_dist.models.catalog import BACKBONES
from frepa_dist.models.init import interpolate_position_embedding
from shards.support.errors import ConfigError, DataError, EnvironmentFault

_SPEC = importlib.util.spec_from_file_location(
    "mae_reference", Path(__file__).parents[3] / "tools" / "mae_reference.py"
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

FAMILIES = ["vit_pico", "swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]


def settings(backbone, init, size=64, **more):
    return BackboneSettings(backbone=backbone, init=init, image_size=size, **more)


def fresh(wanted):
    torch.manual_seed(3)
    return create_autoencoder(wanted)


def mae_weights(size=64, patch_size=16, encoder_only=False):
    """Official names and shapes of a ViT-Ti MAE, random values."""
    shapes = reference.weight_shapes(192, 12, 128, 4, (size // patch_size) ** 2, patch_size)
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if encoder_only:
        weights = {k: v for k, v in weights.items() if "decoder" not in k and k != "mask_token"}
    return weights


def assert_encoder_is(model, weights, *, but=()):
    state = model.encoder.trunk.state_dict()
    assert len(state) > 5
    for key, value in state.items():
        if key not in but:
            torch.testing.assert_close(value, weights[key], rtol=0, atol=0, msg=key)


def test_nothing_to_load():
    assert initialize(fresh(settings("resnet10", None)), settings("resnet10", None)) == "freshly initialized"


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_an_official_mae_checkpoint(form, tmp_path):
    weights, path = mae_weights(), tmp_path / f"mae.{form}"
    if form == "pth":
        torch.save({"model": weights, "epoch": 3}, path)
    else:
        save_file(weights, path)
    wanted = settings("vit_tiny", path)
    model = fresh(wanted)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    words = initialize(model, wanted)
    assert words == (
        "encoder loaded, neck and decoder freshly initialized; left out: class token, decoder; "
        "resized: pos_embed"
    )
    assert_encoder_is(model, weights, but=["pos_embed"])
    # the class token's row is gone, the grid is as it was
    assert torch.equal(model.encoder.trunk.pos_embed, weights["pos_embed"][:, 1:])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(("neck", "decoder")), key


def test_a_retfound_checkpoint_for_another_image_size_and_patch_grid(tmp_path):
    weights = mae_weights(size=96, patch_size=24, encoder_only=True)
    save_file(weights, tmp_path / "retfound.safetensors")
    wanted = settings("vit_tiny", tmp_path / "retfound.safetensors", size=128)
    model = fresh(wanted)
    words = initialize(model, wanted)
    assert words.endswith("left out: class token; resized: patch_embed.proj.weight, pos_embed")
    expected = interpolate_position_embedding(weights["pos_embed"], 64)[:, 1:]
    assert torch.equal(model.encoder.trunk.pos_embed, expected)
    assert_encoder_is(model, weights, but=["pos_embed", "patch_embed.proj.weight"])
    kernel = model.encoder.trunk.patch_embed.proj.weight
    assert kernel.shape == (192, 3, 16, 16)
    # a patch of the same picture at 16 px is answered much as at 24 px
    patch = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=(48, 48), mode="bicubic")
    large = torch.nn.functional.interpolate(patch, size=(24, 24), mode="area")
    small = torch.nn.functional.interpolate(patch, size=(16, 16), mode="area")
    with torch.no_grad():
        a = torch.nn.functional.conv2d(large, weights["patch_embed.proj.weight"]).flatten()
        b = torch.nn.functional.conv2d(small, kernel).flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_gives_all_of_its_network(name, make_backbone_run):
    run, student = make_backbone_run(name)
    wanted = settings(name, run)
    model = fresh(wanted)
    assert initialize(model, wanted) == "encoder, neck and decoder loaded"
    for key, value in model.state_dict().items():
        assert torch.equal(value, student.state_dict()[key]), key


@pytest.mark.parametrize("name", ["vit_pico", "swin_pico", "swinv2_pico"])
def test_a_run_at_another_image_size(name, make_backbone_run):
    run, student = make_backbone_run(name)
    wanted = settings(name, run, size=224)
    model = fresh(wanted)
    words = initialize(model, wanted)
    if name == "swinv2_pico":  # its positions are continuous
        assert words == "encoder, neck and decoder loaded"
    else:
        assert "; resized: " in words
    assert_encoder_is(
        model,
        student.encoder.trunk.state_dict(),
        but=[
            key for key, _ in student.encoder.trunk.named_parameters() if key.endswith(("table", "pos_embed"))
        ],
    )
    assert torch.equal(model.neck[0].weight, student.neck[0].weight)


def test_relative_positions_keep_their_meaning(make_backbone_run):
    """A bias that grows with the distance still does so, by the same amount, in a smaller window."""
    run, student = make_backbone_run("swin_pico")
    path = next(run.rglob("student.safetensors"))
    weights = load_file(path)
    key = "encoder.trunk.layers.0.blocks.0.attn.relative_position_bias_table"
    ramp = torch.linspace(-1, 1, 15)
    weights[key] = ramp.repeat_interleave(15)[:, None].contiguous()
    save_file(weights, path)
    wanted = settings("swin_pico", run, size=224)
    model = fresh(wanted)
    initialize(model, wanted)
    table = model.encoder.trunk.layers[0].blocks[0].attn.relative_position_bias_table.reshape(13, 13)
    torch.testing.assert_close(table[:, 6], torch.arange(-6, 7) / 7, atol=0.05, rtol=0)
    torch.testing.assert_close(table.std(dim=1), torch.zeros(13), atol=1e-3, rtol=0)
    assert student.encoder.trunk.layers[0].blocks[0].window_size == (8, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_folder(name, make_backbone_run, tmp_path):
    run, student = make_backbone_run(name)
    folder = export_encoder(run, tmp_path / "encoder")
    wanted = settings(name, folder)
    model = fresh(wanted)
    assert initialize(model, wanted) == "encoder loaded, neck and decoder freshly initialized"
    assert_encoder_is(model, student.encoder.trunk.state_dict())


def test_a_run_of_mae(run_dir):
    wanted = settings("vit_tiny", run_dir)
    model = fresh(wanted)
    assert "left out: class token, decoder" in initialize(model, wanted)
    assert_encoder_is(model, load_file(next(run_dir.rglob("student.safetensors"))), but=["pos_embed"])


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_s_weights(name, monkeypatch):
    """Pretrained at their own size, with a classifier, ConvNeXt's last norm behind the pooling."""
    entry = BACKBONES[name]
    arguments = {
        k: v
        for k, v in entry.arguments.items()
        if k not in ("head_norm_first", "class_token", "global_pool", "fc_norm")
    }
    source = timm.create_model(entry.architecture, **arguments)
    create, pretrained = timm.create_model, []

    def fetch(architecture, pretrained_=None, **given):
        if given.get("pretrained"):
            pretrained.append(architecture)
            return source
        return create(architecture, **given)

    wanted = settings(name, "timm", size=96)
    model = fresh(wanted)
    monkeypatch.setattr(timm, "create_model", fetch)
    monkeypatch.setitem(module.BACKBONES, name, entry._replace(pretrained=True))
    words = initialize(model, wanted)
    assert pretrained == [entry.architecture]
    assert words.startswith("encoder loaded, neck and decoder freshly initialized")
    assert "left out: " in words
    assert "head" in words
    weights = {key.replace("head.norm", "norm_pre"): value for key, value in source.state_dict().items()}
    but = [key for key in weights if key.endswith(("table", "pos_embed"))]
    assert_encoder_is(model, weights, but=but)


def test_a_fourth_channel_starts_silent(make_backbone_run):
    for name in FAMILIES:
        run, student = make_backbone_run(name)
        wanted = settings(name, run, input_channel="response")
        model = fresh(wanted)
        assert "the fourth input channel starts at zero" in initialize(model, wanted)
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval().embed(images), student.embed(images), atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.7.attn.proj.bias"), "blocks.7.attn.proj.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(3)), "extra is unknown"),
        (lambda w: w.update({"norm.weight": torch.zeros(5)}), r"norm.weight has shape \(5,\), not \(192,\)"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 8, 192)), "pos_embed has shape"),
        (
            lambda w: w.update({"patch_embed.proj.weight": torch.zeros(192, 5, 16, 16)}),
            "patch_embed.proj.weight has shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, words, tmp_path):
    weights = mae_weights()
    change(weights)
    save_file(weights, tmp_path / "mae.safetensors")
    wanted = settings("vit_tiny", tmp_path / "mae.safetensors")
    with pytest.raises(DataError, match=words):
        initialize(fresh(wanted), wanted)


def test_a_run_of_another_network(make_backbone_run):
    run, _ = make_backbone_run("swin_pico")
    for name, more, words in (
        ("resnet10", {}, "conv1.weight is missing"),
        ("swin_pico", {"neck_width": 64}, r"decoder.stages.0.conv.weight has shape \(64, 128, 3, 3\)"),
        ("swin_pico", {"neck_width": None}, "neck.0.weight is unknown"),
    ):
        wanted = settings(name, run, **more)
        with pytest.raises(DataError, match=words):
            initialize(fresh(wanted), wanted)


def test_places_without_weights(tmp_path):
    wanted = settings("resnet10", tmp_path)
    with pytest.raises(DataError, match="holds no weights"):
        initialize(fresh(wanted), wanted)
    wanted = settings("resnet10", tmp_path / "missing.pth")
    with pytest.raises(DataError, match="cannot be read"):
        initialize(fresh(wanted), wanted)


def test_timm_s_weights_that_there_are_not_or_cannot_be_had(monkeypatch):
    wanted = settings("resnet18", "timm")
    with pytest.raises(ConfigError, match=r"no pretrained weights that fit resnet18.*resnet50"):
        initialize(fresh(wanted), wanted)
    wanted = settings("vit_tiny", "timm")
    model = fresh(wanted)

    def refuse(name, pretrained):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(EnvironmentFault, match="no route to host; to mend it"):
        initialize(model, wanted)


@pytest.mark.parametrize("name", [name for name, entry in BACKBONES.items() if entry.pretrained])
def test_timm_s_default_weights_fit_every_backbone_that_claims_some(name):
    """By shapes alone: the weights themselves are not fetched."""
    with torch.device("meta"):
        source = timm.create_model(BACKBONES[name].architecture)
        model = create_autoencoder(settings(name, "timm", size=512))
    assert source.pretrained_cfg.get("hf_hub_id") or source.pretrained_cfg.get("url")
    assert source.pretrained_cfg["num_classes"], "weights without a classifier lack ConvNeXt's last norm"
    own, _ = module.adapt_weights(
        {key: torch.empty(value.shape) for key, value in source.state_dict().items()}, model.encoder
    )
    expected = {key: value.shape for key, value in model.encoder.trunk.state_dict().items()}
    assert {key: value.shape for key, value in own.items()} == expected

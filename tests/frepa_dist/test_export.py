"""The exported folder: timm loads it, its features are the run's, its card tells no secrets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frepa_dist import export
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.export import config_digest, export_encoder
from frepa_dist.export_layout import ARCHITECTURES, describe_layout
from frepa_dist.models.vit_mae import VIT_SIZES
from frepa_dist.normalization import min_max_scale
from frepa_dist.runs import load_run_config, load_student
from shards.support.errors import ConfigError, DataError, EnvironmentFault


def noise(size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)


def test_timm_gives_the_features_of_the_run(run_dir, tmp_path):
    folder = export_encoder(run_dir, tmp_path / "encoder")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], model.num_classes) == ((3, 64, 64), 1.0, 0)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    student, _, _ = load_student(run_dir)
    normalized = (noise().float() / 255 - mean) / std
    with torch.no_grad():
        features, expected = model(normalized), student.encode(normalized)[:, 1:].mean(dim=1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)(normalized).shape == (
        3,
        5,
    )
    torch.testing.assert_close(load_encoder(folder, "cpu").encode(noise()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", VIT_SIZES)
def test_timm_s_architectures_have_our_widths(size):
    with torch.device("meta"):
        model = timm.create_model(ARCHITECTURES[size])
    known = VIT_SIZES[size]
    heads = model.blocks[0].attn.num_heads
    assert (model.embed_dim, len(model.blocks), heads) == (known.width, known.depth, known.heads)


def test_weights_are_the_encoder_s_alone_with_their_provenance(run_dir, tmp_path):
    path = export_encoder(run_dir, tmp_path / "encoder") / "model.safetensors"
    weights = load_file(path)
    assert not any("decoder" in name or "mask_token" in name for name in weights)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "12"
    assert metadata["samples_seen"] == "48"
    assert metadata["snapshot"] == load_run_config(run_dir).data.snapshot


def test_card_says_what_it_is_and_names_no_place(run_dir, tmp_path, small_dataset):
    folder = export_encoder(run_dir, tmp_path / "encoder")
    card = (folder / "README.md").read_text(encoding="utf-8")
    config = load_run_config(run_dir)
    for text in (
        "vit_tiny_patch16_224",
        "64 x 64",
        "0.485",
        "torch 2.15.0",
        "| histopathology | ",
        "| 7 | 0 |",
    ):
        assert text in card
    assert config.data.snapshot in card
    assert config_digest(config) in card
    for path in folder.iterdir():
        data = path.read_bytes()
        for place in (run_dir, small_dataset, tmp_path):
            assert str(place).encode() not in data


def test_digest_is_of_the_settings_and_not_of_the_places(run_dir):
    config = load_run_config(run_dir)
    moved = config.model_copy(update={"output": run_dir / "elsewhere"})
    assert config_digest(moved) == config_digest(config)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    assert config_digest(other) != config_digest(config)


def test_names_of_files_in_the_config_lose_their_folders(run_dir, tmp_path):
    text = (run_dir / "config.yaml").read_text().replace("init: null", "init: /home/someone/mae_base.pth")
    (run_dir / "config.yaml").write_text(text)
    config = load_run_config(run_dir)
    student, _, _ = load_student_without_init(run_dir)
    provenance = export.describe_provenance(run_dir, config, 12)
    card = export.write_card(config, describe_layout(student, config), provenance)
    assert "init: mae_base.pth" in card
    assert "someone" not in card


def load_student_without_init(run_dir):
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("init: /home/someone/mae_base.pth", "init: null"))
    return load_student(run_dir)


def test_a_folder_with_something_in_it_is_refused_and_an_empty_one_is_filled(run_dir, tmp_path):
    out = tmp_path / "encoder"
    out.mkdir()
    export_encoder(run_dir, out)
    with pytest.raises(ConfigError, match="something already"):
        export_encoder(run_dir, out)


def test_nothing_is_left_when_the_check_fails(run_dir, tmp_path, monkeypatch):
    right = export.timm_config

    def fewer_heads(config, layout):
        made = right(config, layout)
        made["model_args"]["num_heads"] = 6
        return made

    monkeypatch.setattr(export, "timm_config", fewer_heads)
    with pytest.raises(DataError, match="other features"):
        export_encoder(run_dir, tmp_path / "out" / "encoder")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dataset_that_is_gone_is_said_in_the_card(run_dir, tmp_path):
    config = load_run_config(run_dir)
    text = (run_dir / "config.yaml").read_text().replace(str(config.data.root), str(tmp_path / "gone"))
    (run_dir / "config.yaml").write_text(text)
    card = (export_encoder(run_dir, tmp_path / "encoder") / "README.md").read_text(encoding="utf-8")
    assert "not at hand" in card


def test_what_cannot_be_exported(run_dir, tmp_path):
    with pytest.raises(DataError, match="steps 12"):
        export_encoder(run_dir, tmp_path / "encoder", step=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        export_encoder(run_dir, tmp_path / "file" / "encoder")
    checkpoint = next((run_dir / "checkpoints").iterdir())
    save_file({"weight": torch.zeros(3)}, checkpoint / "student.safetensors")
    with pytest.raises(DataError, match="cannot be loaded"):
        export_encoder(run_dir, tmp_path / "encoder")


def test_config_is_plain_json_of_timm_s_layout(run_dir, tmp_path):
    config = json.loads((export_encoder(run_dir, tmp_path / "encoder") / "config.json").read_text())
    assert config["model_args"] == {"img_size": 64, "patch_size": 16, "global_pool": "avg", "fc_norm": False}
    assert config["num_features"] == 192


TWINS = {
    "vit_pico": "Vision transformer without a class token",
    "swin_pico": "windows of 8 x 8",
    "swinv2_pico": "Swin transformer V2",
    "convnext_twin": "ConvNeXt, its last norm",
    "convnextv2_twin": "ConvNeXt V2",
    "resnet10": "GroupNorm instead of BatchNorm",
}


@pytest.mark.parametrize("name", TWINS)
def test_every_family_is_exported_and_loaded_again(name, make_backbone_run, tmp_path):
    run, student = make_backbone_run(name)
    folder = export_encoder(run, tmp_path / "encoder")
    scaled = min_max_scale(noise().float() / 255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = (scaled - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = student.embed(normalized)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(model(normalized), expected, atol=1e-5, rtol=1e-4)
    loaded = load_encoder(folder, "cpu")
    assert (loaded.width, loaded.image_size, loaded.min_max) == (student.width, 64, True)
    torch.testing.assert_close(loaded.encode(noise()), expected, atol=1e-5, rtol=1e-4)
    with_head = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).eval()
    assert with_head(normalized).shape == (3, 5)
    weights = load_file(folder / "model.safetensors")
    assert not any(key.startswith(("decoder", "neck", "encoder", "head")) for key in weights)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert TWINS[name] in card
    assert f"width {student.width}" in card
    assert "smallest and largest value" in card
    assert ("no final norm" in card) == (name == "resnet10")


@pytest.mark.parametrize("min_max", [True, False])
def test_the_card_s_example_gives_the_features_of_the_run(min_max, make_backbone_run, tmp_path):
    run, _ = make_backbone_run("swin_pico", min_max=min_max)
    folder = export_encoder(run, tmp_path / "encoder")
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python")[1].split("```")[0].replace("THIS_FOLDER", str(folder))
    pixels = noise()[:1] // 3 + 40
    names = {"image": Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0)))}
    exec(code, names)  # noqa: S102 (our own card)
    expected = load_encoder(run, "cpu").encode(pixels)
    torch.testing.assert_close(names["features"].detach(), expected, atol=1e-4, rtol=1e-3)


def test_a_backbone_that_computes_a_channel_is_refused(make_backbone_run, tmp_path):
    run, _ = make_backbone_run("convnext_twin", input_channel="response")
    with pytest.raises(ConfigError, match="fourth input channel"):
        export_encoder(run, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_another_architecture_of_the_same_weights_is_found_out(make_backbone_run, tmp_path, monkeypatch):
    right = export.timm_config

    def other_window(config, layout):
        made = right(config, layout)
        made["model_args"]["pretrained_window_sizes"] = [0, 0, 0, 0]
        return made

    run, _ = make_backbone_run("swinv2_pico")
    monkeypatch.setattr(export, "timm_config", other_window)
    with pytest.raises(DataError, match="other features"):
        export_encoder(run, tmp_path / "out" / "encoder")
    assert list((tmp_path / "out").iterdir()) == []

"""The exported folder: timm loads it, its features are the run's, its card tells no secrets."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frepa_dist import export
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.export import config_digest, export_encoder
from frepa_dist.models.vit_mae import VIT_SIZES
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
        model = timm.create_model(export.ARCHITECTURES[size])
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
    card = export.write_card(config, student.state_dict(), export.describe_provenance(run_dir, config, 12))
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

    def fewer_heads(config, width):
        made = right(config, width)
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

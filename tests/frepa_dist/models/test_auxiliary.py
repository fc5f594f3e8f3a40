from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from frepa_dist.models.auxiliary import auxiliary_width, create_auxiliary_encoder
from shards.support.errors import ConfigError, DataError, EnvironmentFault

NAME = "test_vit"  # timm's own tiny model: width 64, 160 pixels


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "aux.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)  # with its classifier
    return path


def test_it_resizes_normalizes_and_embeds_as_timm_would(weights):
    encoder = create_auxiliary_encoder(NAME, weights)
    torch.manual_seed(0)
    model = timm.create_model(NAME).eval()
    model.reset_classifier(0)
    images = torch.rand(2, 3, 96, 96)
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    x = functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        expected = model((x - mean) / std)
    result = encoder(images)
    torch.testing.assert_close(result, expected)
    assert result.shape == (2, auxiliary_width(NAME))


def test_it_is_frozen(weights):
    encoder = create_auxiliary_encoder(NAME, weights)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.zeros(1, 3, 160, 160)).requires_grad


def test_weights_that_miss_a_layer_are_refused(weights, tmp_path):
    state = timm.create_model(NAME).state_dict()
    del state["blocks.0.attn.qkv.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(DataError, match=r"blocks\.0\.attn\.qkv\.weight is missing"):
        create_auxiliary_encoder(NAME, tmp_path / "cut.safetensors")


def test_unknown_names_and_models_without_weights_are_refused():
    with pytest.raises(ConfigError, match="no_such_model"):
        auxiliary_width("no_such_model")
    with pytest.raises(ConfigError, match="No pretrained weights"):
        create_auxiliary_encoder("vit_base_patch16_gap_224")  # timm publishes none for it


def test_weights_that_cannot_be_fetched_are_the_environments_fault(monkeypatch):
    def unreachable(name, pretrained):
        raise OSError("name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(EnvironmentFault, match=r"aux\.weights"):
        create_auxiliary_encoder(NAME)

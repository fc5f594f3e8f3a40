"""Files of weights for timm's models: all of the model's own or an error, in timm's names or its authors'."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch

from frepa_dist.evaluate.features import load_encoder
from shards.support.errors import ConfigError, DataError

NAME, HEAD = "test_convnext", "head.fc."


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return timm.create_model(NAME).eval()


def without_head(weights):
    return {key: value for key, value in weights.items() if not key.startswith(HEAD)}


CHANGES = {
    "as it is": lambda weights: weights,
    "no classifier": without_head,
    "another classifier": lambda weights: (
        without_head(weights) | {f"{HEAD}weight": torch.ones(5, 64), f"{HEAD}bias": torch.ones(5)}
    ),
    "in a checkpoint": lambda weights: {"state_dict": weights, "epoch": 3},
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_weights_are_those_of_the_file(change, model, tmp_path):
    torch.save(CHANGES[change](model.state_dict()), tmp_path / "weights.pth")
    encoder = load_encoder(f"timm:{NAME}?weights={tmp_path / 'weights.pth'}", "cpu")
    found = encoder.module.state_dict()
    expected = without_head(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    assert not torch.equal(encoder.encode(images), load_encoder(f"timm:{NAME}", "cpu").encode(images))


def test_the_image_encoder_of_a_segmentation_model(monkeypatch, tmp_path):
    """The names of Segment Anything's files, which MedSAM's have too; the network is a small one."""
    create, name = timm.create_model, "samvit_base_patch16"
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,), "img_size": 128}
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **small, **settings))
    weights = timm.create_model(name).state_dict()
    theirs = {f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}": value for key, value in weights.items()}
    torch.save({**theirs, "mask_decoder.iou_token.weight": torch.zeros(1, 256)}, tmp_path / "sam.pth")
    encoder = load_encoder(f"timm:{name}?weights={tmp_path / 'sam.pth'}", "cpu")
    found = encoder.module.state_dict()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert encoder.map(torch.rand(1, 3, 128, 128)).shape == (1, 256, 8, 8)


def test_weights_that_do_not_fit(model, tmp_path):
    weights, path = model.state_dict(), tmp_path / "weights.pth"
    source = f"timm:{NAME}?weights={path}"
    with pytest.raises(DataError, match="cannot be read"):
        load_encoder(source)
    torch.save({key: value for key, value in weights.items() if key != "stem.0.bias"}, path)
    with pytest.raises(DataError, match=f"not the weights of '{NAME}'.*stem.0.bias"):
        load_encoder(source)
    torch.save({**weights, "stem.0.bias": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="size mismatch"):
        load_encoder(source)
    torch.save({**weights, "more": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="more"):
        load_encoder(source)
    path.write_bytes(pickle.dumps({"stem": print}))
    with pytest.raises(DataError, match="read safely"):
        load_encoder(source)


@pytest.mark.parametrize("option", ["weights", "weights=", "weight=x.pth", "pretrained=x.pth"])
def test_an_option_that_is_none(option):
    with pytest.raises(ConfigError, match=r"timm:NAME\?weights=FILE"):
        load_encoder(f"timm:{NAME}?{option}")

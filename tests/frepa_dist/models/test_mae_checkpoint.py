"""Weights of others, and from which of them a model starts."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from frepa_dist.models.init import interpolate_position_embedding
from frepa_dist.models.mae_checkpoint import load_mae_checkpoint
from frepa_dist.models.response import InputChannelConfig
from frepa_dist.models.vit_mae import (
    create_vit_mae,
)
from shards.support.errors import DataError
from tests.frepa_dist.models.small_vit import (
    inputs,
    jiggle,
    random_weights,
)


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

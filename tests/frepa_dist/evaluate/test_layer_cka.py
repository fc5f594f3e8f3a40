"""CKA of layers and bands: known values, the published formula, and a whole run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.evaluate.cka import centered_kernel, cka_of_kernels, debiased_linear_cka, jackknife_error
from frepa_dist.evaluate.layer_cka import (
    LayerCkaConfig,
    LayerCkaResult,
    band_pass,
    compare_layers,
    run_layer_cka,
)
from frepa_dist.spectrum import radial_frequency
from shards.support.errors import ConfigError, DataError
from shards.support.settings import validate
from tests.commands import frepa


def test_all_pairs_are_the_pairs_one_by_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(18, 5))
    features = {"a": x, "b": x + rng.normal(size=(18, 5)), "c": rng.normal(size=(18, 9))}
    others = {"d": rng.normal(size=(18, 3)), "e": x[:, :2]}
    row = compare_layers("oct", features, others, {"band": features})
    for i, first in enumerate(features.values()):
        for j, second in enumerate(others.values()):
            assert row.cka[i][j] == pytest.approx(debiased_linear_cka(first, second))
            assert row.error[i][j] == pytest.approx(jackknife_error(first, second))
    assert np.array(row.band_cka).ravel() == pytest.approx(1)
    assert row.num_images == 18


def test_a_layer_and_itself_have_exactly_one():
    rng = np.random.default_rng(1)
    features = {str(number): rng.normal(size=(40, 7)) * 10.0**number for number in range(-4, 5)}
    row = compare_layers("oct", features, None, {"band": features})
    assert np.diag(np.array(row.cka)).tolist() == [1.0] * 9
    np.testing.assert_array_equal(np.array(row.cka), np.array(row.cka).T)


def test_independent_noise_of_few_images_is_about_zero():
    rng = np.random.default_rng(2)
    values = [
        cka_of_kernels(*(centered_kernel(rng.normal(size=(12, 200)))[None] for _ in range(2)))[0, 0]
        for _ in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)


def test_rotation_and_scale_of_layers_change_nothing():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    plain = compare_layers("oct", {"x": x}, {"y": y}, {"b": {"x": x}}).cka
    turned = compare_layers("oct", {"x": 3 * x @ rotation - 5}, {"y": y}, {"b": {"x": x}}).cka
    assert turned[0][0] == pytest.approx(plain[0][0])


def test_bands_add_up_to_the_image_and_hold_their_frequencies():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bands = LayerCkaConfig(edges=(4, 8, 16)).bands()
    assert list(bands) == ["below 4", "4 to 8", "8 to 16", "above 16"]
    parts = [band_pass(images, *ends) for ends in bands.values()]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), images, atol=1e-5, rtol=1e-4)
    rho = radial_frequency(64)
    centers = []
    for part in parts:
        power = torch.fft.fft2(part).abs().square().mean(dim=(0, 1)) / 64**2
        centers.append(float((rho * power).sum() / power.sum()))
    assert centers == sorted(centers)
    assert centers[0] < 4 < centers[1]
    assert centers[-1] > 16


def test_edges_must_rise():
    for edges in ((4, 4), (0, 3), (5, 2)):
        with pytest.raises(ConfigError, match="positive and rising"):
            validate(LayerCkaConfig, {"edges": edges}, where="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize((80, 70))
        coarse.save(folder / f"{number}.png")
    return folder


def test_two_encoders_of_different_families(folder, small_encoder, make_backbone_run, tmp_path):
    run, _ = make_backbone_run("convnext_twin")
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa(
        *("evaluate", "layer-cka", small_encoder, folder, "--other", run, "--edges", "4,12"),
        *("--out", out, "--page", page),
    )
    assert told.returncode == 0, told.stderr
    result = LayerCkaResult.model_validate_json(out.read_text())
    (row,) = result.rows
    assert (len(row.layers), len(row.others), row.num_images) == (14, 7, 6)
    assert np.array(row.cka).shape == (14, 7)
    assert row.bands == ["below 4", "4 to 12", "above 12"]
    # smooth images: the lowest band says nearly all
    assert min(line[0] for line in row.band_cka) > 0.9
    assert "n = 6" in told.stdout
    assert page.read_text().count("<svg") == 2


def test_too_few_images_are_refused(folder, small_encoder):
    with pytest.raises(ConfigError, match="num"):
        validate(LayerCkaConfig, {"num": 3}, where="test")
    with pytest.raises(DataError, match="no such folder"):
        run_layer_cka(small_encoder, folder / "none")

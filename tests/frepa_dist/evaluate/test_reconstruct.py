"""Errors of reconstructions: their definitions, the common corruptions, and the result of a whole run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from frepa_dist.evaluate.reconstruct import (
    ReconstructionResult,
    ReconstructionSettings,
    Spread,
    compare,
    list_previews,
    measure,
    run_reconstruct,
    scale_images,
)
from frepa_dist.methods.base import Preview
from frepa_dist.methods.mae import Mae
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import load_run_config
from frepa_dist.spectrum import gaussian_high_pass, gaussian_low_pass
from shards.support.errors import ConfigError, DataError

SIZE = 64


def noise_images(num=2, seed=0):
    return torch.rand(num, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class Restorer(Mae):
    """A method whose student takes whole images and gives them back times its only weight."""

    @classmethod
    def previews(cls, student, images, config, draw_keys):
        return []

    @classmethod
    def restore(cls, student, images, config):
        return images * student.weight


class Times(torch.nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(factor))


def previews_of(run_dir, images, keys=(1, 2), student=None):
    config = load_run_config(run_dir)
    settings = ReconstructionSettings(num=4, seed=0)
    return list_previews(student or Times(), images, config, keys, settings)


def test_errors_are_of_the_hidden_pixels():
    images = noise_images()
    hidden = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    hidden[:, :, :16] = True
    predicted = images + torch.where(hidden, 0.1, 0.3)
    errors = compare(images, Preview("", images, predicted, hidden))
    np.testing.assert_allclose(errors.absolute, 0.1, rtol=1e-4)
    expected = 0.1 / images[:, :, :16].mean(dim=(1, 2, 3))
    np.testing.assert_allclose(errors.relative, expected, rtol=1e-4)


def test_error_and_power_of_detail():
    images, hidden = noise_images(), torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)
    smooth = gaussian_low_pass(images, 2.0)
    detail = gaussian_high_pass(images, 25.0)
    nothing, truth, twice = (
        compare(images, Preview("", images, predicted, hidden))
        for predicted in (smooth, images, images + detail)
    )
    assert truth.high_band.tolist() == [0, 0]
    np.testing.assert_allclose(truth.power_kept, 1, rtol=1e-6)
    np.testing.assert_allclose(nothing.high_band, 1, atol=0.05)
    np.testing.assert_allclose(nothing.power_kept, 0, atol=1e-3)
    assert (twice.power_kept > 1.5).all()


def test_black_and_flat_images():
    images = torch.stack([torch.zeros(3, SIZE, SIZE), noise_images(1)[0]])
    preview = Preview("", images, images + 1 / 255, torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool))
    errors = compare(images, preview)
    assert errors.relative[0] == pytest.approx(1.0)
    assert errors.high_band.isnan().tolist() == errors.power_kept.isnan().tolist() == [True, False]


def test_images_are_scaled_as_training_does():
    class MinMax:
        min_max = True

    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    images[0, 0, 0, 0] = 153
    plain = scale_images(images, object())
    assert plain[0, 0, 0, 0] == pytest.approx(0.6)
    scaled = scale_images(images, MinMax())
    assert (scaled[0].min(), scaled[0].max()) == (0, 1)
    assert (scaled[1] == 0).all()


def test_common_corruptions_are_those_named_and_keyed_by_image(run_dir, monkeypatch):
    monkeypatch.setitem(METHODS, "mae", Restorer)
    images = noise_images()
    (patches, is_common), (low, _) = previews_of(run_dir, images, student=Times(0.9))
    assert is_common
    assert patches.name == "75% of 16-pixel patches hidden"
    assert low.name == "below 16 cycles removed"
    assert patches.hidden.float().mean(dim=(1, 2, 3)).tolist() == [0.75, 0.75]
    blocks = patches.hidden.unfold(2, 16, 16).unfold(3, 16, 16).flatten(-2)
    assert (blocks.all(-1) | ~blocks.any(-1)).all()
    seen = ~patches.hidden.expand_as(images)
    assert torch.equal(patches.seen[seen], images[seen])
    assert torch.equal(patches.predicted[seen], images[seen])
    assert low.hidden.all()
    spectra = [torch.fft.fft2(x).abs() for x in (low.predicted, images)]
    for row, column in ((0, 0), (0, 14), (10, 10)):
        assert (spectra[0][..., row, column] < 0.01 * spectra[1][..., row, column]).all()
    np.testing.assert_allclose(spectra[0][..., 30, 30], 0.9 * spectra[1][..., 30, 30], rtol=1e-3)
    again = previews_of(run_dir, images[1:], (2,))
    assert torch.equal(again[0][0].hidden, patches.hidden[1:])


def test_a_student_that_hides_patches_itself_has_its_own_row_only(run_dir):
    result = run_reconstruct(run_dir, load_run_config(run_dir).data.root, num=5, device="cpu")
    (row,) = result.rows
    assert (row.modality, row.common, row.num_images) == ("histopathology", False, 5)
    assert row.corruption == "75% of 16-pixel patches hidden"
    assert row.note
    assert row.absolute.mean < row.relative.mean
    assert row.absolute.deviation > 0
    assert ReconstructionResult.model_validate(result.as_json()) == result
    text = result.describe()
    assert "step 12" in text
    assert f"{row.high_band.mean:.4f} +- {row.high_band.deviation:.4f}" in text
    assert text.endswith(row.note)


def test_the_cut_into_batches_does_not_matter(run_dir, monkeypatch):
    monkeypatch.setitem(METHODS, "mae", Restorer)
    config = load_run_config(run_dir)
    pixels = (noise_images(5) * 255).byte().numpy()
    loaders = [lambda i=i: pixels[i] for i in range(5)]
    whole, cut = (
        measure(Times(0.9), config, "oct", loaders, ReconstructionSettings(num=5, seed=3, batch_size=size))
        for size in (5, 2)
    )
    for a, b in zip(whole, cut, strict=True):
        assert a.high_band.mean == pytest.approx(b.high_band.mean, rel=1e-5)
        assert a.relative.deviation == pytest.approx(b.relative.deviation, rel=1e-4)


def test_images_without_detail_are_left_out_where_detail_is_measured(run_dir, monkeypatch):
    monkeypatch.setitem(METHODS, "mae", Restorer)
    config, settings = load_run_config(run_dir), ReconstructionSettings(num=3, seed=0)
    noise = (noise_images(2) * 255).byte().numpy()
    flat = np.full_like(noise[0], 9)
    with_flat, without = (
        measure(Times(0.9), config, "oct", [lambda i=i: i for i in pixels], settings)
        for pixels in ([*noise, flat], noise)
    )
    assert with_flat[0].num_images == 3
    assert with_flat[0].high_band.mean == pytest.approx(without[0].high_band.mean, rel=1e-5)
    assert with_flat[0].power_kept.deviation == pytest.approx(without[0].power_kept.deviation, rel=1e-3)
    assert with_flat[0].absolute != without[0].absolute


def test_mean_and_deviation():
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.deviation) == (2.0, 1.0)
    assert Spread.of([4.0]) == Spread(mean=4.0, deviation=None)
    assert str(Spread.of([4.0])) == "4.0000"


def test_files_need_no_modality_but_a_known_one(run_dir, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    result = run_reconstruct(run_dir, tmp_path, num=2, device="cpu")
    assert {(row.modality, row.num_images) for row in result.rows} == {("images", 2)}
    result = run_reconstruct(run_dir, tmp_path, modality="oct", device="cpu")
    assert {(row.modality, row.num_images) for row in result.rows} == {("oct", 3)}
    with pytest.raises(ConfigError, match="cat"):
        run_reconstruct(run_dir, tmp_path, modality="cat", device="cpu")


def test_what_cannot_be_measured_is_said(run_dir, small_weights, tmp_path):
    for number in range(2):
        Image.new("RGB", (70, 70), (9, 9, 9)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="has any detail"):
        run_reconstruct(run_dir, tmp_path, device="cpu")
    broken = {name: value * math.nan for name, value in small_weights.items()}
    save_file(broken, run_dir / "checkpoints" / "step-00000012" / "student.safetensors")
    with pytest.raises(DataError, match="NaN"):
        run_reconstruct(run_dir, load_run_config(run_dir).data.root, device="cpu")

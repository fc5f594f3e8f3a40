from __future__ import annotations

import pytest
import torch

from frepa_dist.config import RunConfig
from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.draws import SampleDraws
from frepa_dist.methods.mfm import Mfm, MfmConfig, hidden_frequencies, masked_frequency_loss
from frepa_dist.methods.registry import create_method
from frepa_dist.methods.whole_image import clean_images
from frepa_dist.models.backbones import BackboneSettings
from shards.support.errors import ConfigError
from shards.support.settings import validate
from tests.frepa_dist.methods.steps import LATE, ThreadComm, build_nets, make_batch, run_step

SIZE = 64
MODEL = BackboneSettings(backbone="convnext_twin", image_size=SIZE, neck_width=16)


def config(**kinds):
    return MfmConfig(
        model=MODEL, corruption=CorruptionConfig(kinds=kinds or {"low_pass": 0.5, "high_pass": 0.5})
    )


def test_nothing_depends_on_how_the_global_batch_is_cut():
    batch = make_batch(SIZE, 4)
    nets = build_nets(config())
    whole, parts = run_step(config(), nets, batch), run_step(config(), nets, batch, 2, 2)
    assert set(whole.terms) == {"frequency"}
    torch.testing.assert_close(parts.terms, whole.terms)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_against_a_whole_spectrum_written_out():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 3, 3, 16, 16, generator=generator)
    hidden = hidden_frequencies(["low_pass", "high_pass", "low_pass"], 16, 4.0, pred.device)
    distance = (torch.fft.fft2(pred, norm="ortho") - torch.fft.fft2(target, norm="ortho")).abs()
    axis = torch.fft.fftfreq(16, 1 / 16)
    inside = axis[:, None] ** 2 + axis[None, :] ** 2 < 16
    expected = torch.stack(
        [distance[0][:, ~inside].mean(), distance[1][:, inside].mean(), distance[2][:, ~inside].mean()]
    )
    torch.testing.assert_close(masked_frequency_loss(pred, target, hidden), expected.mean())
    squared = masked_frequency_loss(pred[1:2], target[1:2], hidden[1:2], gamma=2.0)
    torch.testing.assert_close(squared, distance[1][:, inside].square().mean())


def test_what_is_hidden_is_what_the_corruption_removed():
    for kind in ("low_pass", "high_pass"):
        settings, batch = config(**{kind: 1.0}), make_batch(SIZE, 4)
        clean = clean_images(batch, MODEL)
        corrupted = corrupt(clean, SampleDraws(batch["draw_key"], "cpu"), settings.corruption)
        assert set(corrupted.kind) == {kind}
        hidden = hidden_frequencies(corrupted.kind, SIZE, settings.corruption.pass_radius, clean.device)
        spectrum = torch.fft.rfft2(corrupted.images).abs()
        before = torch.fft.rfft2(clean).abs()
        hidden = hidden[:, None].expand_as(spectrum)
        assert float(spectrum[hidden].max()) < 1e-2
        torch.testing.assert_close(spectrum[~hidden], before[~hidden], rtol=1e-3, atol=1e-2)


def test_only_the_hidden_frequencies_are_judged():
    settings, batch = config(low_pass=1.0), make_batch(SIZE, 4)
    clean = clean_images(batch, MODEL)

    def student(images, num_decoded=None):
        output = Mfm.create_student(settings)(images)
        return output._replace(prediction=clean + 0.3)  # wrong at zero frequency alone

    losses = create_method(settings).losses({"student": student}, batch, {}, {}, LATE, ThreadComm(1))
    assert float(losses.total.detach()) < 1e-4


def test_previews_and_restoring():
    settings = config()
    student = Mfm.create_student(settings).eval()
    images = clean_images(make_batch(SIZE, 4), MODEL)[:2]
    previews = Mfm.previews(student, images, settings, [1, 2])
    assert [p.name for p in previews] == ["low pass", "high pass"]
    assert all(p.hidden.all() and p.predicted.shape == images.shape for p in previews)
    assert Mfm.restore(student, images, settings).shape == images.shape


def test_other_corruptions_are_refused():
    data = {"output": "run", "data": {"root": "data"}, "train": {"steps": 1}}
    method = {"name": "mfm", "corruption": {"kinds": {"zero": 1}}}
    with pytest.raises(ConfigError, match="hides frequencies"):
        validate(RunConfig, data | {"method": method}, where="test")

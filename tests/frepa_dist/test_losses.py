"""Losses against loops written out in float64, for cuts of a batch, under autocast, and their gradients."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from frepa_dist.losses import (
    HFL_CUTOFFS,
    focal_frequency_loss,
    gradient_l1,
    hierarchical_frequency_loss,
    rmse,
)
from frepa_dist.spectrum import gaussian_low_pass

LOSSES = {
    "rmse": rmse,
    "gradient": gradient_l1,
    "hfl": hierarchical_frequency_loss,
    "focal": focal_frequency_loss,
    "focal of alpha 2": lambda pred, target: focal_frequency_loss(pred, target, alpha=2),
}


def images(batch=4, size=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 3, size, size, generator=generator, dtype=dtype).unbind(0)


def naive_rmse(pred, target):
    return sum(math.sqrt(float((p - t).square().mean())) for p, t in zip(pred, target, strict=True)) / len(
        pred
    )


def naive_gradient(pred, target):
    total = 0.0
    for axis in (2, 3):
        steps = []
        for image in (pred, target):
            columns = image.unbind(axis)
            pairs = itertools.pairwise(columns)
            steps.append(torch.stack([second - first for first, second in pairs]))
        total += float((steps[0] - steps[1]).abs().mean())
    return total


def high_pass(image, cutoff):
    """One image (S, S) through a filter on the centred spectrum, bin by bin."""
    size = image.shape[-1]
    spectrum = torch.fft.fftshift(torch.fft.fft2(image))
    middle = size // 2
    for y in range(size):
        for x in range(size):
            rho2 = (y - middle) ** 2 + (x - middle) ** 2
            spectrum[y, x] *= 1 - math.exp(-rho2 / cutoff**2)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum)).real


def naive_hfl(pred, target):
    """Two FFTs and two inverse ones for every filter."""
    total = 0.0
    for cutoff in (10, 20, 30, 40, 50):
        errors = [
            (high_pass(p, cutoff) - high_pass(t, cutoff)).abs().mean()
            for p, t in zip(pred.flatten(0, 1), target.flatten(0, 1), strict=True)
        ]
        total += float(torch.stack(errors).mean())
    return total


def naive_focal(pred, target, alpha):
    """As the formula of the paper: weights of each image and channel, over the whole spectrum."""
    errors = []
    for p, t in zip(pred.flatten(0, 1), target.flatten(0, 1), strict=True):
        distance = (torch.fft.fft2(p, norm="ortho") - torch.fft.fft2(t, norm="ortho")).abs()
        weight = distance**alpha
        errors.append((weight / weight.max() * distance**2).mean())
    return float(torch.stack(errors).mean())


NAIVE = {
    "rmse": naive_rmse,
    "gradient": naive_gradient,
    "hfl": naive_hfl,
    "focal": lambda pred, target: naive_focal(pred, target, 1),
    "focal of alpha 2": lambda pred, target: naive_focal(pred, target, 2),
}


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("name", LOSSES)
def test_values_equal_a_naive_loop(name, size):
    pred, target = images(batch=2, size=size)
    value = LOSSES[name](pred, target)
    assert value.dtype == torch.float64
    assert value.ndim == 0
    assert float(value) == pytest.approx(NAIVE[name](pred, target), rel=1e-12)
    single = LOSSES[name](pred.float(), target.float())
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("name", ["rmse", "gradient", "hfl"])
def test_gradients_are_those_of_differences(name, size):
    pred, target = images(batch=2, size=size, seed=1)
    assert torch.autograd.gradcheck(LOSSES[name], (pred.requires_grad_(), target), atol=1e-8)


def test_the_gradient_of_the_focal_loss_takes_its_weight_as_a_constant():
    pred, target = images(batch=2, size=8, seed=1)
    pred.requires_grad_()
    focal_frequency_loss(pred, target).backward()
    with torch.no_grad():
        distance = torch.fft.fft2(pred - target, norm="ortho")
        weight = distance.abs() / distance.abs().amax(dim=(-2, -1), keepdim=True)
        expected = 2 * torch.fft.ifft2(weight * distance, norm="ortho").real / pred.numel()
    torch.testing.assert_close(pred.grad, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name):
    pred, target = images(batch=6)
    parts = [LOSSES[name](p, t) for p, t in zip(pred.split(2), target.split(2), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), LOSSES[name](pred, target))


def test_the_authors_root_of_the_batch_depends_on_the_cut():
    pred, target = images(batch=4)
    pred = torch.cat([pred[:2], 5 * pred[2:]])
    whole = rmse(pred, target, per="batch")
    assert float(whole) == pytest.approx(math.sqrt(float((pred - target).square().mean())))
    parts = [rmse(p, t, per="batch") for p, t in zip(pred.split(2), target.split(2), strict=True)]
    assert abs(float(torch.stack(parts).mean() - whole)) > 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_has_a_gradient(name):
    pred, target = images(dtype=torch.float32)[0].requires_grad_(), images(dtype=torch.float32)[0]
    loss = LOSSES[name](pred, target)
    loss.backward()
    assert loss == 0
    assert torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize("name", LOSSES)
def test_they_compute_in_float32_under_autocast(name):
    pred, target = images(dtype=torch.float32)
    expected = LOSSES[name](pred, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES[name](pred, target), expected)
    half = pred.bfloat16().requires_grad_()
    loss = LOSSES[name](half, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), LOSSES[name](half.detach().float(), target))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_filters_made_in_one_mode_serve_in_all_others():
    pred, target = images(size=22, dtype=torch.float32)  # a size of its own: its filters are made here
    with torch.inference_mode():
        expected = hierarchical_frequency_loss(pred, target)
    leaf = pred.clone().requires_grad_()
    hierarchical_frequency_loss(leaf, target).backward()
    with torch.inference_mode():
        low = gaussian_low_pass(pred, 3.0)
    kept = gaussian_low_pass(leaf, 3.0)
    kept.sum().backward()
    assert torch.equal(kept.detach(), low)
    with FakeTensorMode() as mode:
        hierarchical_frequency_loss(mode.from_tensor(pred), mode.from_tensor(target))
        hierarchical_frequency_loss(torch.rand(1, 3, 26, 26), torch.rand(1, 3, 26, 26))
    assert type(hierarchical_frequency_loss(*images(size=26))) is torch.Tensor
    compiled = torch.compile(hierarchical_frequency_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pred, target), expected)


def test_hfl_costs_one_transform_and_one_back_for_each_filter(monkeypatch):
    calls = {"rfft2": 0, "irfft2": 0}
    for name in calls:
        real = getattr(torch.fft, name)

        def count(*args, real=real, name=name, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(torch.fft, name, count)
    hierarchical_frequency_loss(*images())
    assert calls == {"rfft2": 1, "irfft2": 5}


def test_hfl_sees_detail_and_no_tone():
    _, target = images(size=32)
    assert float(hierarchical_frequency_loss(target + 3, target)) == pytest.approx(0, abs=1e-12)
    axis = torch.arange(32, dtype=torch.float64) / 32
    errors = []
    for cycles in (1, 4, 16):
        wave = torch.cos(2 * math.pi * cycles * axis).expand(1, 1, 32, 32)
        gains = sum(1 - math.exp(-((cycles / cutoff) ** 2)) for cutoff in HFL_CUTOFFS)
        errors.append(float(hierarchical_frequency_loss(wave, torch.zeros_like(wave))))
        assert errors[-1] == pytest.approx(gains * float(wave.abs().mean()))
    assert errors == sorted(errors)


def test_images_that_are_not_square_and_cutoffs_that_are_none_are_refused():
    pred = torch.zeros(1, 3, 8, 10)
    for loss in (hierarchical_frequency_loss, focal_frequency_loss):
        with pytest.raises(ValueError, match="square: 8 x 10"):
            loss(pred, copy.deepcopy(pred))
    with pytest.raises(ValueError, match="positive"):
        hierarchical_frequency_loss(*images(), cutoffs=(10.0, 0.0))

"""How much of the detail methods restore."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frepa_dist.losses import normalize_patches
from frepa_dist.methods.mae import MaeConfig, masked_detail, normalize_images
from frepa_dist.methods.restoration import MEASURED_IMAGES, detail_metrics
from frepa_dist.models.patches import patchify
from frepa_dist.models.vit_mae import MaeOutput
from frepa_dist.spectrum import DETAIL_CYCLES, energy_kept, gaussian_low_pass
from tests.frepa_dist.methods.steps import LATE, build_nets, make_batch, run_step

LOGGED = replace(LATE, is_logged=True)


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_it_is_measured_in_logged_steps_on_the_first_images(images):
    blurred = gaussian_low_pass(images, 8.0)
    assert detail_metrics(blurred, images, LATE) == {}
    found = detail_metrics(blurred, images, LOGGED)["hf_share"]
    grey = [x[:MEASURED_IMAGES].mean(1, keepdim=True) for x in (blurred, images)]
    torch.testing.assert_close(found, energy_kept(*grey, DETAIL_CYCLES).mean())
    assert float(found) < 0.1
    with_flat = torch.cat([torch.ones(1, 3, 64, 64), images])
    torch.testing.assert_close(
        detail_metrics(with_flat, with_flat, LOGGED)["hf_share"], torch.tensor(1.0)
    )  # the flat one is left out


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_of_masked_patches_only_what_was_hidden_counts(norm_pix_loss):
    config = MaeConfig(model={"size": "tiny", "image_size": 64}, norm_pix_loss=norm_pix_loss)
    images = normalize_images(make_batch(), config.model)
    patches = patchify(images, 16)
    true = normalize_patches(patches) if norm_pix_loss else patches
    mask = torch.zeros(len(images), 16)
    mask[:, 3:12] = 1
    hidden = mask[:, :, None] > 0

    def share(pred):
        output = MaeOutput(torch.zeros(()), pred, mask, torch.zeros(()), torch.zeros(()))
        return float(masked_detail(output, images, config, LOGGED)["hf_share"])

    assert share(true) == pytest.approx(1, abs=1e-4)
    assert share(torch.where(hidden, true, 100 * true)) == pytest.approx(1, abs=1e-4)
    assert share(torch.where(hidden, 2 * true, true)) == pytest.approx(4, rel=1e-3)
    grey = true.mean(dim=-1, keepdim=True).expand_as(true)
    assert share(grey) == pytest.approx(0, abs=1e-4), "patches of one tone have edges, and no detail"


@pytest.mark.parametrize(
    "config",
    [
        MaeConfig(model={"size": "tiny", "image_size": 64}),
        pytest.param("frepa", id="frepa"),
        pytest.param("mfm", id="mfm"),
        pytest.param("retmae", id="retmae"),
    ],
)
def test_every_method_that_restores_measures_it(config):
    from frepa_dist.methods.registry import METHODS

    if isinstance(config, str):
        model = {"size": "tiny"} if config == "retmae" else {"backbone": "vit_pico"}
        config = METHODS[config].config_class(model={**model, "image_size": 64})
    nets, batch = build_nets(config), make_batch()
    assert "hf_share" not in run_step(config, nets, batch).metrics
    found = run_step(config, nets, batch, info=LOGGED).metrics["hf_share"]
    assert 0 < float(found) < 20

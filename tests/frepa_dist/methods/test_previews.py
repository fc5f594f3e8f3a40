"""Previews of masked autoencoders: normalization undone, seen patches true, masks fixed."""

from __future__ import annotations

import pytest
import torch

from frepa_dist.losses import normalize_patches
from frepa_dist.methods.mae import MASK_LEVEL, MaeConfig, denormalize_patches
from frepa_dist.methods.registry import METHODS
from frepa_dist.models.vit_mae import MaeOutput, create_vit_mae

SIZE, PATCH = 64, 16


def smooth_images(num=2):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")


def config(norm_pix_loss=True):
    return MaeConfig.model_validate(
        {"model": {"size": "tiny", "image_size": SIZE}, "norm_pix_loss": norm_pix_loss}
    )


def previews(student, images, settings, keys=(3, 4), method="mae"):
    (preview,) = METHODS[method].previews(student, images, settings, keys)
    return preview


@pytest.fixture
def student(small_weights):
    model = create_vit_mae("tiny", image_size=SIZE).eval()
    model.load_state_dict(small_weights)
    return model


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_is_the_image(norm_pix_loss, monkeypatch):
    model = create_vit_mae("tiny", image_size=SIZE, norm_pix_loss=norm_pix_loss).eval()

    def predict_the_truth(normalized, noise, mask_ratio):
        patches = model.patchify(normalized)
        mask = (noise.argsort(1).argsort(1) >= 4).float()
        pred = normalize_patches(patches) if norm_pix_loss else patches
        return MaeOutput(torch.zeros(()), pred, mask, torch.zeros(()), torch.zeros(()))

    monkeypatch.setattr(model, "forward", predict_the_truth)
    images = smooth_images()
    preview = previews(model, images, config(norm_pix_loss))
    torch.testing.assert_close(preview.predicted, images, atol=1e-5, rtol=0)
    assert preview.hidden.float().mean() == 0.75
    assert bool(preview.note) == norm_pix_loss


def test_denormalizing_inverts_the_normalization_of_the_loss():
    patches = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    torch.testing.assert_close(denormalize_patches(normalize_patches(patches), patches, True), patches)
    assert denormalize_patches(patches, patches * 2, False) is patches


@pytest.mark.parametrize("method", ["mae", "retmae"])
def test_seen_patches_are_true_and_masked_ones_are_grey_and_predicted(student, method):
    images = smooth_images()
    settings = METHODS[method].config_class.model_validate(config().model_dump(exclude={"name"}))
    preview = previews(student, images, settings, method=method)
    hidden = preview.hidden.expand_as(images)
    blocks = preview.hidden.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(-2)
    assert (blocks.all(-1) | ~blocks.any(-1)).all()
    assert blocks.any(-1).sum(dim=(1, 2, 3)).tolist() == [12, 12]
    assert (preview.seen[hidden] == MASK_LEVEL).all()
    assert torch.equal(preview.seen[~hidden], images[~hidden])
    assert torch.equal(preview.predicted[~hidden], images[~hidden])
    assert not torch.allclose(preview.predicted[hidden], images[hidden], atol=0.01)
    assert preview.predicted.min() >= 0
    assert preview.predicted.max() <= 1


def test_masks_belong_to_the_key_of_an_image(student):
    images, settings = smooth_images(), config()
    both = previews(student, images, settings, (3, 4))
    assert torch.equal(previews(student, images[1:], settings, (4,)).hidden, both.hidden[1:])
    assert not torch.equal(both.hidden[0], both.hidden[1])

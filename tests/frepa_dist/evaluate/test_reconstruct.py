"""Reconstructions: normalization undone, seen patches true, masks fixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frepa_dist.evaluate.reconstruct import denormalize_patches, draw_noise, mark_tokens, reconstruct
from frepa_dist.losses import normalize_patches
from frepa_dist.models.vit_mae import MaeOutput, create_vit_mae

SIZE, PATCH = 64, 16


def smooth_images(num=2):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    return (images * 255).byte()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_is_drawn_as_the_original(norm_pix_loss, monkeypatch):
    model = create_vit_mae("tiny", image_size=SIZE, norm_pix_loss=norm_pix_loss).eval()

    def predict_the_truth(normalized, noise, mask_ratio):
        patches = model.patchify(normalized)
        mask = (noise.argsort(1).argsort(1) >= 4).float()
        pred = normalize_patches(patches) if norm_pix_loss else patches
        return MaeOutput(torch.zeros(()), pred, mask, torch.zeros(()))

    monkeypatch.setattr(model, "forward", predict_the_truth)
    images = smooth_images()
    for image, item in zip(images, reconstruct(model, images), strict=True):
        np.testing.assert_array_equal(item.original, image.permute(1, 2, 0).numpy())
        np.testing.assert_allclose(item.reconstructed.astype(int), item.original, atol=1)
        assert item.error < 1e-3
        np.testing.assert_allclose(item.spectrum_reconstructed, item.spectrum_original, rtol=1e-2, atol=1e-9)
        assert item.detail_reconstructed == pytest.approx(item.detail_original, abs=1e-3)


def test_denormalizing_inverts_the_loss_s_normalization():
    patches = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    torch.testing.assert_close(denormalize_patches(normalize_patches(patches), patches, True), patches)
    assert denormalize_patches(patches, patches * 2, False) is patches


def test_seen_patches_are_true_and_masked_ones_are_grey(small_weights):
    model = create_vit_mae("tiny", image_size=SIZE).eval()
    model.load_state_dict(small_weights)
    for item in reconstruct(model, smooth_images(), mask_ratio=0.75):
        blocks = [
            (slice(y, y + PATCH), slice(x, x + PATCH))
            for y in range(0, SIZE, PATCH)
            for x in range(0, SIZE, PATCH)
        ]
        grey = [block for block in blocks if (item.masked[block] == 128).all()]
        seen = [block for block in blocks if block not in grey]
        assert len(grey) == 12
        for block in seen:
            np.testing.assert_array_equal(item.reconstructed[block], item.original[block])
        assert any((item.reconstructed[block] != item.original[block]).any() for block in grey)
        errors = [np.abs(item.reconstructed[b].astype(float) - item.original[b]).mean() / 255 for b in grey]
        assert item.error == pytest.approx(np.mean(errors), abs=2e-3)


def test_masks_belong_to_the_image_s_number():
    torch.testing.assert_close(draw_noise(5, 16)[:2], draw_noise(2, 16))
    assert not torch.equal(draw_noise(2, 16)[0], draw_noise(2, 16)[1])
    assert not torch.equal(draw_noise(1, 16, seed=1), draw_noise(1, 16))


def test_marked_tokens_keep_their_inside_and_others_are_dimmed():
    image = np.full((64, 64, 3), 200, np.uint8)
    drawn = mark_tokens(image, np.array([5]), 16)
    assert (drawn[18:30, 18:30] == 200).all()
    assert (drawn[16, 16:32] == (255, 196, 0)).all()
    drawn[16:32, 16:32] = 90
    assert (drawn == 90).all()

"""Masked reconstructions as pictures: what the decoder makes of the patches it did not see.

With `norm_pix_loss` the decoder predicts patches normalized one by one; drawn as they are, they look wrong
whatever the model is worth. Each is brought back by mean and spread of the true patch, which the picture thus
borrows: it shows structure, not tone.

Shapes: B images, S image side, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from frepa_dist.evaluate.features import IMAGENET_MEAN, IMAGENET_STD
from frepa_dist.losses import PATCH_VARIANCE_EPS
from frepa_dist.models.vit_mae import MaskedAutoencoderViT
from frepa_dist.spectrum import high_band_share, radial_power_spectrum
from shards.read.draws import sample_rng

MASK_LEVEL = 0.5  # grey in which masked patches are drawn
FRAME_COLOR = (255, 196, 0)  # of the tokens that are marked


@dataclass(frozen=True)
class Reconstruction:
    """One image, and what became of it.

    Attributes:
        original, masked, reconstructed: (S, S, 3) uint8; in the last, patches that were seen are true.
        spectrum_original, spectrum_reconstructed: (S // 2 + 1,) mean power by cycles per image side
            (`spectrum.radial_power_spectrum`) of the two, mean of the channels, of values in [0, 1].
        detail_original, detail_reconstructed: share of the power at or above `cutoff_cycles`.
        error: mean absolute error over the masked pixels, of values in [0, 1].
    """

    original: npt.NDArray[np.uint8]
    masked: npt.NDArray[np.uint8]
    reconstructed: npt.NDArray[np.uint8]
    spectrum_original: npt.NDArray[np.float32]
    spectrum_reconstructed: npt.NDArray[np.float32]
    detail_original: float
    detail_reconstructed: float
    error: float


def draw_noise(num_images: int, num_patches: int, seed: int = 0) -> Tensor:
    """Masking noise (B, N), the same for image i whatever the number of images, the step or the run."""
    rows = [sample_rng(seed, 0, number, "reconstruction").random(num_patches) for number in range(num_images)]
    return torch.from_numpy(np.stack(rows)).float()


@torch.inference_mode()
def reconstruct(
    model: MaskedAutoencoderViT,
    images: Tensor,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    mask_ratio: float = 0.75,
    cutoff_cycles: float = 13.4,
    seed: int = 0,
) -> list[Reconstruction]:
    """Mask images, reconstruct them, and compare.

    Args:
        model: in evaluation mode.
        images: (B, 3, S, S) uint8.
        mean: of the channels, which the model was trained with.
        std: likewise.
        mask_ratio: share of the patches to mask.
        cutoff_cycles: where detail begins, in cycles per image side.
        seed: of the masks.
    """
    scale, shift = (torch.tensor(v).view(-1, 1, 1) for v in (std, mean))
    original = images.float() / 255
    normalized = (original - shift) / scale
    output = model(normalized, draw_noise(len(images), model.num_patches, seed), mask_ratio)
    patches = denormalize_patches(output.pred, model.patchify(normalized), model.norm_pix_loss)
    predicted = (model.unpatchify(patches) * scale + shift).clamp(0, 1)
    removed = model.unpatchify(output.mask[:, :, None].expand_as(patches))
    reconstructed = torch.where(removed > 0, predicted, original)
    masked = torch.where(removed > 0, MASK_LEVEL, original)
    spectra = [radial_power_spectrum(part).mean(dim=1).numpy() for part in (original, reconstructed)]
    shares = [high_band_share(part, cutoff_cycles).mean(dim=1) for part in (original, reconstructed)]
    errors = ((reconstructed - original).abs() * removed).sum(dim=(1, 2, 3)) / removed.sum(dim=(1, 2, 3))
    return [
        Reconstruction(
            original=_picture(original[i]),
            masked=_picture(masked[i]),
            reconstructed=_picture(reconstructed[i]),
            spectrum_original=spectra[0][i],
            spectrum_reconstructed=spectra[1][i],
            detail_original=float(shares[0][i]),
            detail_reconstructed=float(shares[1][i]),
            error=float(errors[i]),
        )
        for i in range(len(images))
    ]


def denormalize_patches(pred: Tensor, patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """Undo the normalization of predicted patches (B, N, P) by mean and variance of the true ones.

    The inverse of `losses.normalize_patches`; nothing to undo without `norm_pix_loss`.
    """
    if not norm_pix_loss:
        return pred
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return pred * (variance + PATCH_VARIANCE_EPS).sqrt() + mean


def _picture(image: Tensor) -> npt.NDArray[np.uint8]:
    """(3, S, S) in [0, 1] -> (S, S, 3) uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def mark_tokens(
    image: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], patch_size: int
) -> npt.NDArray[np.uint8]:
    """Dim all patches of an image but those named, which get a thin frame.

    Args:
        image: (S, S, 3).
        indices: (K,) row-major.
        patch_size: in pixels.
    """
    drawn = (image * 0.45).astype(np.uint8)
    columns = image.shape[1] // patch_size
    for index in indices.tolist():
        top, left = (index // columns) * patch_size, (index % columns) * patch_size
        patch = image[top : top + patch_size, left : left + patch_size].copy()
        patch[[0, -1]] = patch[:, [0, -1]] = FRAME_COLOR
        drawn[top : top + patch_size, left : left + patch_size] = patch
    return drawn

"""Discriminators under spectral normalization (Miyato et al., Spectral Normalization for GANs, ICLR 2018).

A layer computes with W / sigma(W), where sigma = u^T W v estimates the largest singular value and u, v follow
the weight by power iteration. The iteration runs in `after_step`, once per optimizer step, and not in
`forward`: a forward runs once or many times in a step, as the batch is cut, and the result must not depend on
it. sigma is computed in float32 whatever the autocast, and gradients pass through it (u and v are constants).

There is no normalization over the batch, so that a row sees itself only.

Shapes: B batch, C channels, S image side, E width of an embedding, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# the first estimate is held until the first step, so it starts closer than one step would bring it
FIRST_ITERATIONS = 30
SMALLEST_SIGMA = 1e-12  # a weight of zeros stays zero
SLOPE = 0.2  # of the leaky ReLUs, as in Isola et al.
KERNEL = 4  # of the patch discriminator's convolutions, as in Isola et al.


class SpectralNorm(nn.Module):
    """The vectors of one weight, as buffers; the weight's rows are its first dimension.

    Args:
        weight: parameter to follow, (R, ...). It stays a parameter of the layer that owns it.
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("left", functional.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("right", torch.zeros_like(matrix[0]))
        self.advance(weight, FIRST_ITERATIONS)

    @torch.no_grad()
    def advance(self, weight: Tensor, iterations: int = 1) -> None:
        """Bring u and v closer to the first singular vectors of the weight."""
        matrix = weight.flatten(1).float()
        for _ in range(iterations):
            self.right.copy_(functional.normalize(matrix.T @ self.left, dim=0))
            self.left.copy_(functional.normalize(matrix @ self.right, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight over its estimated largest singular value, float32."""
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.float()
            sigma = torch.dot(self.left, weight.flatten(1) @ self.right)
            normalized: Tensor = weight / sigma.clamp_min(SMALLEST_SIGMA)
            return normalized


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a (C_out, C_in k k) matrix, has largest singular value 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2)
        self.norm = SpectralNorm(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        weight: Tensor = self.norm(self.weight)
        output: Tensor = self._conv_forward(x, weight, self.bias)
        return output


class SpectralLinear(nn.Linear):
    """A linear layer whose weight has largest singular value 1."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.norm = SpectralNorm(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D_in) -> (B, D_out)."""
        weight: Tensor = self.norm(self.weight)
        return functional.linear(x, weight, self.bias)


class Discriminator(nn.Module):
    """What the discriminators share: one power iteration of every layer per optimizer step."""

    def after_step(self) -> None:
        """Follow the new weights; called once per optimizer step, on all ranks, which then stay equal."""
        for layer in self.modules():
            if isinstance(layer, SpectralConv2d | SpectralLinear):
                layer.norm.advance(layer.weight)


class PatchDiscriminator(Discriminator):
    """Judges patches, not images: a logit for each place (PatchGAN; Isola et al., CVPR 2017).

    `num_layers` convolutions of stride 2 and two of stride 1, kernel 4, widths doubled up to 8 `width`. With
    the defaults a logit sees 70 x 70 pixels.

    Args:
        in_channels: of the input: by default an image and its detail, as `adversarial.with_detail` puts them
            together.
        width: channels after the first convolution.
        num_layers: convolutions of stride 2.
    """

    def __init__(self, in_channels: int = 6, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [in_channels, *(width * min(2**i, 8) for i in range(num_layers + 1))]
        strides = [2] * num_layers + [1]
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [SpectralConv2d(before, after, KERNEL, stride), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, SpectralConv2d(widths[-1], 1, KERNEL))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, 1, h, w) float32 logits, positive for real; 512 pixels give 62 x 62."""
        logits: Tensor = self.layers(x)
        return logits.float()


class EmbeddingDiscriminator(Discriminator):
    """Tells which class, such as a kind of corruption, an embedding map came from.

    Two 3x3 convolutions, the mean over positions, a hidden layer, logits.

    Args:
        width: E of the embedding.
        num_classes: K.
        hidden: width inside.
    """

    def __init__(self, width: int, num_classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            SpectralConv2d(width, hidden, 3),
            nn.LeakyReLU(SLOPE),
            SpectralConv2d(hidden, hidden, 3),
            nn.LeakyReLU(SLOPE),
        )
        self.head = nn.Sequential(
            SpectralLinear(hidden, hidden), nn.LeakyReLU(SLOPE), SpectralLinear(hidden, num_classes)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, E, h, w) -> (B, K) float32 logits."""
        logits: Tensor = self.head(self.convolutions(embedding).mean(dim=(-2, -1)))
        return logits.float()


def receptive_field(num_layers: int) -> int:
    """Side in pixels of what one logit of a `PatchDiscriminator` sees."""
    size = 1
    for stride in [1, 1] + [2] * num_layers:
        size = (size - 1) * stride + KERNEL
    return size

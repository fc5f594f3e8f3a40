"""From a backbone's map back to an image: a neck, and a decoder of as many stages as the stride needs.

Both are small beside the encoder, and none of their norms looks across images.

Shapes: B batch, D width of the map, E width of the neck, s stride, h = w = S / s.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shards.support.errors import ConfigError


def create_neck(width: int, neck_width: int | None) -> nn.Module:
    """1x1 convolution, LayerNorm over channels, 3x3 convolution, LayerNorm: (B, D, h, w) -> (B, E, h, w).

    As in Segment Anything (Kirillov et al., arXiv 2304.02643). Without a width the map passes as it is.
    """
    if neck_width is None:
        return nn.Identity()
    from timm.layers import LayerNorm2d

    return nn.Sequential(
        nn.Conv2d(width, neck_width, 1, bias=False),
        LayerNorm2d(neck_width),
        nn.Conv2d(neck_width, neck_width, 3, padding=1, bias=False),
        LayerNorm2d(neck_width),
    )


def stage_widths(width: int, stride: int, min_width: int, groups: int) -> list[int]:
    """Channels after each stage: halved each time, not below `min_width`, rounded up to fill the groups.

    Args:
        width: channels of the map that is decoded.
        stride: how many times the image is larger than the map; a power of two.
        min_width: fewest channels.
        groups: of GroupNorm.
    """
    num_stages = stride.bit_length() - 1
    assert stride == 1 << num_stages, "each stage doubles the side"
    wanted = [max(min_width, width >> (stage + 1)) for stage in range(num_stages)]
    return [-(-channels // groups) * groups for channels in wanted]


class DecoderStage(nn.Module):
    """Twice the side: nearest upsampling, 3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, in_width: int, out_width: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', 2 h, 2 w)."""
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return functional.relu(self.norm(self.conv(x)))


class Decoder(nn.Module):
    """Doubles the side until it is the image's, then a 3x3 convolution to its channels.

    The last convolution runs in float32 whatever the weights are stored in: bfloat16 holds eight bits, and a
    grey level of an image would not survive it.

    Args:
        width: channels of the map.
        stride: how many times the image is larger than the map, a power of two.
        out_channels: of the image.
        min_width: fewest channels of a stage.
        groups: of GroupNorm.
        activation_checkpointing: recompute the stages in the backward pass.

    Raises:
        ConfigError: the stride is no power of two.
    """

    def __init__(
        self,
        width: int,
        stride: int,
        *,
        out_channels: int = 3,
        min_width: int = 16,
        groups: int = 8,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if stride < 1 or stride & (stride - 1):
            raise ConfigError(f"the decoder cannot undo a stride of {stride}", allowed="powers of two")
        widths = [width, *stage_widths(width, stride, min_width, groups)]
        self.stages = nn.ModuleList(
            DecoderStage(before, after, groups) for before, after in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """(B, E, h, w) -> (B, 3, S, S) float32."""
        for stage in self.stages:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
        with torch.autocast(x.device.type, enabled=False):
            assert self.last.bias is not None
            return functional.conv2d(x.float(), self.last.weight.float(), self.last.bias.float(), padding=1)

"""The backbones by name: what each is in timm, and which image sizes it takes.

None depends on how a batch is cut: norms work within one image (LayerNorm, GroupNorm, ConvNeXtV2's global
response norm), so there is no BatchNorm. ResNets therefore have GroupNorm; of these timm has pretrained
weights for ResNet-50 alone, and weights made with BatchNorm are not offered.

Vision transformers have a learned position embedding and no class token. ConvNeXts have their last norm
before the pooling, not behind it, so that a map is normalized as its mean is; that is one and the same set of
weights. SwinV2 counts distances in units of the window it was pretrained with (8), whatever the window here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from shards.support.errors import ConfigError

Family = Literal["vit", "swin", "swinv2", "convnext", "convnextv2", "resnet"]

WINDOW = 8  # the side of attention windows wanted; `window_size` gives the nearest one that fits
WINDOWS = range(4, 17)  # smaller ones see too little, larger ones cost more than they are worth
WINDOWED = ("swin", "swinv2")


class Entry(NamedTuple):
    """A backbone.

    Attributes:
        architecture: timm's name.
        family: whose conventions it follows.
        stride: pixels of the image along a side of one position of the map.
        arguments: further arguments for timm.
        pretrained: whether timm has weights that fit; also false for all twins.
    """

    architecture: str
    family: Family
    stride: int
    arguments: Mapping[str, Any]
    pretrained: bool


def _vit(architecture: str, **arguments: Any) -> Entry:
    # without a class token timm would move the last norm behind the pooling: `fc_norm` keeps it before
    plain = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return Entry(architecture, "vit", 16, {**plain, **arguments}, not arguments)


def _swin(architecture: str, **arguments: Any) -> Entry:
    return Entry(architecture, "swin", 32, arguments, not arguments)


def _swinv2(architecture: str, **arguments: Any) -> Entry:
    return Entry(
        architecture, "swinv2", 32, {"pretrained_window_sizes": [8, 8, 8, 8], **arguments}, not arguments
    )


def _convnext(architecture: str, family: Family = "convnext", **arguments: Any) -> Entry:
    return Entry(architecture, family, 32, {"head_norm_first": True, **arguments}, not arguments)


def _resnet(architecture: str, *, pretrained: bool = False, **arguments: Any) -> Entry:
    return Entry(architecture, "resnet", 32, {"norm_layer": "groupnorm", **arguments}, pretrained)


_SMALL_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
_SMALL_CONVNEXT: dict[str, Any] = {"depths": [1, 1, 2, 1], "dims": [16, 32, 48, 96]}

BACKBONES: Mapping[str, Entry] = {
    "vit_tiny": _vit("vit_tiny_patch16_224"),
    "vit_small": _vit("vit_small_patch16_224"),
    "vit_base": _vit("vit_base_patch16_224"),
    "vit_large": _vit("vit_large_patch16_224"),
    "swin_tiny": _swin("swin_tiny_patch4_window7_224"),
    "swin_small": _swin("swin_small_patch4_window7_224"),
    "swin_base": _swin("swin_base_patch4_window7_224"),
    "swinv2_tiny": _swinv2("swinv2_tiny_window8_256"),
    "swinv2_small": _swinv2("swinv2_small_window8_256"),
    "swinv2_base": _swinv2("swinv2_base_window8_256"),
    "convnext_atto": _convnext("convnext_atto"),
    "convnext_nano": _convnext("convnext_nano"),
    "convnext_tiny": _convnext("convnext_tiny"),
    "convnext_small": _convnext("convnext_small"),
    "convnext_base": _convnext("convnext_base"),
    "convnextv2_atto": _convnext("convnextv2_atto", "convnextv2"),
    "convnextv2_nano": _convnext("convnextv2_nano", "convnextv2"),
    "convnextv2_tiny": _convnext("convnextv2_tiny", "convnextv2"),
    "convnextv2_base": _convnext("convnextv2_base", "convnextv2"),
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50_gn", pretrained=True),
    "resnet101": _resnet("resnet101"),
    # twins of the families above, for tests and trials on a CPU
    "vit_pico": _vit("vit_tiny_patch16_224", embed_dim=64, depth=2, num_heads=2),
    "swin_pico": _swin("swin_tiny_patch4_window7_224", **_SMALL_SWIN),
    "swinv2_pico": _swinv2("swinv2_tiny_window8_256", **_SMALL_SWIN),
    "convnext_twin": _convnext("convnext_atto", **_SMALL_CONVNEXT),
    "convnextv2_twin": _convnext("convnextv2_atto", "convnextv2", **_SMALL_CONVNEXT),
    "resnet10": _resnet("resnet18", layers=[1, 1, 1, 1], channels=[32, 32, 64, 96], stem_width=32),
}


def find_backbone(name: str) -> Entry:
    """Look a backbone up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in BACKBONES:
        raise ConfigError("no such backbone", where=name, allowed=", ".join(BACKBONES))
    return BACKBONES[name]


def window_size(image_size: int) -> int | None:
    """Choose the side of Swin's attention windows for an image size: 7 at 224, 8 at 256 and 512.

    The window must fill the maps of all four stages, of which the last ones may be smaller than it: timm then
    takes the whole map as one window.

    Returns:
        The side nearest to `WINDOW`, the smaller one of two; None where no side fits.
    """
    if image_size % 32 or image_size < 32:
        return None
    sides = [image_size // stride for stride in (4, 8, 16, 32)]
    fitting = [w for w in WINDOWS if all(side % w == 0 or side < w for side in sides)]
    return min(fitting, key=lambda w: abs(w - WINDOW), default=None)


def fits_size(name: str, image_size: int) -> bool:
    """Whether a backbone takes square images of this side."""
    entry = find_backbone(name)
    if entry.family in WINDOWED:
        return window_size(image_size) is not None
    return image_size > 0 and image_size % entry.stride == 0


def describe_sizes(name: str) -> str:
    """Which image sizes a backbone takes, in words."""
    entry = find_backbone(name)
    if entry.family not in WINDOWED:
        return f"multiples of {entry.stride}"
    refused = [size for size in range(32, 1025, 32) if not fits_size(name, size)]
    return f"multiples of 32 below {refused[0]}, and some above"


def check_image_size(name: str, image_size: int) -> None:
    """Make sure that a backbone takes square images of this side.

    Raises:
        ConfigError: it does not; the nearest sizes that fit are named.
    """
    if fits_size(name, image_size):
        return
    candidates = [size for size in range(32, max(1024, 2 * image_size), 16) if fits_size(name, size)]
    nearest = sorted(sorted(candidates, key=lambda size: abs(size - image_size))[:4])
    raise ConfigError(
        f"image_size {image_size} does not fit {name}",
        where="image_size",
        allowed=f"near it: {', '.join(map(str, nearest))}",
        fix="choose one of these; between 224 and 512 every multiple of 32 fits every backbone",
    )


def timm_arguments(name: str, image_size: int, in_channels: int = 3) -> dict[str, Any]:
    """What timm needs beside the architecture, without a classifier; plain data, so that it can be exported.

    Raises:
        ConfigError: no such backbone, or the image size does not fit.
    """
    check_image_size(name, image_size)
    entry = find_backbone(name)
    made = dict(entry.arguments)
    if entry.family in ("vit", *WINDOWED):
        made["img_size"] = image_size
    if entry.family in WINDOWED:
        made["window_size"] = window_size(image_size)
    if in_channels != 3:
        made["in_chans"] = in_channels
    return made

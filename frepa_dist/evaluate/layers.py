"""What each layer of an encoder gives, for any encoder: named maps, by forward hooks on its module.

A layer is a block of the network (of attention and MLP, or of convolutions), or what comes before the first
one; the last one is the encoder's own map, after the final norm. Whether something is a layer is found out by
running it, so that decoders and heads, which an encoder's map does not need, are none.

Shapes: B batch, S image side, N tokens, D width, h, w sides of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from frepa_dist.evaluate.encoder import Encoder
from shards.support.errors import ConfigError

STEMS = ("patch_embed", "stem")
LAST = "output"


def list_layers(encoder: Encoder) -> list[str]:
    """Name the layers of an encoder in the order in which they run; the last one is `output`.

    Raises:
        ConfigError: the encoder has no map.
    """
    size = (1, 3, encoder.image_size, encoder.image_size)
    return list(pool_layers(encoder, torch.zeros(size, device=encoder.device)))


def layer_maps(
    encoder: Encoder, normalized: Tensor, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Maps (B, D, h, w) float32 of layers by name; see `run_layers`."""
    return run_layers(encoder, normalized, lambda maps: maps, layers)


def pool_layers(
    encoder: Encoder, normalized: Tensor, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Mean over places of what layers give, (B, D) float32 by name; see `run_layers`."""
    return run_layers(encoder, normalized, lambda maps: maps.mean(dim=(2, 3)), layers)


@torch.inference_mode()
def run_layers(
    encoder: Encoder,
    normalized: Tensor,
    reduce: Callable[[Tensor], Tensor],
    layers: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Run an encoder, and keep what is made of the maps of its layers.

    Args:
        encoder: with a map.
        normalized: (B, 3, S, S), see `Encoder.normalize`.
        reduce: called with each map (B, D, h, w) float32 as soon as it is there; D, h and w are each layer's
            own, class tokens and registers are left out. The maps of all layers together may be large.
        layers: the ones wanted, None for all.

    Returns:
        What `reduce` gave, by name, in the order in which the layers ran.

    Raises:
        ConfigError: the encoder has no map, or no such layer.
    """
    if encoder.map is None or encoder.module is None:
        raise ConfigError("this encoder shows no layers", where=encoder.name, fix="take one that gives maps")
    found: dict[str, Tensor] = {}

    def keep(name: str, is_last: bool, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim in (3, 4):
            maps = _to_map(output, is_last)
            if maps.shape[2] == maps.shape[3]:  # of square images; else it is something inside of a layer
                found[name] = reduce(maps.float())

    handles = [
        module.register_forward_hook(partial(keep, name, is_last))
        for name, module, is_last in _candidates(encoder.module)
        if layers is None or name in layers
    ]
    try:
        output = encoder.map(normalized.to(encoder.device))
    finally:
        for handle in handles:
            handle.remove()
    if layers is None or LAST in layers:
        found[LAST] = reduce(output.float())
    missing = [] if layers is None else [name for name in layers if name not in found]
    if missing:
        raise ConfigError(
            f"no layer '{missing[0]}'", where=encoder.name, allowed=", ".join(list_layers(encoder))
        )
    return found


def _candidates(root: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Blocks and stems: name, module, and whether its channels come last."""
    pending = [("", root, False)]
    while pending:
        prefix, module, is_last = pending.pop()
        is_last = getattr(module, "output_fmt", "NCHW") == "NHWC" or is_last
        inner = []
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if name in STEMS or _is_block(name, child):
                yield path.removeprefix("trunk."), child, is_last
            else:
                inner.append((f"{path}.", child, is_last))
        pending += inner


def _is_block(name: str, module: nn.Module) -> bool:
    """Whether a module is one of a list, has parts, and is no list or stage of blocks itself."""
    return (
        name.isdigit()
        and any(True for _ in module.children())
        and not isinstance(module, (nn.Sequential, nn.ModuleList))
        and not hasattr(module, "blocks")
    )


def _to_map(output: Tensor, is_last: bool) -> Tensor:
    """(B, N, D), (B, h, w, D) or (B, D, h, w) as (B, D, h, w)."""
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        patches = output[:, output.shape[1] - side**2 :]  # class tokens and registers come first
        return patches.transpose(1, 2).reshape(len(output), -1, side, side)
    _, first, second, third = output.shape
    if first == second != third:  # some of timm's networks do not say that channels come last
        is_last = True
    return output.permute(0, 3, 1, 2) if is_last else output

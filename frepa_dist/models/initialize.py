"""Where the weights of a backbone start: timm's pretrained ones, a run, an exported folder, or a file.

Everything is loaded strictly: a name or a shape that does not fit is an error that names it. What differs by
nature is brought into shape first, and the words that are returned say so: the class token is left out,
position embeddings and relative-position tables are resized, a fourth input channel starts at zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frepa_dist.models.catalog import BACKBONES, find_backbone
from frepa_dist.models.init import interpolate_position_embedding, load_strictly, read_weights
from frepa_dist.runs import CONFIG, STUDENT_WEIGHTS, find_checkpoint
from shards.support.errors import ConfigError, DataError, EnvironmentFault

if TYPE_CHECKING:
    from frepa_dist.models.autoencoder import BackboneAutoencoder
    from frepa_dist.models.backbones import Backbone, BackboneSettings

TRUNK = "encoder.trunk."  # of the names in a run of a backbone
OTHER_PARTS = ("neck.", "decoder.")
MAE_DECODER = ("decoder_", "mask_token")
HEADS = ("head.", "fc.", "fc_norm.")
FIRST_LAYERS = ("patch_embed.proj.weight", "stem.0.weight", "conv1.weight")
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")  # computed anew
BIAS_TABLE = ".relative_position_bias_table"


def initialize(model: BackboneAutoencoder, settings: BackboneSettings) -> str:
    """Load what `settings.init` names into a fresh network.

    Returns:
        What was loaded and what was not, in words.

    Raises:
        ConfigError: timm has no weights for this backbone.
        DataError: the weights are missing, damaged or do not fit; the keys are named.
        EnvironmentFault: timm's weights cannot be fetched.
    """
    if settings.init is None:
        return "freshly initialized"
    if settings.init == "timm":
        entry = find_backbone(settings.backbone)
        source: Path | str = f"timm {entry.architecture}"
        weights = _fetch_pretrained(settings.backbone)
    else:
        source = find_weights(settings.init)
        weights = read_weights(Path(source))
    own, notes = adapt_weights(weights, model.encoder)
    others = {key: value for key, value in weights.items() if key.startswith(OTHER_PARTS)}
    if others:
        fitting = {f"{TRUNK}{key}": value for key, value in own.items()} | others
        load_strictly(model, fitting, Path(source))
        loaded = "encoder, neck and decoder loaded"
    else:
        load_strictly(model.encoder.trunk, own, Path(source))
        loaded = "encoder loaded, neck and decoder freshly initialized"
    return "; ".join([loaded, *notes])


def find_weights(path: Path) -> Path:
    """The file of weights in a run folder (of its newest checkpoint), an exported folder, or the file itself.

    Raises:
        DataError: the folder is neither.
    """
    if (path / CONFIG).is_file():
        return find_checkpoint(path) / STUDENT_WEIGHTS
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if path.is_dir():
        raise DataError(
            "this folder holds no weights",
            where=path,
            allowed="a run folder, an exported folder, or a file of weights",
        )
    return path


def adapt_weights(weights: dict[str, Tensor], encoder: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """Bring weights into the names and sizes of an encoder's trunk, as far as that is meaningful.

    Args:
        weights: of a run, an export, an MAE or RETFound checkpoint, or a timm model; unchanged.
        encoder: whose trunk they are for.

    Returns:
        The weights, still to be checked against the trunk, and what was done to them, in words.
    """
    made, left_out = _select(weights)
    expected: dict[str, Tensor] = encoder.trunk.state_dict()
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    resized = []
    for key, value in list(made.items()):
        target = expected.get(key)
        if target is None or value.shape == target.shape:
            continue
        if key == "pos_embed":
            made[key] = _fit_positions(value, target.shape[1])
        elif key.endswith(BIAS_TABLE) and value.ndim == 2 and value.shape[1] == target.shape[1]:
            made[key] = _fit_bias_table(value, target)
        elif key in FIRST_LAYERS and value.ndim == 4:
            made[key] = _fit_first_layer(value, target, notes)
        if made[key] is not value:
            resized.append(key)
    if resized:
        notes.append(f"resized: {_shorten(sorted(resized))}")
    return made, notes


def _select(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's weights under timm's names, and the groups of the others."""
    if any(key.startswith(TRUNK) for key in weights):
        other_methods = (*OTHER_PARTS, *MAE_DECODER)
        inside = {key: value for key, value in weights.items() if not key.startswith(other_methods)}
        return {key.removeprefix(TRUNK): value for key, value in inside.items()}, []
    made: dict[str, Tensor] = {}
    left_out: dict[str, None] = {}
    for key, value in weights.items():
        # ConvNeXt has the same norm before the pooling here that timm has behind it
        renamed = key.replace("head.norm.", "norm_pre.")
        if renamed.endswith(BUFFERS):
            continue
        if key.startswith(MAE_DECODER):
            left_out["decoder"] = None
        elif key == "cls_token":
            left_out["class token"] = None
        elif renamed.startswith(HEADS):
            left_out["head"] = None
        else:
            made[renamed] = value
    return made, list(left_out)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _fit_positions(embedding: Tensor, num_patches: int) -> Tensor:
    """Leave out the class token's row and resize the grid, bicubically; the input where it is no grid."""
    if embedding.ndim != 3 or len(embedding) != 1:
        return embedding
    rows = embedding.shape[1]
    if _is_square(rows):
        embedding = torch.cat([embedding.new_zeros(1, 1, embedding.shape[2]), embedding], dim=1)
    elif not _is_square(rows - 1):
        return embedding
    return interpolate_position_embedding(embedding, num_patches)[:, 1:]


def _fit_bias_table(table: Tensor, target: Tensor) -> Tensor:
    """Resize a relative-position table ((2 w - 1)^2, heads) to another window, as timm does."""
    if not (_is_square(len(table)) and _is_square(len(target))):
        return table
    from timm.layers import resize_rel_pos_bias_table

    side = (math.isqrt(len(target)) + 1) // 2
    resized: Tensor = resize_rel_pos_bias_table(table, (side, side), tuple(target.shape))
    return resized


def _fit_first_layer(kernel: Tensor, target: Tensor, notes: list[str]) -> Tensor:
    """Bring the first kernel to another patch size; a fourth input channel is added, and starts at zero."""
    if kernel.shape[0] != target.shape[0]:
        return kernel
    if kernel.shape[2:] != target.shape[2:]:
        from timm.layers import resample_patch_embed

        kernel = resample_patch_embed(kernel, list(target.shape[2:]))
    if (kernel.shape[1], target.shape[1]) == (3, 4):
        notes.append("the fourth input channel starts at zero")
        kernel = torch.cat([kernel, kernel.new_zeros(len(kernel), 1, *kernel.shape[2:])], dim=1)
    return kernel


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _fetch_pretrained(name: str) -> dict[str, Tensor]:
    """Weights of timm's pretrained model, at the size that it was trained with.

    Raises:
        ConfigError: there are none that fit.
        EnvironmentFault: they cannot be fetched.
    """
    import timm

    entry = find_backbone(name)
    if not entry.pretrained:
        having = ", ".join(key for key, other in BACKBONES.items() if other.pretrained)
        raise ConfigError(
            f"timm has no pretrained weights that fit {name}", where="init", allowed=f"with weights: {having}"
        )
    try:
        model: Any = timm.create_model(entry.architecture, pretrained=True)
    except Exception as error:  # OSError, an HTTP library's own errors, or RuntimeError: none published
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFault(
            f"its pretrained weights cannot be had: {reason}",
            where=f"timm {entry.architecture}",
            fix="fetch them where there is a network, and name the file in `init`",
        ) from error
    return dict(model.state_dict())

"""Encoders that timm builds: its own models, and exported folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frepa_dist.evaluate.encoder import Encoder, to_map
from frepa_dist.models.init import read_weights
from frepa_dist.models.vit_mae import gather_tokens
from shards.support.errors import ConfigError, DataError, EnvironmentFault

OWN_KEYS = "frepa"  # of an exported config.json: what timm's configuration has no word for


def load_folder(source: str, path: Path, device: torch.device) -> Encoder:
    """Load an exported folder, or any other one in timm's hub layout."""
    import timm

    try:
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    except Exception as error:  # timm, torch and safetensors raise what they like at a damaged folder
        raise DataError(f"not a folder that timm can load: {error}", where=path) from error
    own = json.loads((path / "config.json").read_text(encoding="utf-8")).get(OWN_KEYS, {})
    return replace(_from_timm(source, model, device), min_max=bool(own.get("min_max", False)))


def load_timm(source: str, rest: str, device: torch.device, sources: str) -> Encoder:
    """Load NAME, NAME?pretrained or NAME?weights=FILE.

    Args:
        source: what the user wrote; `rest` is what follows `timm:`.
        rest: see there.
        device: where it runs.
        sources: what else the user could have written.

    Raises:
        ConfigError: timm has no such model.
        DataError: a file does not hold the weights of this model.
        EnvironmentFault: pretrained weights cannot be fetched.
    """
    import timm

    name, _, option = rest.partition("?")
    file = option.removeprefix("weights=") if option.startswith("weights=") else ""
    if not timm.is_model(name) or not (option in ("", "pretrained") or file):
        raise ConfigError(
            "timm has no such model, or this is no option of it",
            where=source,
            allowed=f"a name of timm.list_models(); {sources}",
        )
    if not option:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _from_timm(source, timm.create_model(name, pretrained=False), device)
    if file:
        return _from_timm(source, _load_weights(name, Path(file)), device)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # OSError, or an HTTP library's own errors, or RuntimeError: none published
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFault(
            f"its pretrained weights cannot be had: {reason}",
            where=source,
            fix="fetch them where there is a network, or name a model that has some",
        ) from error
    return _from_timm(source, model, device)


def _load_weights(name: str, path: Path) -> nn.Module:
    """A model of timm with the weights of a file, in timm's names or those of the authors that it knows.

    All weights but the classifier's must be there: else a partly random model would be measured in silence.

    Raises:
        DataError: some are missing, left over or of other shapes, or the file cannot be read.
    """
    import timm

    weights = read_weights(path)
    config = timm.get_pretrained_cfg(name)
    heads = [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())
    headless = {key: value for key, value in weights.items() if key.rpartition(".")[0] not in heads}
    reasons = []
    for given, settings in ((weights, {}), (headless, {"num_classes": 0})):
        overlay = {"state_dict": dict(given), "custom_load": False, "source": "", **settings}
        try:
            model: nn.Module = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **settings
            )
        except Exception as error:  # a filter of timm's raises what it likes at weights of another model
            reasons.append(" ".join(str(error).split())[:300] or type(error).__name__)
        else:
            return model
    raise DataError(f"not the weights of '{name}': {reasons[-1]}", where=path)


def _from_timm(name: str, model: nn.Module, device: torch.device) -> Encoder:
    from timm.data import resolve_model_data_config
    from timm.models.vision_transformer import VisionTransformer

    model.reset_classifier(0)  # type: ignore[operator]
    model = model.eval().requires_grad_(False).to(device)
    wanted = resolve_model_data_config(model)
    is_vit = type(model) is VisionTransformer

    def pool(images: Tensor, ids_keep: Tensor | None) -> Tensor:
        if is_vit:
            return _pool_timm_vit(model, images, ids_keep)
        if ids_keep is not None:
            raise ConfigError(
                "this encoder has no tokens to choose from", where=name, allowed="a vision transformer"
            )
        return model(images)  # type: ignore[no-any-return]

    # some convolutional networks have a layer behind the pooling
    width = getattr(model, "head_hidden_size", None) or model.num_features
    patch_size = model.patch_embed.patch_size[0] if is_vit else None  # type: ignore[union-attr, index]
    return Encoder(
        name,
        pool,
        int(width),  # type: ignore[arg-type]
        wanted["input_size"][-1],
        patch_size,  # type: ignore[arg-type]
        tuple(wanted["mean"]),
        tuple(wanted["std"]),
        device,
        map=_timm_map(model, is_vit),
        module=model,
    )


def _timm_map(model: Any, is_vit: bool) -> Callable[[Tensor], Tensor] | None:
    """The map after the last norm, also where timm has that norm behind the pooling."""
    if is_vit:
        return lambda images: to_map(model.fc_norm(_timm_vit_tokens(model, images, None)))
    from timm.layers import LayerNorm2d

    if not hasattr(model, "forward_intermediates"):
        return None
    last = getattr(getattr(model, "head", None), "norm", None) or nn.Identity()
    is_own = isinstance(last, nn.Identity)  # hiera, for one, refuses to apply its head's norm

    def run(images: Tensor) -> Tensor:
        features: Tensor = model.forward_intermediates(
            images, indices=1, norm=is_own, output_fmt="NCHW", intermediates_only=True
        )[-1]
        if isinstance(last, nn.LayerNorm) and not isinstance(last, LayerNorm2d):
            return last(features.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
        return last(features)  # type: ignore[no-any-return]

    return run


def _pool_timm_vit(model: Any, images: Tensor, ids_keep: Tensor | None) -> Tensor:
    """Mean patch token of timm's `VisionTransformer`, encoding only some patches if so wished."""
    return model.fc_norm(_timm_vit_tokens(model, images, ids_keep).mean(dim=1))  # type: ignore[no-any-return]


def _timm_vit_tokens(model: Any, images: Tensor, ids_keep: Tensor | None) -> Tensor:
    """Patch tokens (B, N or K, D) of timm's `VisionTransformer` after its norm."""
    tokens = model._pos_embed(model.patch_embed(images))
    num_prefix = model.num_prefix_tokens
    if ids_keep is not None:
        tokens = torch.cat([tokens[:, :num_prefix], gather_tokens(tokens[:, num_prefix:], ids_keep)], dim=1)
    return model.norm(model.blocks(model.norm_pre(tokens)))[:, num_prefix:]  # type: ignore[no-any-return]

"""Features on disk, by what they are made of: the encoder, the image's content, the way it was viewed.

    FOLDER/KEY/NAME.safetensors    KEY: of encoder and view; "features" (m, ...) float32 of m images

A file is written whole or not at all, under a name that its content determines: any number of processes may
write here at once. Nothing is ever wrong with what is here but a damaged file, which is noticed by its
checksum, deleted, and computed anew. The files that were read least recently go when room is wanted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from frepa_dist.evaluate.encoder import Encoder
from shards.stores.atomic import TEMP_MARK, replace_file, writing_to
from shards.support.errors import ConfigError
from shards.support.settings import Settings

FORMAT = 1  # counts up when features of the same name would be others: of a changed view, pooling or file
SUFFIX = ".safetensors"
LEFT_SECONDS = 86_400  # no one writes to a file for so long: its writer was killed
Float32 = npt.NDArray[np.float32]


def encoder_digest(encoder: Encoder) -> str:
    """Hash what decides an encoder's features: weights, buffers, structure, and how images are prepared.

    Of the structure: the class of each module and its plain values, such as numbers of heads. Versions of
    torch and timm count too, since their code is part of the network.

    Raises:
        ConfigError: the encoder does not show its weights.
    """
    if encoder.module is None:
        raise ConfigError(
            "this encoder does not show its weights, so its features cannot be told apart from others",
            where=encoder.name,
            fix="leave --cache out",
        )
    import timm

    prepared = (encoder.image_size, encoder.patch_size, encoder.mean, encoder.std, encoder.min_max)
    versions = (FORMAT, torch.__version__, timm.__version__, encoder.device.type)
    digest = hashlib.sha256(repr((prepared, versions)).encode())
    for name, module in encoder.module.named_modules():
        kind = type(module)
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if not key.startswith("_")
            and isinstance(value, bool | int | float | str | tuple | Settings | None)
        }
        digest.update(repr((name, kind.__module__, kind.__qualname__, plain)).encode())
    tensors: Iterator[tuple[str, torch.Tensor]] = (
        pair for kind in ("parameters", "buffers") for pair in getattr(encoder.module, f"named_{kind}")()
    )
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(repr((name, str(values.dtype), tuple(values.shape))).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class FeatureCache:
    """The features of one encoder and one view.

    Args:
        folder: of the cache, shared by all encoders and views.
        encoder: digest of the encoder.
        view: how images are looked at.
    """

    def __init__(self, folder: Path, encoder: str, view: str) -> None:
        self.folder = folder / f"{encoder}-{hashlib.sha256(view.encode()).hexdigest()[:16]}"

    def names(self) -> set[str]:
        """Digests of the images that are here, by the files' headers."""
        return {name for path in self._files() for name in _names(path)}

    def read(self, wanted: Sequence[str]) -> dict[str, Float32]:
        """Features of those images that are here."""
        missing = set(wanted)
        found: dict[str, Float32] = {}
        for path in self._files():
            here = _names(path)
            if missing.isdisjoint(here):
                continue
            features = _load(path)
            if features is None or len(features) != len(here):
                path.unlink(missing_ok=True)
                continue
            mine = {name: row for name, row in zip(here, features, strict=True) if name in missing}
            found |= mine
            missing -= set(mine)
            _touch(path)
        return found

    def write(self, names: Sequence[str], features: Float32) -> None:
        """Keep features (m, ...) of m images.

        Raises:
            EnvironmentFault: the folder cannot be written, or the disk is full.
        """
        features = np.ascontiguousarray(features, np.float32)
        facts = {"names": json.dumps(list(names)), "crc32c": str(google_crc32c.value(features.tobytes()))}
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        title = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
        with replace_file(self.folder / f"{title}{SUFFIX}") as file:
            file.write(save({"features": features}, metadata=facts))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{SUFFIX}"))


def _names(path: Path) -> list[str]:
    facts = _read_facts(path)
    try:
        return [str(name) for name in json.loads(facts.get("names", "[]"))]
    except ValueError:
        return []


def _read_facts(path: Path) -> Mapping[str, str]:
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):  # torn by a disk, or pruned by another process meanwhile
        return {}


def _load(path: Path) -> Float32 | None:
    """The features of a file, None where it is damaged or gone."""
    try:
        with safe_open(path, "numpy") as file:
            facts: Any = file.metadata() or {}
            features = np.asarray(file.get_tensor("features"), np.float32)
    except (OSError, SafetensorError):
        return None
    right = facts.get("crc32c") == str(google_crc32c.value(features.tobytes()))
    return features if right else None


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # read-only, or gone: the order of pruning suffers, nothing else
        return


def prune_cache(folder: Path, max_bytes: int) -> tuple[int, int]:
    """Delete the files that were read least recently until the rest fits, and what killed writers left.

    Args:
        folder: of the cache.
        max_bytes: that may stay.

    Returns:
        How many files were deleted, and how many bytes stay.

    Raises:
        EnvironmentFault: they cannot be deleted.
    """
    known = []
    for path in folder.glob(f"*/*{SUFFIX}*"):
        try:
            stat = path.stat()
        except OSError:  # another process prunes too
            continue
        if path.suffix == SUFFIX:
            known.append((stat.st_mtime_ns, stat.st_size, path))
        elif TEMP_MARK in path.name and time.time() - stat.st_mtime > LEFT_SECONDS:
            path.unlink(missing_ok=True)
    left, deleted = sum(size for _, size, _ in known), 0
    for _, size, path in sorted(known):
        if left <= max_bytes:
            break
        with writing_to(path):
            path.unlink(missing_ok=True)
        left, deleted = left - size, deleted + 1
    return deleted, left

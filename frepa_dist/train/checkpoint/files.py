"""Files of tensors that any number of processes wrote, and any number reads: safetensors, no pickle.

A checkpoint's `rank-R.safetensors` holds stretches of flattened tensors. The key `NAME@START` says of which
tensor, and where in it the stretch begins; its length is that of the entry. So who wrote which stretch means
nothing to who reads: that is what lets a run go on with other ranks and in another ZeRO stage.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.support.errors import DataError, EnvironmentFault

RANK_FILES = "rank-*.safetensors"
CHUNK_BYTES = 8 << 20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def rank_file(rank: int) -> str:
    """Name of what a rank writes."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Written:
    """A file as it was meant to be: its name in the checkpoint, bytes, and their crc32c."""

    name: str
    size: int
    crc32c: int


class Layout:
    """Where each tensor lies in a safetensors file.

    Args:
        entries: key, dtype and shape of each; the wide ones are laid out first, so that all are aligned.

    Attributes:
        header: what comes before the tensors.
        places: offset behind the header and number of bytes, by key.
        num_bytes: of all tensors.
    """

    def __init__(self, entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        described: dict[str, Any] = {}
        offset = 0
        for key, dtype, shape in sorted(entries, key=lambda entry: -entry[1].itemsize):
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            self.places[key] = (offset, size)
            described[key] = {
                "dtype": DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        assert len(self.places) == len(entries), "two tensors of one name"
        self.num_bytes = offset
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text


def write_bytes(path: Path, parts: Iterable[np.ndarray[Any, Any] | bytes]) -> Written:
    """Write a file to the disk itself, and say what it must hold from now on.

    Args:
        path: the file.
        parts: its content, in order; arrays are of uint8.

    Raises:
        OSError: the disk refused.
    """
    size = checksum = 0
    with path.open("wb") as file:
        for part in parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                file.write(chunk)  # type: ignore[arg-type]
                checksum = google_crc32c.extend(checksum, chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Written(path.name, size, checksum)


def file_checksum(path: Path) -> int:
    """crc32c of a file."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = google_crc32c.extend(checksum, chunk)
    return checksum


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn the ways in which a disk refuses into one error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(
            f"the checkpoint could not be written: {error}",
            where=where,
            fix="free disk space or make the folder writable, then `frepa resume` the run",
        ) from error


class TensorReader:
    """Reads stretches of tensors from all rank files of a checkpoint, whoever wrote them.

    Args:
        folder: the checkpoint.

    Raises:
        DataError: a file is not of safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._stretches: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(folder.glob(RANK_FILES)):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise DataError(f"cannot be read: {error}", where=path) from error
            for key in file.keys():  # noqa: SIM118 (the file is no mapping)
                name, _, start = key.rpartition("@")
                stretch = file.get_slice(key)
                begin = int(start)
                end = begin + int(stretch.get_shape()[0])
                self._stretches.setdefault(name, []).append((begin, end, stretch))
        for stretches in self._stretches.values():
            stretches.sort(key=lambda entry: entry[:2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stretches.clear()
        self._stack.close()

    def names(self, prefix: str = "") -> list[str]:
        """All tensors whose name begins so."""
        return sorted(name for name in self._stretches if name.startswith(prefix))

    def numel(self, name: str) -> int:
        """Where the last stretch of a tensor ends; 0 where there is none."""
        return max((end for _, end, _ in self._stretches.get(name, [])), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._stretches

    def read(self, name: str, numel: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of a flattened tensor of `numel` elements.

        Raises:
            DataError: it is not there, not whole, or of another size.
        """
        stop = numel if stop is None else stop
        stretches = self._stretches.get(name, [])
        if self.numel(name) != numel:
            raise DataError(
                f"holds {self.numel(name)} numbers of '{name}', expected {numel}",
                where=self.folder,
                fix="resume the run with the version of this program and of timm that wrote it",
            )
        parts, position = [], start
        for begin, end, stretch in stretches:
            if begin <= position < end and position < stop:
                parts.append(stretch[position - begin : min(end, stop) - begin])
                position = min(end, stop)
        if position < stop:
            raise DataError(f"'{name}' lacks numbers from {position} on", where=self.folder)
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_state(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Part nested dicts and lists into what JSON holds and tensors, which go to `tensors` by their path."""
    if isinstance(state, Tensor):
        tensors[path] = state.detach().reshape(-1)
        return {"tensor": path, "shape": list(state.shape)}
    if isinstance(state, Mapping):
        assert all(isinstance(key, str) for key in state), f"{path}: JSON knows keys of text only"
        return {key: split_state(value, f"{path}/{key}", tensors) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [split_state(value, f"{path}/{index}", tensors) for index, value in enumerate(state)]
    return state


def join_state(tree: Any, reader: TensorReader) -> Any:
    """Undo `split_state`; tuples come back as lists.

    Raises:
        DataError: a tensor is missing.
    """
    if isinstance(tree, dict):
        if tree.keys() == {"tensor", "shape"}:
            numel = int(np.prod(tree["shape"], dtype=np.int64))
            return reader.read(tree["tensor"], numel).view(tree["shape"])
        return {key: join_state(value, reader) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join_state(value, reader) for value in tree]
    return tree

"""HDF5: one dataset, by default `data` (where the authors of Frepa keep one image a file).

Its axes mean what they do in any array (`shards.formats.arrays`); one image is read at a time. The file must
hold the pixels itself: links to other files, external storage and virtual datasets are refused, since a file
of a stranger could name any file of this machine.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import h5py
import numpy as np

from shards.formats.arrays import ArrayObject, Layout, describe, find_layout
from shards.formats.common import Header, Opened, ReadOptions, Unreadable, decoder_faults
from shards.formats.volumes import check_claim
from shards.stores.blobs import Blob

_CACHE_BYTES = 64 << 20  # of inflated chunks, so that slices of one chunk inflate it once
_MAX_CHUNK_BYTES = 1 << 30


def read_header(blob: Blob, options: ReadOptions) -> Header:
    """Describe the dataset; needs the whole object as a file.

    Raises:
        Unreadable: there is none of that name, it holds no image, or the file is damaged.
    """
    with ExitStack() as stack:
        dataset, layout = _open_dataset(blob, options, stack)
        return describe(layout, dataset.dtype, "hdf5")


def open_hdf5(blob: Blob, options: ReadOptions) -> Opened:
    """Open the dataset, whose units are its images.

    Raises:
        Unreadable: as `read_header`.
    """
    with ExitStack() as stack:
        dataset, layout = _open_dataset(blob, options, stack)
        return ArrayObject(dataset, layout, stack.pop_all(), ("h5py",))


def _open_dataset(blob: Blob, options: ReadOptions, stack: ExitStack) -> tuple[Any, Layout]:
    path = stack.enter_context(blob.as_file())
    with decoder_faults("h5py"):
        # no lock: sources are read only, and some file systems have none
        file = stack.enter_context(h5py.File(path, "r", locking=False, rdcc_nbytes=_CACHE_BYTES))
        dataset = _find_dataset(file, options.hdf5_key)
        if dataset.dtype.names or dataset.dtype.hasobject:
            raise Unreadable("unsupported_format", "numbers that are not real")
        shape = tuple(dataset.shape or ())
        layout = find_layout(shape, dataset.dtype, options)
        if dataset.is_virtual or dataset.external:
            raise Unreadable("unsupported_format", "pixels in another file")
        itemsize = dataset.dtype.itemsize
        if dataset.chunks and np.prod(dataset.chunks, dtype=object) * itemsize > _MAX_CHUNK_BYTES:
            raise Unreadable("too_many_pixels", "chunk")
        num_bytes = int(np.prod(shape, dtype=object)) * itemsize
        held_bytes = min(int(dataset.id.get_storage_size()), blob.num_bytes)
        check_claim(num_bytes, held_bytes, is_compressed=dataset.chunks is not None)
        return dataset, layout


def _find_dataset(file: Any, key: str) -> Any:
    """Walk to the dataset, by links that stay inside the file."""
    found = file
    for name in key.strip("/").split("/"):
        link = found.get(name, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            raise Unreadable("no_array", fix="set `hdf5_key` to the name of the one that holds the pixels")
        if not isinstance(link, h5py.HardLink):
            raise Unreadable("unsupported_format", "a link")
        found = found[name]
    if not isinstance(found, h5py.Dataset):
        raise Unreadable("no_array", fix="set `hdf5_key` to the name of the one that holds the pixels")
    return found

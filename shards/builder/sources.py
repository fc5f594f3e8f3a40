"""Where objects come from: folders, files, S3 prefixes and listings, in one order whatever lists them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.labels import Labeler, Labels, select_labels
from shards.builder.listing import ListedObject, is_listing, read_listing
from shards.schema import canonical_json
from shards.stores.store import Store, is_remote
from shards.support.errors import ConfigError, DataError
from shards.support.progress import Progress

OBJECTS_SCHEMA = pa.schema(
    [
        pa.field("name", pa.large_binary(), nullable=False),  # bytes, since file names need not be UTF-8
        pa.field("uri", pa.large_binary(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("is_file", pa.bool_(), nullable=False),
        pa.field("labels", pa.string(), nullable=False),  # a JSON object
        pa.field("patient", pa.string()),  # not yet salted
    ]
)

_CHUNK_ROWS = 1 << 16
_EXAMINE_THREADS = 32


class SourceObject(NamedTuple):
    """One object of a source.

    Attributes:
        name: number of its source and path below it, "0/sub/file.png"; it does not depend on where the
            source lies, and identifies the object.
        uri: where it is, private: a path or `s3://...`.
        num_bytes: its size; -1 where it could not be examined (a broken link).
        version: changes when the object does: time of the last change in ns, or the ETag.
        is_file: whether it is a regular file.
        labels: what a listing says of it, None where it is not from one.
    """

    name: str
    uri: str
    num_bytes: int
    version: str
    is_file: bool = True
    labels: Labels | None = None


@dataclass(frozen=True)
class Listing:
    """The objects of all sources.

    Attributes:
        objects: `OBJECTS_SCHEMA`, sorted by the bytes of the names, which are unique.
        num_repeated: how often a source named an object that another one had named; each is listed once.
    """

    objects: pa.Table
    num_repeated: int = 0


def list_objects(
    sources: Sequence[Path | str],
    labeler: Labeler = lambda name, uri: Labels(),
    *,
    columns: Sequence[str] = (),
    patient_column: str = "patient",
) -> Listing:
    """List every object of the sources, hidden ones included.

    Args:
        sources: folders, files, `s3://bucket/prefix`, or listings (`.csv`, `.parquet`); mixed as you like.
        labeler: labels the objects that no listing names.
        columns: of listings, those that are labels.
        patient_column: of listings, the one that tells patients apart.

    Raises:
        ConfigError: a listing cannot be used.
        DataError: a source does not exist, cannot be listed, or all of them together hold no object.
        EnvironmentFault: S3 cannot be reached.
    """
    chunks: list[pa.Table] = []
    with Progress(None, "list", unit="object") as progress:
        for number, source in enumerate(sources):
            found = _list_source(source, number, columns, patient_column)
            while rows := list(islice(found, _CHUNK_ROWS)):
                chunks.append(_as_table(rows, labeler))
                progress.update(len(rows))
    if not chunks:
        where = ", ".join(map(str, sources))
        raise DataError("the source is empty", where=where, fix="give a place that holds images")
    objects = pa.concat_tables(chunks)
    objects = objects.take(pc.sort_indices(objects["name"]))
    listing = Listing(objects.combine_chunks())
    if len(sources) > 1 or is_listing(sources[0]):  # a single tree names nothing twice
        listing = _drop_repeated(listing.objects)
    _check_unique(listing.objects["name"])
    return listing


def _drop_repeated(objects: pa.Table) -> Listing:
    """Of objects that several sources name, keep the first."""
    codes = objects["uri"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    if len(first) == objects.num_rows:
        return Listing(objects)
    return Listing(objects.take(pa.array(np.sort(first))), objects.num_rows - len(first))


def _check_unique(names: pa.ChunkedArray) -> None:
    """Refuse an object and a prefix of the same name that both hold the same name, which S3 allows."""
    is_equal = pc.equal(names.slice(1), names.slice(0, max(0, len(names) - 1)))
    if pc.any(is_equal).as_py():
        name = names[pc.index(is_equal, True).as_py()].as_py()
        raise DataError(
            "two objects of one source have the same name",
            where=os.fsdecode(name),
            fix="name their prefixes as separate sources",
        )


def _as_table(rows: Sequence[SourceObject], labeler: Labeler) -> pa.Table:
    labels = [labeler(row.name, row.uri) if row.labels is None else row.labels for row in rows]
    columns = {
        "name": [os.fsencode(row.name) for row in rows],
        "uri": [os.fsencode(row.uri) for row in rows],
        "num_bytes": [row.num_bytes for row in rows],
        "version": [row.version for row in rows],
        "is_file": [row.is_file for row in rows],
        "labels": [canonical_json(dict(item.values)).decode() for item in labels],
        "patient": [item.patient for item in labels],
    }
    return pa.table(columns, schema=OBJECTS_SCHEMA)


def _list_source(
    source: Path | str, number: int, columns: Sequence[str], patient_column: str
) -> Iterator[SourceObject]:
    if is_listing(source):
        rows = read_listing(source).rows
        with ThreadPoolExecutor(_EXAMINE_THREADS) as pool:
            while batch := list(islice(rows, _CHUNK_ROWS)):
                for row, item in zip(batch, pool.map(_examine_listed, batch), strict=True):
                    labels = select_labels(row.values, columns, patient_column)
                    yield item._replace(name=f"{number}/{row.name}", labels=labels)
    elif is_remote(source):
        from shards.stores.s3 import list_objects as list_s3

        for key, uri, num_bytes, version in list_s3(str(source)):
            if not (key.endswith("/") and num_bytes == 0):  # what consoles make to show a folder
                yield SourceObject(f"{number}/{key}", uri, num_bytes, version)
    else:
        path = Path(os.path.abspath(source))
        if path.is_dir():
            prefix = f"{number}/"
            yield from (_examine(p, prefix + p.relative_to(path).as_posix()) for p in _walk(path))
        elif path.exists():
            yield _examine(path, f"{number}/{path.name}")
        else:
            raise DataError("no such file or folder", where=source, fix="correct the path of the source")


def _walk(source: Path) -> Iterator[Path]:
    """Every file below a folder; links are followed, one to a folder above it once."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"cannot be listed: {error.strerror}", where=error.filename, fix="allow reading of the folder"
        ) from error

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(source, followlinks=True, onerror=refuse):
        facts = Path(folder).stat()
        if (facts.st_dev, facts.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        subfolders.sort()
        for file in files:
            yield Path(folder, file)


def _examine(path: Path, name: str) -> SourceObject:
    try:
        facts = path.stat()
    except OSError:
        return SourceObject(name, str(path), -1, "", is_file=False)
    is_file = stat.S_ISREG(facts.st_mode)
    return SourceObject(name, str(path), facts.st_size if is_file else 0, str(facts.st_mtime_ns), is_file)


def _examine_listed(row: ListedObject) -> SourceObject:
    if not is_remote(row.uri):
        return _examine(Path(row.uri), row.name)
    if "num_bytes" in row.values and "etag" in row.values:  # as an inventory of the bucket has it
        return SourceObject(row.name, row.uri, int(row.values["num_bytes"]), row.values["etag"])
    from shards.stores.s3 import list_objects as list_s3

    for _, uri, num_bytes, version in list_s3(row.uri):
        if uri == row.uri:
            return SourceObject(row.name, uri, num_bytes, version)
    return SourceObject(row.name, row.uri, -1, "", is_file=False)


def check_places(sources: Sequence[Path | str], store: Store, state: Path) -> None:
    """Refuse places that would read what is being written, or publish what is private.

    Raises:
        ConfigError: the destination or the state folder lies in a source, or a source or the state in the
            destination.
    """
    for source in sources:
        for what, place in (("destination", store.uri), ("state folder", str(state))):
            if not is_listing(source) and _lies_in(place, str(source)):
                raise ConfigError(
                    f"the {what} lies inside the source {source}", where=place, fix="move it out"
                )
        if _lies_in(str(source), store.uri):  # its images would be handed on with the dataset, names and all
            fix = "choose another destination"
            raise ConfigError("the source lies inside the destination", where=source, fix=fix)
    if _lies_in(str(state), store.uri):
        fix = "choose a state folder outside: it is private, the dataset may be handed on"
        raise ConfigError("the state folder lies inside the destination", where=state, fix=fix)


def check_labeled(listing: Listing, table: str) -> None:
    """Refuse a table of labels that is not of these sources: to add labels later is to build anew.

    Raises:
        ConfigError: no object has a label or a patient.
    """
    objects = listing.objects
    if not pc.any(pc.or_(pc.not_equal(objects["labels"], "{}"), pc.is_valid(objects["patient"]))).as_py():
        raise ConfigError(
            "the table labels no object of the sources",
            where=table,
            allowed="in `filename`, paths relative to the table's folder; in `uri`, whole ones",
            fix="correct the names, or move the table",
        )


def _lies_in(place: str, folder: str) -> bool:
    if is_remote(place) != is_remote(folder):
        return False
    if is_remote(place):
        return f"{place.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    return Path(place).resolve().is_relative_to(Path(folder).resolve())

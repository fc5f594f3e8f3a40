"""The private side of a build: salt, plans, which key is which file.

Nothing of this folder is in the dataset. Whoever holds it can tell the keys apart; without it, a source can
not be built into the same dataset again.
"""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.stores.atomic import replace_file, writing_to
from shards.stores.store import Store
from shards.support.errors import ConfigError, DataError


@dataclass(frozen=True)
class Salt:
    """Keys the names that enter the dataset, so that they do not give away file names or patients."""

    value: bytes

    def digest(self, purpose: str, *parts: bytes) -> str:
        """64 hex digits; each purpose is a space of its own."""
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in (purpose.encode(), *parts))
        return hmac.digest(self.value, framed, "sha256").hex()

    def key(self, modality: str, source: str, name: bytes, unit: int, revision: int = 0) -> str:
        """The key of a unit: 24 hex digits; a collision among 1e8 samples has odds of 1e-13.

        Args:
            modality: of the unit.
            source: likewise.
            name: of its object within the source.
            unit: its number in the object.
            revision: how many other objects had that name before.
        """
        which = (str(revision).encode(),) if revision else ()
        return self.digest("key", modality.encode(), source.encode(), name, str(unit).encode(), *which)[:24]

    def volume(self, modality: str, source: str, name: bytes, revision: int = 0) -> str:
        """What the units of an object have in common, 24 hex digits."""
        which = (str(revision).encode(),) if revision else ()
        return self.digest("volume", modality.encode(), source.encode(), name, *which)[:24]

    def series(self, modality: str, source: str, series: str) -> str:
        """What the objects of a series have in common, 24 hex digits."""
        return self.digest("series", modality.encode(), source.encode(), series.encode())[:24]

    def patient(self, patient: str) -> str:
        """A patient, 16 hex digits."""
        return self.digest("patient", patient.encode())[:16]

    @property
    def owner(self) -> str:
        """Names the holder of this salt to other builders (`Store.lock`)."""
        return self.digest("owner")[:16]


def default_state(store: Store) -> Path:
    """The state folder beside a destination.

    Raises:
        ConfigError: the destination is remote, so that a place must be chosen.
    """
    folder = store.local_path("")
    if folder is None:
        raise ConfigError(
            "a build into S3 needs a state folder on this machine",
            where=store.uri,
            fix="name one (--state FOLDER) and keep it: without it the source cannot be extended",
        )
    absolute = Path(os.path.abspath(folder))
    return absolute.with_name(f"{absolute.name}.state")


def open_state(state: Path, salt: str | None) -> Salt:
    """Read the salt of a state folder; a fresh one is drawn at random. Call it while holding the folder.

    Args:
        state: the folder.
        salt: the salt to use instead, for builds that must agree with another state folder.

    Raises:
        ConfigError: the folder holds another salt.
        EnvironmentFault: it cannot be written.
    """
    path = state / "salt"
    with writing_to(state):
        known = path.read_text().strip() if path.exists() else None
    if known is None:
        known = salt or secrets.token_hex(32)
        with replace_file(path, mode=0o600) as file:
            file.write(known.encode() + b"\n")
    if salt not in (None, known):
        raise ConfigError(
            "the state folder holds another salt", where=path, fix="leave the salt out, or take a fresh state"
        )
    return Salt(known.encode())


def write_private(path: Path, table: pa.Table) -> None:
    """Write a table that only its owner may read.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    with writing_to(path):
        for folder in (path.parent.parent, path.parent):  # the mode is that of the last folder only
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replace_file(path, mode=0o600) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=1 << 18)


def read_private(path: Path, schema: pa.Schema) -> pa.Table:
    """Read such a table, with its metadata.

    Raises:
        DataError: it cannot be read, or was written by another version.
    """
    fix = "restore the file; where no dataset was built with this state folder, delete the folder"
    try:
        table = pq.read_table(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError("cannot be read as parquet", where=path, fix=fix) from error
    if not table.schema.equals(schema):
        raise DataError("not the columns that this version writes", where=path, fix=fix)
    return table


def table_facts(table: pa.Table) -> dict[str, Any]:
    """Metadata of a table as text."""
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}

"""The private side of a build: salt, plans, which key is which file; and the locks of both sides.

Nothing of this folder is in the dataset. Whoever holds it can tell the keys apart; without it, a source can
not be built into the same dataset again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.atomic import replace_file, writing_to
from shards.plan import Salt
from shards.support.errors import ConfigError, EnvironmentFault


def default_state(root: Path) -> Path:
    """The state folder beside a destination."""
    absolute = Path(os.path.abspath(root))
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


@contextmanager
def lock(folder: Path, *, name: str = ".build.lock", mode: int = 0o777) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with the process, however it ends.

    Args:
        folder: what is held; it is made with `mode` if need be.
        name: of the lock file in it.
        mode: permissions of a new folder.

    Raises:
        EnvironmentFault: another process holds it, or the folder cannot be written.
    """
    path = folder / name
    with writing_to(folder):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(
                "another process is writing here",
                where=folder,
                fix="wait for it, or choose another destination",
            ) from None
        yield
    finally:
        os.close(descriptor)

"""Where Prometheus finds who serves metrics: a folder with a file per process, for its `file_sd_configs`.

    FOLDER/JOB-NAME.json    [{"targets": ["HOST:PORT"], "labels": {"job": ..., "run": ..., ...}}]

A file appears whole, and goes when its process ends in order. What a `kill -9` has left is overwritten by the
next process of the same name, and removed by whoever looks after that process (`remove_targets`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path, PurePath

from shards.support.errors import EnvironmentFault

_FAR_AWAY = ("192.0.2.1", 9)  # RFC 5737: an address that nobody has; no packet is sent to it


def unique_label(place: PurePath | str) -> str:
    """Name a run or a dataset by the last part of its place, and by a hash of all of it.

    Two runs of one name in two folders stay two; neither the folder nor a user can be read from it.
    """
    text = str(place).rstrip("/")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", text.rpartition("/")[2])
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def advertised_host(address: str) -> str:
    """The host that others reach this machine by, where a server listens on `address`.

    It is the address itself, unless that stands for all of the machine's: then the one that its packets to
    other networks carry, or its name where it has no way to any.
    """
    try:
        if not ipaddress.ip_address(address).is_unspecified:
            return f"[{address}]" if ":" in address else address
    except ValueError:  # a name
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_FAR_AWAY)
        except OSError:
            return socket.gethostname()
        host: str = probe.getsockname()[0]
        return host


def write_target(folder: Path, target: str, labels: Mapping[str, str]) -> Path:
    """Tell Prometheus of a target.

    Args:
        folder: of all targets; made where there is none.
        target: `HOST:PORT`.
        labels: of all its series; they tell it from all others, `job` among them.

    Returns:
        The file.

    Raises:
        EnvironmentFault: the folder cannot be written to.
    """
    # a rank may come back on another node, and is still the same
    known = [value for key, value in labels.items() if not (key == "node" and "rank" in labels)]
    name = "-".join(re.sub(r"[^A-Za-z0-9_.-]", "_", value) for value in known)
    path = folder / f"{name}.json"
    temporary = folder / f".{path.name}-{os.getpid()}"  # Prometheus reads *.json
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([{"targets": [target], "labels": dict(labels)}]) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentFault(
            f"the targets of Prometheus cannot be written: {error.strerror}",
            where=folder,
            fix="choose another `metrics.targets`, or null",
        ) from error
    return path


def remove_targets(folder: Path, labels: Mapping[str, str]) -> None:
    """Remove the targets that have all of `labels`; what cannot be read is left."""
    for path in folder.glob("*.json"):
        try:
            (group,) = json.loads(path.read_text())
            if labels.items() <= group["labels"].items():
                path.unlink(missing_ok=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue

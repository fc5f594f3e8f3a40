"""Run Python on a disk of a few megabytes, to see what happens when it is full.

    result = run_on_small_disk(SCRIPT, "4m", argument)      # sys.argv: the disk's folder, then the arguments
    assert result.returncode == 0, result.stderr

The disk is a tmpfs in a mount namespace of its own, so no rights are needed and nothing is left behind.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile

import pytest

ENTER = ("unshare", "--user", "--map-root-user", "--mount")
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def run_on_small_disk(
    script: str, size: str, *arguments: object, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a script whose first argument is the folder of a disk of `size`; skip where none can be made."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("unshare") is None or not _works(folder):
            pytest.skip("needs a small disk: this machine allows no user namespaces")
        python = [sys.executable, "-c", script, folder, *map(str, arguments)]
        command = [*ENTER, "sh", "-c", MOUNT, "sh", size, folder, *python]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def _works(folder: str) -> bool:
    command = [*ENTER, "sh", "-c", MOUNT, "sh", "1m", folder, "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0

"""The `frepa` command in the process of a test, which has already imported what takes a new one seconds."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import NamedTuple
from unittest import mock

from cluster.cli import main

# gloo on the CPU, also where there is a GPU: bit-equal results are promised there
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def frepa(*parts: object, **variables: str) -> Ended:
    """Run `frepa PARTS`; the ranks that it starts are processes of their own.

    Args:
        parts: of the command line.
        variables: further ones of the environment.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = ["frepa", *map(str, parts)]
    with (
        mock.patch.dict(os.environ, {**ON_CPU, **variables}),
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())

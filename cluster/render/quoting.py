"""Quoting of values for what reads the files: a shell, YAML, and Kubernetes with its own `$(NAME)`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml


def quote_shell(value: object) -> str:
    """One word of a shell command, whatever is in it."""
    return shlex.quote(str(value))


def quote_yaml(value: Any) -> str:
    """A value in YAML's flow style: every string in double quotes, so that none becomes something else."""
    if isinstance(value, str):
        # ASCII with escapes: line separators and what YAML does not allow raw stay what they are
        return yaml.dump(value, Dumper=yaml.SafeDumper, default_style='"', width=float("inf")).rstrip("\n")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quote_yaml(key)}: {quote_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Iterable):
        return "[" + ", ".join(map(quote_yaml, value)) + "]"
    return json.dumps(value)


def quote_argument(value: object) -> str:
    """A string of `args` or `env` in a manifest, in which Kubernetes would replace `$(NAME)`."""
    return quote_yaml(str(value).replace("$", "$$"))


def quote_command(parts: Iterable[object], indent: int = 4) -> str:
    """A shell command, each of its options on a line of its own."""
    text = ""
    for part in map(str, parts):
        break_here = " \\\n" + " " * indent if part.startswith("--") else " "
        text += (break_here if text else "") + quote_shell(part)
    return text

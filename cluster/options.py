"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


def set_option(function: F) -> F:
    """Add `--set dotted.key=value`, repeatable."""
    option = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated."
    )
    return option(function)

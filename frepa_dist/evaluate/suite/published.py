"""Figures that others published (`published.yaml`), to be printed beside measured ones, never among them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from shards.support.errors import ConfigError
from shards.support.settings import Settings, read_config, validate

FILE = Path(__file__).parent / "published.yaml"
CAUTION = (
    "Published figures were measured by others: on their copies and splits of the data, with their protocol, "
    "after pretraining on their images. They stand here for orientation. A difference between a published "
    "figure and a measured one is no result, and no test is made of it."
)


class Published(Settings):
    """A table of published figures.

    Attributes:
        title: what was measured.
        source: where it was published.
        measure: what the figures are.
        figures: by method.
    """

    title: str
    source: str
    measure: str
    figures: dict[str, float] = Field(min_length=1)


class PublishedFile(Settings):
    """All tables by key."""

    tables: dict[str, Published]


@cache
def load_published() -> dict[str, Published]:
    """Read all tables by key."""
    return validate(PublishedFile, read_config(FILE), where=FILE).tables


def find_published(key: str) -> Published:
    """Find a table.

    Raises:
        ConfigError: there is none of that key.
    """
    tables = load_published()
    if key not in tables:
        raise ConfigError("no such published figures", where=key, allowed=", ".join(tables))
    return tables[key]

"""What is known of a data set, as YAML (`recipes/*.yaml`): where it comes from, and how a copy is laid out.

A recipe holds facts, each from a source that it names; nothing is downloaded. Paths are patterns with names
in braces: `training/images/{id}_training.tif` matches every file of that form, and `{id}` then fills the
pattern of its mask.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shards.hf.modalities import MODALITIES
from shards.support.errors import ConfigError
from shards.support.settings import Settings, read_config, validate

FOLDER = Path(__file__).parent / "recipes"
NAME = r"^[a-z0-9][a-z0-9-]*$"
UNKNOWN = "not stated"
_GROUP = re.compile(r"\{(\w+)\}")
_ANY = r"[^/]+?"


class License(Settings):
    """Terms of use.

    Attributes:
        text: in short, "not stated" when they are not known.
        page: that says so.
    """

    text: str = UNKNOWN
    page: str = UNKNOWN


class Table(Settings):
    """A CSV file of the data set with what is known of its images.

    Attributes:
        path: relative to the folder.
        key: column that names an image.
        match: pattern of that column's cells, whose groups pick the image out of the part.
        only: names of the path that all its images have in common, such as the camera.
        columns: our names of columns, and those of the table; "mask", "fov" and "mask2" name files.
        optional: those of our columns that a table may lack.
        values: of our columns, what their cells become; other cells stay.
        count: rows, None when it is not known.
        required: whether a copy without the table is incomplete.
    """

    path: str
    key: str
    match: str = "{id}"
    only: dict[str, str] = Field(default_factory=dict)
    columns: dict[str, str]
    optional: list[str] = Field(default_factory=list)
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    count: int | None = Field(default=None, ge=1)
    required: bool = True


class Part(Settings):
    """Files of one kind, as a rule a split.

    Attributes:
        name: for messages.
        split: "train" or "test"; "{split}" takes it from the path; "" where the set gives none.
        images: pattern of the images.
        groups: regular expressions of its names; one that is not given matches any text without a slash.
        count: images, None when it is not known.
        label: of all of them, or "{label}" from the path.
        values: of labels in the path, what they become.
        patient: pattern that tells patients apart, such as "{patient}"; "" where they are not known.
        mask, fov, mask2: patterns of further files; "" for none.
        labels: tables of the part.
        listed: whether only images that a table names belong to the part.
    """

    name: str
    split: str = ""
    images: str
    groups: dict[str, str] = Field(default_factory=dict)
    count: int | None = Field(default=None, ge=1)
    label: str = ""
    values: dict[str, str] = Field(default_factory=dict)
    patient: str = ""
    mask: str = ""
    fov: str = ""
    mask2: str = ""
    labels: list[Table] = Field(default_factory=list)
    listed: bool = False

    @model_validator(mode="after")
    def _names_groups(self) -> Self:
        known = set(_GROUP.findall(self.images))
        for field in ("split", "label", "patient", "mask", "fov", "mask2"):
            if unknown := set(_GROUP.findall(getattr(self, field))) - known:
                raise ValueError(f"{field} names {{{min(unknown)}}}, which the pattern of images lacks")
        for table in self.labels:
            if not set(_GROUP.findall(table.match)) & known:
                raise ValueError(f"the rows of {table.path} name no group of the pattern of images")
        if unused := set(self.groups) - known:
            raise ValueError(f"the group {min(unused)} is not in the pattern of images")
        return self

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression of the images' paths; capitals do not matter."""
        return compile_pattern(self.images, self.groups)


class Recipe(Settings):
    """A data set.

    Attributes:
        name: what it is called here.
        title: what it is called elsewhere.
        modality: of its images.
        kind: "classes" (a folder per class), "table" (labels in CSV files), "masks" (images with masks),
            "volumes", or "facts": nothing is known of the layout, and nothing can be checked.
        tasks: what it is used for.
        get: where a person gets it.
        license: its terms.
        source: where the facts of this recipe come from.
        verified: whether a copy from the original place was checked against the recipe.
        notes: what else one should know.
        patients: how many, None when it is not known.
        parts: its files.
    """

    name: str = Field(pattern=NAME)
    title: str
    modality: str
    kind: Literal["classes", "table", "masks", "volumes", "facts"]
    tasks: list[str]
    get: str
    license: License = License()
    source: list[str] = Field(min_length=1)
    verified: bool
    notes: list[str] = Field(default_factory=list)
    patients: int | None = Field(default=None, ge=1)
    parts: list[Part] = Field(default_factory=list)

    @field_validator("modality")
    @classmethod
    def _is_known(cls, modality: str, _: ValidationInfo) -> str:
        if modality not in (*MODALITIES, "any"):
            raise ValueError(f"not one of {', '.join(MODALITIES)}, any")
        return modality

    @model_validator(mode="after")
    def _has_parts(self) -> Self:
        if (self.kind == "facts") == bool(self.parts):
            raise ValueError("a recipe has parts, unless it is of the kind 'facts'")
        return self

    def lines(self) -> list[str]:
        """The recipe for people."""
        lines = [
            f"{self.name}: {self.title} ({self.modality}; {', '.join(self.tasks)})",
            f"get it     {self.get}",
            f"license    {self.license.text} ({self.license.page})",
            f"patients   {self.patients or UNKNOWN}",
            f"verified   {'yes' if self.verified else 'no: no copy from the original place was checked'}",
        ]
        lines += [f"note       {note}" for note in self.notes]
        for part in self.parts:
            split = f", split {part.split}" if part.split else ", no split of its own"
            lines.append(f"part       {part.name}: {part.count or 'any number of'} images{split}")
            lines += [
                f"  {field:<8} {pattern}"
                for field in ("images", "mask", "mask2", "fov", "label", "patient")
                if (pattern := getattr(part, field))
            ]
            for table in part.labels:
                columns = ", ".join(f"{ours} = {theirs}" for ours, theirs in table.columns.items())
                lines.append(f"  table    {table.path}: by {table.key}; {columns}")
        return [*lines, *(f"source     {source}" for source in self.source)]


def compile_pattern(text: str, groups: Mapping[str, str]) -> re.Pattern[str]:
    """Turn a pattern with names in braces into a regular expression; a name that comes twice must agree."""
    parts, seen, last = [], set(), 0
    for found in _GROUP.finditer(text):
        name = found.group(1)
        parts.append(re.escape(text[last : found.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{groups.get(name, _ANY)})")
        seen.add(name)
        last = found.end()
    return re.compile("".join([*parts, re.escape(text[last:])]), re.IGNORECASE)


def fill_pattern(text: str, groups: Mapping[str, str]) -> str:
    """Put what was found into a pattern."""
    return _GROUP.sub(lambda found: groups[found.group(1)], text)


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe by its name, or from a YAML file.

    Raises:
        ConfigError: there is none, or it contradicts itself.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4) or recipe_names()
        raise ConfigError(
            "no such data set", where=name, allowed=", ".join(close), fix="see `frepa datasets list`"
        )
    return validate(Recipe, read_config(path), where=path)

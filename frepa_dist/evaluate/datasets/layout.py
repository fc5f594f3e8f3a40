"""Finds the images of a data set in a folder, with their masks and labels, as a recipe lays them out."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from frepa_dist.evaluate.datasets.recipe import Part, Recipe, Table, compile_pattern, fill_pattern
from shards.support.errors import DataError

FILES = ("mask", "fov", "mask2")
_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """Something that is not as the recipe says.

    Attributes:
        what: in words.
        fix: how to mend it.
    """

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; to mend it: {self.fix}"


@dataclass(frozen=True)
class Found:
    """An image of the data set.

    Attributes:
        image: path relative to the folder.
        part: of the recipe.
        files: of "mask", "fov" and "mask2" those that are there.
        columns: "label", "split", "patient" and what tables say.
    """

    image: str
    part: str
    files: Mapping[str, str]
    columns: Mapping[str, str]


@dataclass
class Layout:
    """What is in a folder.

    Attributes:
        images: in the order of the recipe's parts, then of their paths.
        problems: what is missing or too much.
        counts: images of each part.
        num_unlabeled: images that no table knows.
    """

    images: list[Found] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    num_unlabeled: int = 0


def read_layout(recipe: Recipe, folder: Path) -> Layout:
    """Compare a folder with a recipe.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=folder, fix=f"get the data set: {recipe.get}")
    paths = {path.casefold(): path for path in _list(folder)}
    layout = Layout()
    taken: dict[str, str] = {}
    for part in recipe.parts:
        _read_part(part, folder, paths, layout, taken)
    if not layout.images:
        at = _guess_root(recipe, paths)
        hint = f"name the folder {folder / at}" if at else "see `frepa datasets show` for the layout"
        layout.problems.insert(0, Problem("no image of the data set is where the recipe says", hint))
    return layout


def _list(folder: Path) -> list[str]:
    """Files below a folder, sorted; hidden ones and what archives of Apple leave behind are left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        place = Path(root).relative_to(folder)
        found += [(place / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _guess_root(recipe: Recipe, paths: Mapping[str, str]) -> str:
    """A subfolder below which the recipe's images lie, empty where there is none."""
    for path in paths.values():
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            rest = "/".join(path.split("/")[depth:])
            if any(part.pattern.fullmatch(rest) for part in recipe.parts):
                return "/".join(parents[:depth])
    return ""


def _read_part(
    part: Part, folder: Path, paths: Mapping[str, str], layout: Layout, taken: dict[str, str]
) -> None:
    matches = {
        path: {name: value or "" for name, value in found.groupdict().items()}
        for path in paths.values()
        if path not in taken and (found := part.pattern.fullmatch(path))
    }
    # a mask may have the form of an image: `{id}.png` and `{id}_mask.png` in one folder
    asides = {
        fill_pattern(getattr(part, name), groups).casefold()
        for groups in matches.values()
        for name in FILES
        if getattr(part, name)
    }
    matches = {path: groups for path, groups in matches.items() if path.casefold() not in asides}
    told = _read_tables(part, folder, paths, matches, layout)
    if part.listed:
        matches = {path: groups for path, groups in matches.items() if path in told}
    taken.update(dict.fromkeys(matches, part.name))
    layout.counts[part.name] = len(matches)
    if part.count is not None and len(matches) != part.count:
        more = "remove what is not of the set" if len(matches) > part.count else "get the rest of the set"
        what = f"{part.name}: {len(matches)} images, the set has {part.count} ({part.images})"
        layout.problems.append(Problem(what, more))
    missing: dict[str, list[str]] = defaultdict(list)
    for path, groups in matches.items():
        files = {}
        known = dict(told.get(path, {}))
        for name in FILES:
            wanted = known.pop(name, "") or fill_pattern(getattr(part, name), groups)
            if wanted:
                if wanted.casefold() in paths:
                    files[name] = paths[wanted.casefold()]
                else:
                    missing[name].append(wanted)
        label = fill_pattern(part.label, groups)
        columns = {
            "label": part.values.get(label, label),
            "split": fill_pattern(part.split, groups).lower(),
            "patient": fill_pattern(part.patient, groups),
            **known,
        }
        layout.images.append(Found(path, part.name, files, columns))
    for name, wanted_files in missing.items():
        shown = ", ".join(wanted_files[:_SHOWN])
        what = f"{part.name}: {len(wanted_files)} files of {name} are missing: {shown}"
        layout.problems.append(Problem(what, "unpack them beside the images"))


def _read_tables(
    part: Part,
    folder: Path,
    paths: Mapping[str, str],
    matches: Mapping[str, Mapping[str, str]],
    layout: Layout,
) -> dict[str, dict[str, str]]:
    """Columns of the part's tables, by path of the image."""
    told: dict[str, dict[str, str]] = defaultdict(dict)
    known = any(table.path.casefold() in paths for table in part.labels)
    for table in part.labels:
        if table.path.casefold() not in paths:
            if table.required:
                what = f"{part.name}: the table {table.path} is missing"
                layout.problems.append(Problem(what, "unpack it where the recipe says"))
            continue
        rows = _read_rows(table, folder / paths[table.path.casefold()], layout)
        _join(part, table, rows, matches, told, layout)
    if part.labels and known and not part.listed:
        unlabeled = [path for path in matches if path not in told]
        layout.num_unlabeled += len(unlabeled)
        if unlabeled:
            what = f"{part.name}: {len(unlabeled)} images are in no table: {', '.join(unlabeled[:_SHOWN])}"
            layout.problems.append(Problem(what, "they get no label; remove them, or correct the table"))
    return told


def _read_rows(table: Table, path: Path, layout: Layout) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    reader = csv.reader(text.splitlines())
    # spaces around the names of columns are common in published tables
    header = [name.strip() for name in next(reader, [])]
    wanted = {theirs for ours, theirs in table.columns.items() if ours not in table.optional}
    if lacking := {table.key, *wanted} - set(header):
        what = f"{table.path} has no column {', '.join(sorted(lacking))}; it has {', '.join(header)}"
        layout.problems.append(Problem(what, "take the table of the original set"))
        return []
    rows = [dict(zip(header, (cell.strip() for cell in row), strict=False)) for row in reader]
    rows = [row for row in rows if row.get(table.key)]  # some end with empty lines
    if table.count is not None and len(rows) != table.count:
        what = f"{table.path} has {len(rows)} rows, that of the set has {table.count}"
        layout.problems.append(Problem(what, "take the table of the original set"))
    return rows


def _join(
    part: Part,
    table: Table,
    rows: list[dict[str, str]],
    matches: Mapping[str, Mapping[str, str]],
    told: dict[str, dict[str, str]],
    layout: Layout,
) -> None:
    pattern = compile_pattern(table.match, part.groups)
    names = [name for name in pattern.groupindex if name in part.pattern.groupindex]
    by_key: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, groups in matches.items():
        if all(groups[name].casefold() == value.casefold() for name, value in table.only.items()):
            by_key[tuple(groups[name].casefold() for name in names)].append(path)
    lost = []
    for row in rows:
        found = pattern.fullmatch(row[table.key])
        places = by_key.get(tuple(found[name].casefold() for name in names), []) if found else []
        if not places:
            lost.append(row[table.key])
        for path in places:
            for ours, theirs in table.columns.items():
                cell = row.get(theirs, "")
                if not cell and ours in table.optional:
                    continue
                told[path][ours] = table.values.get(ours, {}).get(cell, cell)
    if lost:
        what = f"{table.path}: {len(lost)} rows name no image: {', '.join(lost[:_SHOWN])}"
        layout.problems.append(Problem(what, "get the images, or remove the rows"))

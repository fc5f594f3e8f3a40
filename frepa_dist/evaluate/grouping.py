"""Which pictures belong together: no split may part them, and a bootstrap draws them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from frepa_dist.evaluate.pictures import ShardPictures

Units = Literal["images", "patients", "volumes", "patients and volumes"]
"""What a bootstrap draws; images that are equal byte by byte are drawn as one."""


class Groups(NamedTuple):
    """The groups of n pictures.

    Attributes:
        units: what they are.
        names: (n,) that of each picture's group; None where each is one of its own.
    """

    units: Units
    names: list[str] | None


def group_files(patients: Sequence[str] | None, digests: Sequence[str]) -> Groups:
    """Put files of one patient, and equal ones, into one group.

    Args:
        patients: of each file, None where they are not known.
        digests: of the content of each.
    """
    units: Units = "images" if patients is None else "patients"
    if len(set(digests)) == len(digests):
        return Groups(units, None if patients is None else list(patients))
    return Groups(units, unite(patients or _own_names(len(digests)), digests))


def group_samples(pictures: ShardPictures, chosen: Sequence[int]) -> Groups:
    """Put samples of one patient or volume, and those that have pixels in common, into one group.

    Args:
        pictures: all of a dataset: what is not chosen may tie together what is.
        chosen: the n numbers of those that are asked for.
    """
    patients, volumes = pictures.patients, pictures.volumes
    has_patients = any(patients[i] for i in chosen)
    has_volumes = any(volumes[i] and not patients[i] for i in chosen)
    units: Units = "volumes" if has_volumes else "patients"
    if has_patients and has_volumes:
        units = "patients and volumes"
    patients = [*patients, *(one.patient for one in pictures.repeats)]
    volumes = [*volumes, *(one.volume for one in pictures.repeats)]
    pixels = [*pictures.names, *(one.original for one in pictures.repeats)]
    names = [a or b or c for a, b, c in zip(patients, volumes, _own_names(len(pixels)), strict=True)]
    groups = unite(names, volumes, pixels)
    found = [groups[i] for i in chosen]
    if not has_patients and not has_volumes and len(set(found)) == len(found):
        return Groups("images", None)
    return Groups(units, found)


def _own_names(num: int) -> list[str]:
    return [f"(row {number})" for number in range(num)]


def unite(names: Sequence[str], *links: Sequence[str | None]) -> list[str]:
    """Put rows of one name into one group, and rows with a link in common, over any others.

    Args:
        names: of what each of n rows shows, such as its patient.
        links: more columns, each (n,), None where a row has no such link: its volume, a hash of its content.

    Returns:
        The name of each row's group, which is the least of those of its rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[tuple[int, str], int] = {}
    ends = [
        (row, len(names) + numbers.setdefault((kind, name), len(numbers)))
        for kind, column in enumerate((names, *links))
        for row, name in enumerate(column)
        if name is not None
    ]
    num = len(names) + len(numbers)
    graph = coo_array(([1] * len(ends), tuple(zip(*ends, strict=True))), shape=(num, num))
    found = connected_components(graph, directed=False)[1][: len(names)].tolist()
    least: dict[int, str] = {}
    for group, name in zip(found, names, strict=True):
        least[group] = min(name, least.get(group, name))
    return [least[group] for group in found]

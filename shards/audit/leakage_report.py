"""What a search for leakage found, and how far it looked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import Field

from shards.audit.leakage_index import NEAR_BITS, Kind
from shards.audit.patterns import SAME
from shards.support.errors import DataError
from shards.support.settings import Settings

KINDS: Mapping[Kind, str] = {
    "bytes": "same bytes",
    "pixels": "same pixels",
    "near": "near duplicate",
    "patient": "same patient",
}

_LISTED = 20


class Leak(Settings):
    """An image of the evaluation that is in the dataset.

    Attributes:
        file: of the image.
        unit: number in the file: slice, frame or page.
        kind: in what way.
        num_samples: samples of the dataset that it fits; the rest is of the first or best of them.
        key, shard, row: of the sample.
        correlation: of the patterns, for near duplicates.
        how: in what the copy differs, as far as the comparison tells.
    """

    file: str
    unit: int
    kind: Kind
    num_samples: int
    key: str
    shard: str
    row: int
    correlation: float | None = None
    how: str = ""

    def describe(self, *, with_file: bool = True) -> str:
        """One line; the name of a file may name a patient."""
        unit = f", unit {self.unit}" if self.unit else ""
        more = f" and {self.num_samples - 1} more" if self.num_samples > 1 else ""
        fit = f", correlation {self.correlation:.2f}" if self.correlation is not None else ""
        how = f", {self.how}" if self.how else ""
        file = f"{self.file}{unit}  " if with_file else ""
        return f"{KINDS[self.kind]:<14}  {file}sample {self.key}{more}{fit}{how}"


class LeakageReport(Settings):
    """What was looked for, how far, and what was found.

    Attributes:
        dataset, snapshot: where the pretraining data are.
        images: where the evaluation's are.
        modalities: of the dataset that were searched.
        unit: what the evaluation consists of: "files", or "samples" of another dataset.
        num_files, num_images: of the evaluation; a file may hold several images.
        unreadable: files that could not be read, with the reason; nothing is known of them.
        num_plain: images with so little structure of their own that near duplicates cannot be told.
        num_samples: of the dataset that were searched.
        num_near: those whose hash is near; `num_compared` of them were read and compared.
        near_bits, least_correlation: what counts as near and as a copy.
        not_checked: kinds that were looked for in part or not at all, and why.
        found: the leaks, each image once for each kind.
    """

    dataset: str
    snapshot: str
    images: str
    modalities: tuple[str, ...]
    unit: str = "files"
    num_files: int
    num_images: int
    unreadable: dict[str, str]
    num_plain: int
    num_samples: int
    num_near: int
    num_compared: int
    near_bits: int = NEAR_BITS
    least_correlation: float = SAME
    not_checked: dict[Kind, str] = Field(default_factory=dict)
    found: list[Leak] = Field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Files with a leak of any kind."""
        return sorted({leak.file for leak in self.found})

    def summary(self) -> str:
        """One sentence."""
        where = f"{self.num_samples} pretraining samples (snapshot {self.snapshot})"
        if not self.found:
            return f"none of {self.num_files} {self.unit} found among {where}{self._limits()}"
        counts = ", ".join(f"{KINDS[kind]} {self.num_files_of(kind)}" for kind in self.kinds)
        found = f"{len(self.files)} of {self.num_files} {self.unit} found among {where}"
        return f"{found}: {counts}{self._limits()}"

    @property
    def kinds(self) -> list[Kind]:
        """Kinds that were found."""
        return [kind for kind in KINDS if self.num_files_of(kind)]

    def num_files_of(self, kind: Kind) -> int:
        """Files with a leak of a kind."""
        return len({leak.file for leak in self.found if leak.kind == kind})

    def _limits(self) -> str:
        parts = [f"{KINDS[kind]} {why}" for kind, why in self.not_checked.items()]
        if self.unreadable:
            parts.append(f"{len(self.unreadable)} {self.unit} unreadable")
        if self.num_plain:
            parts.append(f"{self.num_plain} images too plain to tell near duplicates")
        return f"; {'; '.join(parts)}" if parts else ""

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [
            f"{self.dataset}: snapshot {self.snapshot}, {self.num_samples} samples",
            f"{self.images}: {self.num_files} {self.unit}, {self.num_images} images",
            f"{self.num_samples} hashes searched, {self.num_near} near, {self.num_compared} compared",
        ]
        for kind, name in KINDS.items():
            why = f"  {self.not_checked[kind]}" if kind in self.not_checked else ""
            lines.append(f"  {name:<14}  {self.num_files_of(kind):>6} {self.unit}{why}")
        lines += [f"  {leak.describe()}" for leak in self.found[:_LISTED]]
        if len(self.found) > _LISTED:
            lines.append(f"  and {len(self.found) - _LISTED} more")
        return [*lines, f"leakage: {self.summary()}"]

    def check(self) -> None:
        """Raise when there is a leak.

        Raises:
            DataError: names the first and counts the others.
        """
        if self.found:
            raise leakage_error(self.summary(), self.images, self.found[0].describe())


def merge_reports(reports: Iterable[LeakageReport]) -> LeakageReport:
    """Put together what was found of the parts of an evaluation."""
    first, *others = reports
    total = first.model_dump()
    for other in others:
        for name in ("num_files", "num_images", "num_plain", "num_near", "num_compared"):
            total[name] += getattr(other, name)
        total["unreadable"] |= other.unreadable
        total["not_checked"] |= other.not_checked
        total["found"] += other.found
    return LeakageReport.model_validate(total)


def leakage_error(summary: str, where: object, first: str) -> DataError:
    """The error that refuses an evaluation."""
    return DataError(
        f"images of pretraining: {summary}; the first: {' '.join(first.split())}",
        where=where,
        fix="evaluate on other images, leave these out (`frepa evaluate leakage` lists them), or say "
        "--allow-leakage (of a suite: --set allow_leakage=true)",
    )

"""What a build did, or would do, in numbers and in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shards.schema import Counts

ASSUMED_RATE = 100.0
"""Images per second and core where none was measured: PNG and resizing of photographs take most."""


@dataclass(frozen=True)
class SourceChange:
    """How the objects of a source compare with what was planned of it before.

    Attributes:
        num_new: objects of new names.
        num_known: objects that are as they were published.
        num_changed: objects of known names and other content: they replace the old ones.
        num_vanished: planned objects that are there no more: their samples stay.
        num_retried: objects that are tried again, or step in for one that they repeated.
        num_repeated: objects that a further source named again.
    """

    num_new: int
    num_known: int
    num_changed: int
    num_vanished: int
    num_retried: int
    num_repeated: int

    def lines(self) -> Iterator[str]:
        """For people."""
        vanished = f", {self.num_vanished} vanished (their samples stay)" if self.num_vanished else ""
        changed = f", {self.num_changed} changed" if self.num_changed else ""
        yield f"  objects: {self.num_new} new, {self.num_known} known{changed}{vanished}"
        if self.num_retried:
            yield f"  tried again: {self.num_retried} objects"
        if self.num_repeated:
            yield f"  named by several sources, taken once: {self.num_repeated}"


@dataclass(frozen=True)
class BuildReport:
    """What became of a source.

    Attributes:
        place: the destination.
        snapshot: hash of the dataset's snapshot.
        counts: the accounting of this source.
        quarantined: units by reason.
        excluded: units by reason.
        num_shards: of this source; `num_reused` of them had been committed before.
        num_reused: likewise.
        num_bytes: of all shards of this source that hold samples.
        bytes_written: of the tars that were written now.
        change: what is new of the source.
    """

    place: str
    snapshot: str
    counts: Counts
    quarantined: Mapping[str, int]
    excluded: Mapping[str, int]
    num_shards: int
    num_reused: int
    num_bytes: int
    bytes_written: int
    change: SourceChange

    def lines(self) -> Iterator[str]:
        """For people."""
        counts = ", ".join(f"{number} {name}" for name, number in self.counts.model_dump().items())
        yield f"{self.place}: {counts}"
        yield from self.change.lines()
        yield from _reason_lines(self.quarantined, self.excluded)
        reused = f" ({self.num_reused} were there)" if self.num_reused else ""
        yield (
            f"  {self.num_shards} shards{reused}, {self.num_bytes / 1e6:.1f} MB,"
            f" {self.bytes_written / 1e6:.1f} MB written, snapshot {self.snapshot}"
        )


@dataclass(frozen=True)
class PlanReport:
    """What a build would do.

    Attributes:
        place: the destination.
        change: what is new of the source.
        num_objects: that must be read: units of known ones are there already.
        units: to be made samples, by format.
        duplicates: units that repeat the bytes of others.
        quarantined: units by reason, as far as headers tell.
        excluded: units by reason.
        num_shards: to be written.
        num_bytes: of them, an estimate.
        rate: images per second and core.
        is_measured: whether the rate was measured by the last build with this state folder, or is assumed.
        jobs: worker processes.
    """

    place: str
    change: SourceChange
    num_objects: int
    units: Mapping[str, int]
    duplicates: int
    quarantined: Mapping[str, int]
    excluded: Mapping[str, int]
    num_shards: int
    num_bytes: int
    rate: float
    is_measured: bool
    jobs: int

    @property
    def num_units(self) -> int:
        """Units to be made samples."""
        return sum(self.units.values())

    @property
    def seconds(self) -> float:
        """How long the shards would take."""
        return self.num_units / (self.rate * self.jobs)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.place}: plan only, nothing is written there"
        yield from self.change.lines()
        formats = ", ".join(f"{name} {number}" for name, number in sorted(self.units.items())) or "none"
        yield f"  {self.num_units} units of {self.num_objects} objects to be built: {formats}"
        if self.duplicates:
            yield f"  duplicates: {self.duplicates} units of the same bytes"
        yield from _reason_lines(self.quarantined, self.excluded)
        known = "measured by the last build" if self.is_measured else "an assumption"
        yield (
            f"  {self.num_shards} shards, about {self.num_bytes / 1e6:.1f} MB and {_duration(self.seconds)},"
            f" at {self.rate:.0f} images/s/core ({known}) with {self.jobs} jobs"
        )


def _reason_lines(quarantined: Mapping[str, int], excluded: Mapping[str, int]) -> Iterator[str]:
    for kind, reasons in (("quarantined", quarantined), ("excluded", excluded)):
        for reason, number in sorted(reasons.items()):
            yield f"  {kind} {reason}: {number}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""What an audit finds: problems, remarks, and the report of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from shards.support.errors import DataError

MAX_LISTED = 200
"""Problems of one kind that a report lists; more are counted: a million bad samples need no million lines."""

KINDS = MappingProxyType(
    {
        "snapshot": "the pointer or a snapshot is missing, damaged or contradicts itself",
        "table": "a table of the snapshot is missing or damaged",
        "accounting": "units do not add up",
        "missing_file": "a shard, an index or an HF version is missing",
        "file_size": "a tar has another size than the snapshot says",
        "index": "an index is not the one of the snapshot, or of another format",
        "member_outside": "an index names bytes outside its tar",
        "member_overlap": "members of an index overlap",
        "member_gap": "an index leaves bytes of its tar out",
        "duplicate_key": "a key names two samples",
        "exclusion": "the duplicates table names a sample that does not exist",
        "hf_version": "an HF version that the snapshot does not define",
        "hf_keys": "an HF version of other samples",
        "tar_bytes": "deep: the checksum of a tar differs",
        "truncated": "deep: a tar ends too early",
        "tar_header": "deep: a header is damaged",
        "tar_end": "deep: a tar has no end",
        "early_end": "deep: a plain tar reader stops in the middle",
        "foreign_bytes": "deep: bytes that belong to no member",
        "foreign_member": "deep: a member that the index does not name",
        "member_name": "deep: a member's name is unsafe, or not that of its sample",
        "member_type": "deep: a member is a link, a device or a folder",
        "member_size": "deep: a header and the index give different sizes",
        "member_bytes": "deep: a member's checksum differs",
        "image": "deep: an image cannot be decoded, or to another shape or type",
        "pixel_hash": "deep: an image decodes to other pixels",
        "hf": "deep: HF tokens or map are not those of the pixels",
        "json": "deep: KEY.json cannot be parsed or contradicts the index",
    }
)
"""Kinds of problems."""

REMARKS = MappingProxyType(
    {
        "unnamed_file": "no snapshot names this file",
        "hf_incomplete": "an HF version lacks some shards",
        "hf_unknown": "HF parameters of another version of frepa: tokens cannot be compared",
        "hf_rounded": "HF members agree within rounding, but not byte for byte",
    }
)
"""Kinds of remarks: nothing is broken."""


class Problem(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        kind: a stable name, of `KINDS` or `REMARKS`.
        where: the file, relative to the dataset.
        key: of the sample that it concerns, "" where it concerns none or many.
        what: in words.
        fix: how to mend it.
    """

    kind: str
    where: str
    key: str
    what: str
    fix: str

    def __str__(self) -> str:
        sample = f", sample {self.key}" if self.key else ""
        fix = f"; to mend it: {self.fix}" if self.fix else ""
        return f"{self.kind}: {self.where}{sample}: {self.what}{fix}"


@dataclass
class Findings:
    """Collects problems: all are counted, the first `limit` of each kind are kept."""

    limit: int = MAX_LISTED
    listed: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, where: str, what: str, *, key: str = "", fix: str = "") -> None:
        """Count a problem, and list it while few of its kind are listed."""
        assert kind in KINDS or kind in REMARKS, kind
        self.counts[kind] += 1
        if self.counts[kind] <= self.limit:
            self.listed.append(Problem(kind, where, key, what, fix))

    def extend(self, other: Findings) -> None:
        """Take over what was found elsewhere."""
        before = Counter(problem.kind for problem in self.listed)
        for problem in other.listed:
            before[problem.kind] += 1
            if before[problem.kind] <= self.limit:
                self.listed.append(problem)
        self.counts += other.counts


@dataclass(frozen=True)
class VerifyReport:
    """What an audit found.

    Attributes:
        place: the dataset.
        snapshot: hash of what was audited, "" when it could not be read.
        is_deep: whether the tars were read.
        num_shards: audited.
        num_samples: likewise.
        num_bytes: of their tars.
        problems: the first ones of each kind; `counts` has all.
        counts: problems by kind (`KINDS`).
        remarks: what is odd but not wrong.
        remark_counts: remarks by kind (`REMARKS`).
    """

    place: str
    snapshot: str
    is_deep: bool
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    problems: tuple[Problem, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    remarks: tuple[Problem, ...] = ()
    remark_counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.counts

    def lines(self) -> list[str]:
        """The report as text."""
        how = "every byte read" if self.is_deep else "without reading the tars"
        lines = [
            f"{self.place}: snapshot {self.snapshot or 'unreadable'}, {self.num_shards} shards, "
            f"{self.num_samples} samples, {self.num_bytes / 1e6:.1f} MB, {how}"
        ]
        for title, listed, counts in (
            ("problems", self.problems, self.counts),
            ("remarks", self.remarks, self.remark_counts),
        ):
            lines += [f"  {problem}" for problem in listed]
            num_more = sum(counts.values()) - len(listed)
            if num_more:
                lines.append(f"  and {num_more} more {title}")
            if counts:
                by_kind = ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
                lines.append(f"{sum(counts.values())} {title}: {by_kind}")
        return [*lines, "no problem found" if self.ok else "this dataset is damaged"]

    def check(self) -> None:
        """Raise when there is a problem.

        Raises:
            DataError: names the first problem and counts the others.
        """
        if not self.ok:
            raise DataError(
                f"{sum(self.counts.values())} problems, the first one: {self.problems[0]}", where=self.place
            )

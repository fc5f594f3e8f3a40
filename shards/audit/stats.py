"""What a dataset holds, per modality: sizes, grey levels, labels, where the HF tokens lie, what was left out.

Counts are of all samples, from the indices; what needs pixels is measured on a seeded sample of images.
Nothing that names a patient or a file enters: labels are those that the build was told to store.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from shards.audit.stats_shard import MAX_LABEL_VALUES, ShardStats, StatsTask, measure_shard
from shards.dataset import load_snapshot, read_table
from shards.hf.draw import KEEP
from shards.hf.tokens import HFParams
from shards.schema import Counts, ShardInfo, Snapshot
from shards.stores.store import Store, open_store
from shards.support.progress import Progress
from shards.workers.pool import available_cores, run_tasks

PERCENTILES = (0, 5, 50, 95, 100)
NUM_SHOWN = 6
"""Images of a modality that are kept to be looked at."""

MAX_CLASSES = 20
"""Values of a label that are listed, the most frequent ones."""


@dataclass
class ModalityStats:
    """One modality of a dataset.

    Attributes:
        name: of the modality.
        num_shards: its shards.
        num_samples: in them.
        num_bytes: of its tars.
        num_skipped: samples that no reader sees, since they repeat others or were replaced.
        sources: samples in shards, by source.
        left_out: units by what became of them, "quarantined truncated" or "duplicate bytes".
        hf_digest: of the tokens in the tars.
        measured: sums over its shards, and over the images that were looked into.
    """

    name: str
    num_shards: int
    num_samples: int
    num_bytes: int
    num_skipped: int
    sources: dict[str, int]
    left_out: dict[str, int]
    hf_digest: str
    measured: ShardStats = field(repr=False)

    def percentiles(self, side: str) -> list[int]:
        """Sizes in pixels at `PERCENTILES` of the samples, for example of the "stored short side"."""
        counts = self.measured.sides[side]
        values = np.array(sorted(counts))
        ends = np.cumsum([counts[int(value)] for value in values])
        places = np.minimum(ends[-1] - 1, np.array(PERCENTILES) / 100 * ends[-1])
        return [int(value) for value in values[np.searchsorted(ends, places, side="right")]]

    def classes(self, label: str) -> list[tuple[str, int]]:
        """Values of a label with their numbers of samples, the most frequent ones; of an id, none."""
        counts = self.measured.labels[label]
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return ordered[:MAX_CLASSES] if len(counts) <= MAX_LABEL_VALUES else []

    def hf_facts(self) -> list[tuple[str, str]]:
        """What the measured images say of the HF tokens, in words."""
        measured = self.measured
        if not measured.ring_tokens:
            return []
        facts = []
        if measured.energy:
            low, middle, high = np.percentile(measured.energy, (5, 50, 95))
            facts.append(
                (
                    f"squared response in the kept {KEEP:.0%} of the patches",
                    f"{middle:.0%} (5 % to 95 % of the images: {low:.0%} to {high:.0%})",
                )
            )
        tokens, patches = np.mean(measured.ring_tokens), np.mean(measured.ring_patches)
        facts.append(("kept tokens in the outermost ring", f"{tokens:.0%}, of all patches {patches:.0%}"))
        return facts


@dataclass
class Stats:
    """A dataset.

    Attributes:
        place: where it is.
        snapshot: hash of what was looked at.
        created_by: the program that wrote it.
        size: short side of the canonical images, in pixels; smaller ones stay.
        patch_size: of the HF tokens, in pixels.
        counts: the accounting.
        modalities: by name.
        num_images: looked into at most, per modality.
        seed: drew them.
    """

    place: str
    snapshot: str
    created_by: str
    size: int
    patch_size: int
    counts: Counts
    modalities: list[ModalityStats]
    num_images: int
    seed: int

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows: one of each modality."""
        columns = [
            "modality",
            "samples",
            "skipped",
            "shards",
            "MB",
            "short side",
            "source short side",
            "stored as",
        ]
        rows: list[list[object]] = []
        for item in self.modalities:
            sides = []
            for side in ("stored short side", "source short side"):
                low, _, middle, _, high = item.percentiles(side)
                sides.append(str(low) if low == high else f"{low} - {middle} - {high}")
            kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(item.measured.kinds.items()))
            size = round(item.num_bytes / 1e6, 1)
            rows.append([item.name, item.num_samples, item.num_skipped, item.num_shards, size, *sides, kinds])
        return columns, rows

    def lines(self) -> list[str]:
        """The statistics as text for a terminal."""
        columns, rows = self.table()
        cells = [columns, *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
        aligned = [
            "  ".join(
                cell.rjust(width) if 1 <= column <= 4 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        counts = ", ".join(f"{number} {name}" for name, number in self.counts)
        about = f"{self.place}: snapshot {self.snapshot}, written by {self.created_by}"
        lines = [f"{about}; sides in pixels: smallest - median - largest", *aligned]
        for item in self.modalities:
            lines.append(f"{item.name}: HF definition {item.hf_digest}")
            lines += [f"  source {name}: {number} samples" for name, number in item.sources.items()]
            lines += [f"  {what}: {number}" for what, number in item.left_out.items()]
            for label in sorted(item.measured.labels):
                listed = ", ".join(f"{value} {number}" for value, number in item.classes(label))
                lines.append(f"  label {label}: {listed or f'more than {MAX_LABEL_VALUES} values'}")
            lines += [f"  {what}: {value}" for what, value in item.hf_facts()]
        return [*lines, f"together: {counts}"]


def dataset_stats(
    place: Store | Path | str, *, num: int = 200, seed: int = 0, num_shown: int = NUM_SHOWN, jobs: int = 0
) -> Stats:
    """Look at the current snapshot of a dataset.

    Args:
        place: a folder, or s3://bucket/prefix.
        num: images of each modality to look into; 0 for none, so that no tar is read.
        seed: draws them.
        num_shown: of them kept to be looked at.
        jobs: worker processes, 0 for one per available core; it changes nothing but the time.

    Raises:
        DataError: there is no dataset, or a part of it is missing or damaged.
        EnvironmentFault: the place cannot be reached.
    """
    store = open_store(place)
    snapshot = load_snapshot(store)
    duplicates = read_table(store, snapshot, "duplicates")
    quarantine = read_table(store, snapshot, "quarantine")
    tasks = list(_make_tasks(store, snapshot, duplicates, num, seed, num_shown))
    # a process takes a second to start
    useful = sum(len(task.rows) for task in tasks) // 100 + len(tasks) // 64 + 1
    results: dict[str, ShardStats] = {}
    with Progress(len(tasks), "stats", unit="shard") as progress:
        jobs = max(1, min(jobs or min(available_cores(), useful), len(tasks)))
        for path, result in run_tasks(_measure, tasks, jobs):
            results[path] = result
            progress.update()
    return Stats(
        place=store.uri,
        snapshot=snapshot.hash,
        created_by=snapshot.created_by,
        size=snapshot.size,
        patch_size=snapshot.patch_size,
        counts=snapshot.counts,
        modalities=_sum_up(snapshot, results, quarantine, duplicates),
        num_images=num,
        seed=seed,
    )


def write_stats_page(stats: Stats, out_html: Path | str) -> None:
    """Write statistics as one HTML page with plots and images.

    Raises:
        EnvironmentFault: the page cannot be written.
    """
    from shards.audit.stats_page import make_page  # Matplotlib takes .5 s to import

    make_page(stats).write(out_html)


def _sum_up(
    snapshot: Snapshot, results: dict[str, ShardStats], quarantine: pa.Table, duplicates: pa.Table
) -> list[ModalityStats]:
    """Add the shards of each modality up."""
    skipped = Counter(duplicates.filter(pc.is_valid(duplicates["shard"]))["modality"].to_pylist())
    left_out = _count_left_out(quarantine, duplicates)
    modalities = []
    for name in snapshot.modalities:
        shards = [shard for shard in snapshot.shards if shard.modality == name]
        measured, sources = ShardStats(name), Counter[str]()
        for shard in shards:  # in the order of the snapshot, however the workers ended
            measured.add(results[shard.path])
            sources[shard.source] += shard.num_samples
        modalities.append(
            ModalityStats(
                name=name,
                num_shards=len(shards),
                num_samples=sum(shard.num_samples for shard in shards),
                num_bytes=sum(shard.num_bytes for shard in shards),
                num_skipped=skipped[name],
                sources=dict(sources),
                left_out=left_out[name],
                hf_digest=snapshot.hf_digests[name],
                measured=measured,
            )
        )
    return modalities


def _measure(task: StatsTask) -> tuple[str, ShardStats]:
    return task.shard.path, measure_shard(task)


def _make_tasks(
    store: Store, snapshot: Snapshot, duplicates: pa.Table, num: int, seed: int, num_shown: int
) -> Iterator[StatsTask]:
    """Draw the samples of each modality, each as likely as any other, and none that readers do not see."""
    excluded: dict[str, list[int]] = defaultdict(list)
    for path, row in zip(duplicates["shard"].to_pylist(), duplicates["row"].to_pylist(), strict=True):
        if path is not None:
            excluded[path].append(row)
    for modality in snapshot.modalities:
        shards = [shard for shard in snapshot.shards if shard.modality == modality]
        chosen = _choose(shards, excluded, num, np.random.default_rng([seed, *modality.encode()]))
        shown: dict[str, set[int]] = defaultdict(set)
        rows: dict[str, list[int]] = defaultdict(list)
        for number, (path, row) in enumerate(chosen):
            rows[path].append(row)
            if number < num_shown:
                shown[path].add(row)
        for shard in shards:
            yield StatsTask(
                store=store,
                shard=shard,
                rows=sorted(rows[shard.path]),
                shown=frozenset(shown[shard.path]),
                hf=_known_params(snapshot, modality),
                patch_size=snapshot.patch_size,
            )


def _choose(
    shards: list[ShardInfo], excluded: dict[str, list[int]], num: int, generator: np.random.Generator
) -> list[tuple[str, int]]:
    """Draw samples without repetition, in random order."""
    ends = np.cumsum([shard.num_samples for shard in shards])
    total = int(ends[-1])
    # as many more as are excluded at most, so that enough are left
    num_drawn = min(total, num + sum(len(excluded.get(shard.path, ())) for shard in shards))
    chosen = []
    for number in generator.choice(total, num_drawn, replace=False).tolist() if num else []:
        place = int(np.searchsorted(ends, number, side="right"))
        path, row = shards[place].path, number - int(ends[place]) + shards[place].num_samples
        if row not in excluded.get(path, ()):
            chosen.append((path, row))
    return chosen[:num]


def _known_params(snapshot: Snapshot, modality: str) -> HFParams | None:
    """HF parameters of a modality, None where this program would compute other tokens."""
    try:
        params = HFParams.model_validate(snapshot.hf[modality])
    except ValidationError:
        return None
    return params if params.digest() == snapshot.hf_digests[modality] else None


def _count_left_out(quarantine: pa.Table, duplicates: pa.Table) -> dict[str, dict[str, int]]:
    """Units that are no samples, by modality and what became of them."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for modality, status, reason in zip(
        *(quarantine[name].to_pylist() for name in ("modality", "status", "reason")), strict=True
    ):
        counts[modality][f"{status} {reason}"] += 1
    for modality, kind in zip(*(duplicates[name].to_pylist() for name in ("modality", "kind")), strict=True):
        counts[modality][f"duplicate {kind}"] += 1
    return defaultdict(dict, {name: dict(sorted(own.items())) for name, own in counts.items()})

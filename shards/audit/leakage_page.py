"""The page about leakage: each pair side by side. It shows patients' images and is for local use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.audit.evaluated import EvaluatedTask, preview, readings_of
from shards.audit.leakage_report import KINDS, Leak, LeakageReport
from shards.audit.stored import read_samples
from shards.dataset import load_snapshot
from shards.hf.draw import fit
from shards.read.windows import to_bytes
from shards.stores.store import open_store
from shards.support.page import Page

MOST_PAIRS = 100  # of each kind that are shown
_SIDE = 256


def write_leakage_page(report: LeakageReport, images: Path, out: Path) -> None:
    """Write the page.

    Args:
        report: what was found.
        images: folder that its file names are relative to.
        out: the page.

    Raises:
        DataError: a sample of the dataset is damaged.
        EnvironmentFault: the dataset cannot be reached, or the page cannot be written.
    """
    page = Page("Leakage", f"{report.images} in {report.dataset}, snapshot {report.snapshot}")
    page.note(
        "This page holds images of the evaluation and of the pretraining data: keep it where they may be."
    )
    page.text(report.summary() + ".")
    rows = [
        [
            name,
            len({leak.file for leak in report.found if leak.kind == kind}),
            report.not_checked.get(kind, ""),
        ]
        for kind, name in KINDS.items()
    ]
    page.table(["kind", "files", "limits"], rows)
    page.text(
        f"Near: hashes that differ in at most {report.near_bits} of 64 bits ({report.num_near} samples, "
        f"{report.num_compared} compared), and patterns that correlate by {report.least_correlation} or more."
    )
    if report.unreadable:
        page.table(["not read", "why"], [list(item) for item in report.unreadable.items()])
    for kind, name in KINDS.items():
        found = [leak for leak in report.found if leak.kind == kind]
        if found:
            page.heading(name.capitalize())
            page.gallery(_pairs(report, images, found[:MOST_PAIRS]), columns=4)
            if len(found) > MOST_PAIRS:
                page.text(f"and {len(found) - MOST_PAIRS} more")
    page.write(out)


def _pairs(report: LeakageReport, images: Path, leaks: Sequence[Leak]) -> list[tuple[np.ndarray, str]]:
    store = open_store(report.dataset)
    snapshot = load_snapshot(store, report.snapshot)
    shards = {shard.path: shard for shard in snapshot.shards}
    reading = readings_of(snapshot, report.modalities)[0]
    items = []
    for leak in leaks:
        path = images / leak.file
        given = preview(EvaluatedTask([(str(path), 0)], [reading]), leak.unit)
        ((key, stored),) = read_samples(store, shards[leak.shard], np.array([leak.row]))
        fits = "" if leak.correlation is None else f", correlation {leak.correlation:.2f}"
        more = f", and {leak.num_samples - 1} more" if leak.num_samples > 1 else ""
        items.append((fit(to_bytes(given), _SIDE), leak.file + (f", unit {leak.unit}" if leak.unit else "")))
        items.append((fit(to_bytes(stored), _SIDE), ", ".join(filter(None, (key, leak.how))) + fits + more))
    return items

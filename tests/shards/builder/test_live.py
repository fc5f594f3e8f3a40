"""The metrics of a build, scraped while it runs; test_build_ray.py does so on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards.builder import build as build_module
from shards.builder.report import BuildReport
from shards.support.metrics import METRICS
from shards.support.targets import unique_label
from tests.scraping import Samples, scrape
from tests.shards.building import build
from tests.shards.images import write_images


def build_and_scrape(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[BuildReport, Samples, dict[str, str]]:
    """Build; also what was shown, and the target's labels, when all shards were written."""
    targets, seen = dest.with_name("targets"), []
    publish = build_module.publish_part

    def scrape_and_publish(*arguments):
        (path,) = targets.glob("*.json")
        (group,) = json.loads(path.read_text())
        seen.append((scrape(int(group["targets"][0].rpartition(":")[2])), group["labels"]))
        return publish(*arguments)

    monkeypatch.setattr(build_module, "publish_part", scrape_and_publish)
    report = build(source, dest, metrics={"port": 0, "targets": targets}, **options)
    monkeypatch.setattr(build_module, "publish_part", publish)
    assert not list(targets.iterdir())
    ((samples, labels),) = seen
    return report, samples, labels


def assert_reported(found: Samples, report: BuildReport) -> None:
    outcomes = {key[1]: value for key, value in found.items() if key[0] == "frepa_build_units_total"}
    assert outcomes == {
        "sample": report.counts.samples,
        "duplicate": report.counts.duplicates,
        "excluded": report.counts.excluded,
        "quarantined": report.counts.quarantined,
    }
    assert found["frepa_build_shards_total",] == found["frepa_build_planned_shards",] == report.num_shards
    assert found["frepa_build_bytes_written_total",] == report.bytes_written > 0
    assert {name for name, *_ in found} == {metric.name for metric in METRICS if metric.exporter == "build"}


def test_what_is_scraped_is_what_the_report_says(tmp_path, monkeypatch):
    source = write_images(tmp_path / "source", [f"{number:02d}.png" for number in range(40)])
    whole = (source / "00.png").read_bytes()
    (source / "copy.png").write_bytes(whole)
    (source / "torn.png").write_bytes(whole[: len(whole) // 2])
    (source / "empty.png").write_bytes(b"")
    report, found, labels = build_and_scrape(source, tmp_path / "data", monkeypatch, shard_bytes=1)
    counts = report.counts
    assert (counts.samples, counts.duplicates, counts.quarantined) == (40, 1, 2)
    assert report.num_shards > 1
    assert_reported(found, report)
    run = unique_label(tmp_path / "data")
    assert labels == {"job": "frepa_build", "run": run, "source": "fundus-images"}

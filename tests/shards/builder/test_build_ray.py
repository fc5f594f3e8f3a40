"""The same build on Ray gives the same bytes as on the local pool."""

from __future__ import annotations

import pytest

import shards.builder.scan
from tests.shards.builder.test_live import assert_reported, build_and_scrape
from tests.shards.building import build
from tests.shards.images import read_tree, write_images

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def test_ray_gives_the_same_bytes(tmp_path, monkeypatch):
    source = write_images(tmp_path / "source", [f"{number:02d}.png" for number in range(70)])
    here = build(source, tmp_path / "here")
    monkeypatch.setattr(shards.builder.scan, "_MIN_POOL_OBJECTS", 10)  # the plan runs there, too
    there, found, _ = build_and_scrape(source, tmp_path / "there", monkeypatch, executor="ray", jobs=2)
    assert_reported(found, there)
    assert there.snapshot == here.snapshot
    assert read_tree(tmp_path / "there") == read_tree(tmp_path / "here")

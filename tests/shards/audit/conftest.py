"""A whole dataset, written once, and a copy of it for each test to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.shards.whole import write_whole


@pytest.fixture(scope="session", name="whole_dataset")
def _whole_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_whole(folder := tmp_path_factory.mktemp("whole") / "root")
    return folder


@pytest.fixture
def root(whole_dataset: Path, tmp_path: Path) -> Path:
    """The dataset's copy of one test."""
    return shutil.copytree(whole_dataset, tmp_path / "root")

"""The dataset that the tests of the loader read."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session", name="stream_root")
def _stream_root(tmp_path_factory, write_dataset) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, {"fundus": [9, 14, 11], "xray": [12]}, duplicates=(4, 20))
    return folder

"""`frepa pretrain --dry-run` takes two real steps and leaves nothing."""

from __future__ import annotations

import re
import tempfile

import pytest

from tests.commands import frepa
from tests.shards.building import build
from tests.shards.images import write_images


@pytest.mark.distributed
def test_two_steps_are_taken_and_nothing_is_left(tmp_path, monkeypatch):
    build(write_images(tmp_path / "images", [f"{number}.png" for number in range(12)]), tmp_path / "root")
    settings = {
        "data.root": tmp_path / "root",
        "output": tmp_path / "run",
        "method.model.image_size": 32,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.steps": "null",
        "train.epochs": 50,
        "train.checkpoint_copy": tmp_path / "copy",
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    done = frepa("pretrain", "--dry-run", "--config", "demo/mae", *sets, "--num-ranks", 1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 steps taken: loss \d.*; 150 steps would take \d+\.\d hours", done.stdout), (
        done.stdout
    )
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "copy").exists()
    assert not list((tmp_path / "tmp").glob("frepa-rehearsal-*"))

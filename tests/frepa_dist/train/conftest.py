"""A dataset and undisturbed runs on it, made once for all files and processes of a session of tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.builder.build import BuildConfig, build_dataset
from tests.frepa_dist.train.started_runs import arguments, frepa

NUM_IMAGES = 27  # batches of 8: three an epoch, three samples left over


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder of this name by a function, or wait until another process has made it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # of one of several processes
        base = base.parent

    def make_once(name: str, make: Callable[[Path], None]) -> Path:
        done = base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(base / name)
                done.touch()
        return base / name

    return make_once


@pytest.fixture(scope="session")
def dataset(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return once("trained", build_images) / "shards"


def build_images(folder: Path) -> None:
    images, rng = folder / "images", np.random.default_rng(0)
    images.mkdir(parents=True)
    for number in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((72, 72))
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 20, (72, 72, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / f"{number}.png")
    build_dataset([images], folder / "shards", BuildConfig(modality="fundus", size=72, jobs=1))


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def uninterrupted(
    request: pytest.FixtureRequest, dataset: Path, once: Callable[[str, Callable[[Path], None]], Path]
) -> tuple[str, Path]:
    """Precision and folder of a run of `STEPS` steps; nothing may be changed in it."""

    def train(run: Path) -> None:
        result = frepa(*arguments(dataset, run, **{"train.precision": request.param}))
        assert result.returncode == 0, result.stderr

    return request.param, once(f"uninterrupted-{request.param}", train)

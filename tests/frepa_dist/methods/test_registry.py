"""A method of somebody else's: the file that the README shows, found through an entry point, and trained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frepa_dist.runs import read_metrics
from shards.builder.build import BuildConfig, build_dataset
from tests.commands import frepa

README = Path(__file__).parents[3] / "README.md"
SECTION = "A new method in one file"
CONFIG = """
output: {run}
method:
  name: denoise
  noise: 0.2
  model: {{backbone: convnext_twin, image_size: 64, neck_width: 16}}
data: {{root: {root}, num_workers: 0}}
train: {{global_batch_size: 4, micro_batch_size: 2, steps: 2, log_every: 1, base_learning_rate: 1e-3}}
"""


def sample() -> str:
    """The first Python block of the README's section."""
    found = re.search(rf"#+ {SECTION}\n.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"README.md has no section '{SECTION}' with a Python block"
    return found[1]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder like `site-packages`, with the sample and the entry point of its package."""
    folder = tmp_path / "site"
    information = folder / "denoise-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "denoise.py").write_text(sample(), encoding="utf-8")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: denoise\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[frepa.methods]\ndenoise = denoise:Denoise\n")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (72, 72, 3), dtype=np.uint8)).save(images / f"{number}.png")
    build_dataset([images], tmp_path / "shards", BuildConfig(modality="fundus", size=72, jobs=1))
    path = tmp_path / "denoise.yaml"
    path.write_text(CONFIG.format(run=tmp_path / "run", root=tmp_path / "shards"))
    return path


def pretrain(config: Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "cluster.cli", "pretrain", "--config", str(config), "--num-ranks", "1"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=README.parent
    )


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_the_sample_of_the_readme_trains(installed, config, tmp_path):
    result = pretrain(config, str(installed))
    assert result.returncode == 0, result.stderr
    records = list(read_metrics(tmp_path / "run"))
    assert [record["step"] for record in records] == [1, 2]
    assert all(0 < record["loss/rec"] < 10 for record in records)
    assert records[0]["loss/rec"] != records[1]["loss/rec"]


def test_a_method_that_is_not_installed_is_unknown(config):
    result = frepa("pretrain", "--config", config, "--num-ranks", 1)
    assert result.returncode == 2
    assert "denoise" in result.stderr
    assert "retmae" in result.stderr  # what is allowed

"""A dataset, an encoder and a run, small enough for tests: ViT-Ti/16 on 64-pixel views of drawn images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from frepa_dist.config import RunConfig
from frepa_dist.models.autoencoder import create_autoencoder
from frepa_dist.models.vit_mae import create_vit_mae
from frepa_dist.runs import CONFIG, checkpoint_name
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.support.settings import dump_yaml

STEP = 12


@pytest.fixture(scope="session")
def small_weights():
    """State dict of a masked autoencoder whose norms and biases are no longer what they started as."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = create_vit_mae("tiny", image_size=64).state_dict()
    for value in state.values():
        if value.ndim == 1:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return state


@pytest.fixture(scope="session")
def small_encoder(small_weights, tmp_path_factory):
    """Path of the weights as an MAE checkpoint."""
    path = tmp_path_factory.mktemp("encoder") / "mae.safetensors"
    save_file(small_weights, path)
    return str(path)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    """Root of a dataset of seven images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(7):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((90, 72))
        coarse.save(folder / f"{number}.png")
    root = tmp_path_factory.mktemp("dataset") / "shards"
    build_dataset([folder], root, BuildConfig(modality="histopathology", size=72, jobs=1))
    return root


@pytest.fixture
def run_dir(small_weights, small_dataset, tmp_path):
    """A run of its own for each test: config, one checkpoint, metrics, environment."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / checkpoint_name(STEP)
    checkpoint.mkdir(parents=True)
    save_file(small_weights, checkpoint / "student.safetensors")
    (checkpoint / "manifest.json").write_text("{}")
    config = RunConfig.model_validate(
        {
            "output": str(run),
            "method": {"name": "mae", "model": {"size": "tiny", "image_size": 64}},
            "data": {"root": str(small_dataset), "snapshot": load_snapshot(small_dataset).hash},
            "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": STEP, "precision": "fp32"},
        }
    )
    (run / CONFIG).write_text(dump_yaml(config.model_dump(mode="json")))
    lines = [
        {"step": step, "epoch": 0, "samples": 4 * step, "loss": 1 / step, "loss/rec": 1 / step, "lr": 1e-3}
        | {"samples_per_second": 8.0, "time/total": 0.5, "time/data": 0.1, "time/forward": 0.3}
        for step in (4, 8, 12)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "environment.json").write_text(json.dumps({"packages": {"torch": "2.15.0"}, "world_size": 2}))
    return run


@pytest.fixture
def make_backbone_run(small_dataset, tmp_path):
    """Write a run of Frepa with a small backbone, and return its folder and its student."""

    def make(backbone, **model):
        run = tmp_path / f"run-{backbone}"
        checkpoint = run / "checkpoints" / checkpoint_name(STEP)
        checkpoint.mkdir(parents=True)
        config = RunConfig.model_validate(
            {
                "output": str(run),
                "method": {"name": "frepa", "model": {"backbone": backbone, "image_size": 64, **model}},
                "data": {"root": str(small_dataset), "snapshot": load_snapshot(small_dataset).hash},
                "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": STEP, "precision": "fp32"},
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = create_autoencoder(config.method.model).eval()
            with torch.no_grad():
                for parameter in student.parameters():
                    if parameter.ndim == 1:
                        parameter += 0.1 * torch.randn(parameter.shape)
        save_file(student.state_dict(), checkpoint / "student.safetensors")
        (checkpoint / "manifest.json").write_text("{}")
        (run / CONFIG).write_text(dump_yaml(config.model_dump(mode="json")))
        return run, student

    return make

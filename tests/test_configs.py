"""Every run config that the package ships trains at its twin's size; see `test_config_costs` for its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from frepa_dist.methods.base import StepInfo
from frepa_dist.train.engines import World
from frepa_dist.train.loop import Trainer
from shards.builder.build import BuildConfig, build_dataset
from shards.support.telemetry import Telemetry
from tests.one_rank import one_rank
from tests.twins import AUXILIARY, RUNS, twin


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(8):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((72, 72))
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 20, (72, 72, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    root = tmp_path_factory.mktemp("dataset") / "shards"
    build_dataset([folder], root, BuildConfig(modality="fundus", size=72, jobs=1))
    return root


@pytest.fixture(scope="module")
def auxiliary_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auxiliary") / "weights.safetensors"
    save_file(timm.create_model(AUXILIARY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_rank() as world:
        yield world


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all that a run trains, by network and parameter."""
    networks = trainer.submodules
    modules = {**networks.engines, **networks.plain}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, network in modules.items()
        for key, value in network.module.named_parameters()
        if value.requires_grad
    }


def is_on(settings: object) -> bool:
    return isinstance(settings, dict) and settings.get("weight", 0) > 0


@pytest.mark.parametrize("name", RUNS)
def test_the_twin_of_every_config_trains(name, dataset, auxiliary_weights, world, tmp_path):
    config = twin(name, dataset, tmp_path / "run", auxiliary_weights)
    trainer = Trainer(config, tmp_path / "run", world, Telemetry())
    before, batches = weights(trainer), trainer.stream.batches(0, 0)
    for step in (50, 51):  # past every warm-up
        info = StepInfo(step=step, total_steps=trainer.total_steps, seed=0)
        trainer.stepper.run([trainer.to_device(batch) for batch in next(batches)], info)
    after = weights(trainer)
    still = {key for key, value in before.items() if torch.equal(value, after[key])}
    # InfoNCE does not see what is added to all scores
    assert still <= {"teacher_critic.last.bias"} if "infonce" in name else not still, f"not trained: {still}"
    means = trainer.averages.take(world)
    assert all(np.isfinite(value) for value in means.values()), means
    terms = {term for term, value in config.method.model_dump().items() if is_on(value)}
    assert {f"loss/{term}" for term in terms} <= means.keys()  # what has a weight was computed

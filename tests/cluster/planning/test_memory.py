"""Memory that is counted beside that of real steps, and on the line between two counts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from cluster.planning.checkpoints import checkpoint_bytes
from cluster.planning.memory import MemoryModel, fit_memory, micro_batches, shown_sizes, with_layout
from frepa_dist.config import RunConfig
from frepa_dist.methods.base import StepInfo
from frepa_dist.models.cost import count_cost, network_specs
from frepa_dist.models.counters import LiveBytes
from frepa_dist.train.engines import World
from frepa_dist.train.loop import Trainer
from shards.support.errors import ConfigError
from shards.support.telemetry import Telemetry
from tests.cluster.planning.runs import small_config
from tests.one_rank import one_rank

RETMAE = {"name": "retmae", "model": {"size": "tiny", "image_size": 64}}


def config_of(root, method, **train) -> RunConfig:
    config = small_config(root, precision="fp32", **train).model_dump(mode="json")
    config["data"]["num_workers"] = 0
    return RunConfig.model_validate(config | ({"method": method} if method else {}))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One rank on the CPU."""
    with one_rank() as world:
        yield world


def standing_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("method", "train"),
    [
        (RETMAE, {"zero_stage": 1, "micro_batch_size": 4}),  # accumulated
        (None, {"zero_stage": 1, "micro_batch_size": 8}),
    ],
    ids=["retmae", "frepa"],
)
def test_a_real_step_takes_no_more_than_is_counted(planned_dataset, world, tmp_path, method, train):
    """And not much less: what is counted is all gradients beside all activations, which a step never has."""
    config = config_of(planned_dataset, method, **train)
    before = standing_bytes()
    trainer = Trainer(config, tmp_path, world, Telemetry())
    batches = [trainer.to_device(batch) for batch in next(trainer.stream.batches(0, 0))]
    info = StepInfo(step=30, total_steps=40, seed=0)
    for _ in range(2):
        trainer.stepper.run(batches, info)
    standing = standing_bytes() - before
    with LiveBytes() as alive:
        trainer.stepper.run(batches, info)
    cost = count_cost(config)
    assert 0.7 * cost.total_memory < standing + alive.peak < 1.02 * cost.total_memory
    # and so with what a checkpoint of it takes
    trainer.checkpoints.save(1, {"step": 1})
    trainer.checkpoints.finish()
    (folder,) = (tmp_path / "checkpoints").glob("step*")
    measured = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    kinds = {name: spec.kind for name, spec in network_specs(config).items()}
    predicted = checkpoint_bytes(kinds, cost.parameters, cost.trained)
    assert measured == pytest.approx(predicted, rel=0.03)  # names, buffers and random state come on top


@pytest.fixture(scope="module")
def model() -> MemoryModel:
    return fit_memory(config_of("unused", RETMAE, global_batch_size=48))


def test_activations_lie_on_the_line_through_two_counts(model):
    for stage, size in ((2, 48), (3, 12)):
        counted = count_cost(with_layout(model.config, stage=stage, micro_batch_size=size), 4).memory
        parts = model.parts(stage, size, 4)
        assert 0.98 * counted["activations"] < parts["activations"] < 1.1 * counted["activations"]
        assert {**parts, "activations": 0} == {**counted, "activations": 0}


def test_the_largest_micro_batch_that_fits(model):
    sizes = micro_batches(48, 2)
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 24]
    for stage in (0, 3):
        limit = model.total(stage, 8, 2)
        assert model.largest(stage, 2, limit) == 8
        assert model.largest(stage, 2, limit - 1) == 6
        assert model.largest(stage, 2, model.total(stage, 1, 2) - 1) is None


def test_ranks_that_do_not_divide_the_batch():
    with pytest.raises(ConfigError, match=r"7 ranks do not divide a global batch of 48; .*6 or 8 GPUs"):
        micro_batches(48, 7)


def test_some_of_many_sizes_are_shown():
    assert shown_sizes([1, 2, 4]) == [1, 2, 4]
    shown = shown_sizes(list(range(1, 101)), 5)
    assert (shown[0], shown[-1], len(shown)) == (1, 100, 5)

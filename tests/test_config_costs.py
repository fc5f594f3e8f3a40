"""Every run config that the package ships is counted at its full size, without being run."""

from __future__ import annotations

import functools
import json

import pytest

from frepa_dist.config import RunConfig
from frepa_dist.models.cost import Cost, count_cost
from shards.support.settings import load_settings
from tests.twins import RUNS

GPU_GIGABYTES = 80  # what a run of the shipped micro-batch sizes may need


def counted_alike(name: str) -> str:
    """All of a config that its cost can depend on: not where data are, nor numbers that shape no tensor."""
    config = load_settings(RunConfig, name)
    method = config.method.model_dump(mode="json", exclude={"corruption", "hf_masking", "rec"})
    if method.get("hmi"):
        method["hmi"]["estimator"] = method["hmi"]["estimator"] == "cosine"  # which has no critic
    return json.dumps([method, config.train.model_dump(mode="json")], sort_keys=True)


@functools.cache
def count(name: str) -> Cost:
    return count_cost(load_settings(RunConfig, name), ranks=8)


FIRST_OF = {counted_alike(name): name for name in reversed(RUNS)}  # each distinct one is counted once


@pytest.mark.parametrize("name", RUNS)
def test_every_config_is_counted_at_its_full_size(name):
    cost = count(FIRST_OF[counted_alike(name)])
    assert cost.parameters["student"] > cost.encoder_parameters > 5e6
    assert cost.total_flops > 2 * cost.encoder_parameters
    assert cost.memory["activations"] > 0
    gigabytes = cost.total_memory / 1e9
    assert gigabytes < GPU_GIGABYTES, f"{gigabytes:.0f} GB: smaller micro-batches are needed"

"""Times of a step by hand."""

from __future__ import annotations

import math

import pytest

from cluster.planning.timing import (
    Layout,
    Network,
    StepTime,
    communication_seconds,
    fetch_seconds,
    loader_processes,
    pass_seconds,
    passes,
    step_time,
)
from shards.support.errors import ConfigError
from tests.cluster.planning.runs import assume

EXACT = ("link_efficiency=1", "latency_seconds=0")
PAIR = Layout(2, 8, 1, 4, 2)


def test_volumes_of_zero():
    """Rajbhandari et al.: 2 of a network's sizes in stages 0 to 2, 3 in stage 3, without accumulation."""
    assert [passes(stage, 1) for stage in range(4)] == [2, 2, 2, 3]
    assert [passes(stage, 4) for stage in range(4)] == [2, 2, 5, 12]


def test_a_pass_in_a_node_goes_over_links_and_between_nodes_over_all_ports():
    gpu = ("gpu.link_gb_per_second=400", "gpu.network_gbit_per_second=80")
    assumptions = assume(*EXACT, *gpu)
    assert pass_seconds(4e9, Layout(1, 8, 1, 4, 2), assumptions) == pytest.approx(7 / 8 * 4e9 / 400e9)
    # 8 ports of 10 GB/s are slower than the links
    assert pass_seconds(4e9, PAIR, assumptions) == pytest.approx(15 / 16 * 4e9 / 80e9)
    assert pass_seconds(4e9, Layout(1, 1, 1, 4, 2), assumptions) == 0
    half = assume("link_efficiency=0.5", *gpu)
    assert pass_seconds(4e9, PAIR, half) == 2 * pass_seconds(4e9, PAIR, assumptions)


def test_communication_is_the_passes_and_the_hops():
    networks = {"student": Network(1_000_000, "bf16", 1), "critic": Network(1000, "fp32", 0)}
    exact = assume(*EXACT)
    expected = 2 * pass_seconds(2e6, PAIR, exact) + 2 * pass_seconds(4e3, PAIR, exact)
    assert communication_seconds(networks, PAIR, exact) == pytest.approx(expected)
    hops = 2 * 4 * 1e-3  # 16 ranks, there and back
    slow = assume("link_efficiency=1", "latency_seconds=1e-3")
    assert communication_seconds(networks, PAIR, slow) == pytest.approx(expected + 4 * hops)
    assert communication_seconds(networks, PAIR, assume(*EXACT, "overlap=0.75")) == pytest.approx(
        expected / 4
    )
    assert communication_seconds(networks, Layout(1, 1, 1, 4, 2), slow) == 0


def test_a_step_by_hand():
    assumptions = assume(*EXACT, "mfu=0.5", "loader_images_per_second=100", "storage_gbit_per_second=8")
    found = step_time({}, 1e12, "bf16", PAIR, 4, 1e6, 0, assumptions)
    assert PAIR.global_batch_size == 128
    assert found.compute == pytest.approx(128e12 / (16 * 989e12 * 0.5))
    assert found.loader == pytest.approx(128 / (16 * 4 * 100))
    assert found.network == pytest.approx(1e6 / 1e9)
    assert (found.communication, found.total, found.limit) == (0, found.loader, "loader")
    with pytest.raises(ConfigError, match=r"V100.*bf16"):
        step_time({}, 1e12, "bf16", PAIR, 4, 1e6, 0, assume(gpu="v100-32"))


@pytest.mark.parametrize(
    ("times", "limit"),
    [
        ((4, 1, 2, 3), "compute"),
        ((1, 4, 2, 3), "communication between GPUs"),
        ((1, 1, 3, 2), "loader"),
        ((1, 1, 2, 3), "network to the storage"),
    ],
)
def test_what_limits_a_step(times, limit):
    step = StepTime(*map(float, times))
    assert step.limit == limit
    assert step.total == max(times[0] + times[1], *times[2:])


def test_nodes_share_the_storage():
    own = assume("storage_gbit_per_second=8", "s3_requests_per_second=null")
    assert fetch_seconds(2e9, 1e9, 10, own) == pytest.approx(2)
    assert fetch_seconds(2e9, 0, 10, own.model_copy(update={"s3_gbit_per_second": 16.0})) == pytest.approx(10)
    assert fetch_seconds(2e9, 55_000, 10, assume("storage_gbit_per_second=8")) == pytest.approx(10)


def test_loader_processes_have_a_core_each():
    assert loader_processes(4, PAIR, None) == 64
    assert loader_processes(4, PAIR, 16) == 32
    assert loader_processes(0, PAIR, None) == 16


def test_a_gpu_whose_servers_differ_needs_its_network():
    with pytest.raises(ConfigError, match=r"gpu.network_gbit_per_second.*L40S"):
        pass_seconds(1e9, PAIR, assume(gpu="l40s"))
    assert math.isfinite(pass_seconds(1e9, Layout(1, 8, 1, 4, 2), assume(gpu="l40s")))

"""Assumptions are all listed, each with a basis; what the user says replaces them."""

from __future__ import annotations

import json

import pytest

from cluster.planning.assumptions import Assumptions, list_assumptions, read_assumptions
from cluster.planning.calibration import read_calibration
from cluster.planning.gpus import Gpu, read_gpus
from shards.support.errors import ConfigError, DataError
from tests.cluster.planning.runs import assume, small_config

BASES = ("measured", "published", "computed", "design", "guess")


def test_every_assumption_is_listed_with_its_basis():
    listed = list_assumptions(assume(), [], {})
    assert [item.name for item in listed] == list(Assumptions.model_fields)
    assert all(item.basis.startswith(BASES) for item in listed[1:])
    assert all(item.meaning for item in listed)


def test_what_is_given_and_what_is_measured_is_said():
    overrides = ["overlap=0.5", "gpu.memory_gb=94"]
    measured = {"mfu": (0.41, "measured: somewhere")}
    assumptions = read_assumptions("h100", overrides, measured)
    assert (assumptions.mfu, assumptions.overlap, assumptions.gpu.memory_gb) == (0.41, 0.5, 94)
    by_name = {item.name: item for item in list_assumptions(assumptions, overrides, measured)}
    assert by_name["overlap"].basis == "given"
    assert by_name["mfu"].basis == "measured: somewhere"
    assert "given: gpu.memory_gb" in by_name["gpu"].basis
    assert "data sheet" in by_name["gpu"].basis


@pytest.mark.parametrize("override", ["mfuu=0.3", "mfu=1.2", "gpu.memory=3", "hang_share=-1", "overlap"])
def test_wrong_assumptions_are_refused(override):
    with pytest.raises(ConfigError):
        assume(override)


@pytest.mark.parametrize("name", sorted(read_gpus()))
def test_every_gpu_of_the_table_is_whole(name):
    gpu = Gpu.model_validate(read_gpus()[name])
    assert "data sheet" in gpu.source or "brief" in gpu.source
    assert gpu.peak_flops("fp32") > 1e13
    peaks = [peak for peak in gpu.tflops.values() if peak]
    assert max(peaks) < 3000  # dense peaks: with sparsity a B200 has 4500


def test_a_gpu_of_one_s_own():
    described = (
        "gpu.memory_gb=96",
        "gpu.tflops.bf16=500",
        "gpu.link_gb_per_second=64",
        "gpu.network_gbit_per_second=100",
    )
    gpu = assume(*described, gpu="custom").gpu
    assert (gpu.memory_bytes, gpu.peak_flops("bf16"), gpu.network_bytes_per_second()) == (96e9, 5e14, 12.5e9)
    with pytest.raises(ConfigError, match=r"gpu.tflops.*required"):
        assume(*described[:1], gpu="custom")
    with pytest.raises(ConfigError, match=r"no such kind of GPU: h900; allowed: .*h100.*custom"):
        assume(gpu="h900")


@pytest.fixture
def calibration(tmp_path):
    """As `tools/bench_train.py --json` writes it; a test of that tool's output is the file it gave."""
    way = {"seconds": [1.0], "images_per_second": 250.0, "flops_per_second": 4e14}
    data = {"device": "NVIDIA H100 80GB HBM3", "precision": "bf16", "peak_flops": 8e14}
    data |= {"size": "base", "image_size": 512, "batch": 32, "ways": {"frepa": way, "plain fp32 MAE": {}}}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(data))
    return path


def test_mfu_is_taken_from_a_calibration(calibration):
    config = small_config("unused")
    here = read_calibration(calibration, config, "h100", 989e12)
    assert here["mfu"][0] == pytest.approx(4e14 / 989e12)
    assert here["mfu"][1].startswith("measured: calibration.json, frepa, ViT-base, 512 pixels, batch 32")
    # on another kind the share of that device's own peak is all that can be carried over
    value, basis = read_calibration(calibration, config, "a100-80", 312e12)["mfu"]
    assert value == 0.5
    assert "another device (NVIDIA H100" in basis


def test_calibrations_that_do_not_suit(calibration, tmp_path):
    with pytest.raises(ConfigError, match="it measures bf16, the run trains in fp32"):
        read_calibration(calibration, small_config("unused", precision="fp32"), "h100", 1e14)
    data = json.loads(calibration.read_text())
    calibration.write_text(json.dumps(data | {"ways": {"mae": data["ways"]["frepa"]}}))
    with pytest.raises(
        ConfigError, match=r"does not measure the method frepa; allowed: mae; .*--methods frepa"
    ):
        read_calibration(calibration, small_config("unused"), "h100", 1e14)
    for content in ("{}", "no json"):
        calibration.write_text(content)
        with pytest.raises(DataError, match=r"no measurements of training.*bench_train.py --json"):
            read_calibration(calibration, small_config("unused"), "h100", 1e14)

"""The preflight names what would stop a run, and goes on to the next check."""

from __future__ import annotations

import json
import socket

import pytest

from cluster import doctor
from frepa_dist.config import RunConfig
from frepa_dist.models.cost import count_cost
from shards.support.settings import load_settings
from tests.commands import frepa
from tests.shards.building import build
from tests.shards.images import write_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    images = write_images(tmp_path_factory.mktemp("images"), [f"{number}.png" for number in range(12)])
    root = tmp_path_factory.mktemp("dataset") / "root"
    build(images, root)
    return root


def make_config(dataset, output, *more: str) -> RunConfig:
    small = ["method.model.image_size=32", "train.global_batch_size=4", "train.micro_batch_size=2"]
    overrides = [f"data.root={dataset}", f"output={output}", *small, *more]
    return load_settings(RunConfig, "demo/mae", overrides)


def states(findings) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


@pytest.fixture
def no_ranks(monkeypatch):
    """Starting ranks takes seconds; the test of the command does it once."""
    monkeypatch.setattr(doctor, "check_ranks", lambda num_ranks: iter(()))


@pytest.mark.usefixtures("no_ranks")
def test_all_is_well(dataset, tmp_path):
    found = list(doctor.examine(make_config(dataset, tmp_path / "run"), 2))
    assert states(found).keys() >= {
        "packages",
        "devices",
        "shared memory",
        "batch",
        "data",
        "output",
        "memory",
    }
    assert "bad" not in states(found).values(), found
    (data,) = [finding for finding in found if finding.check == "data"]
    assert "12 samples of fundus in 1 shards; 3 steps an epoch" in data.says


@pytest.mark.usefixtures("no_ranks")
def test_every_fault_is_named_in_one_go(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = make_config(tmp_path / "none", tmp_path / "run", f"train.metrics.port={port}")
        found = list(doctor.examine(config, 3))
    wrong = {finding.check: finding.says for finding in found if finding.state == "bad"}
    assert wrong.keys() >= {"batch", "data", "ports", "output"}
    assert "4 is no multiple of 3 ranks" in wrong["batch"]
    assert str(port) in wrong["ports"]
    assert "holds a run already" in wrong["output"]


def test_a_disk_too_small_for_the_checkpoints(dataset, tmp_path, monkeypatch):
    config = make_config(dataset, tmp_path / "run")
    cost = count_cost(config)
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    (finding,) = doctor.check_output(config, cost)
    assert finding.state == "bad"
    assert "keep fewer checkpoints" in finding.fix


def test_a_package_of_another_version(monkeypatch):
    versions = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "torch" else versions(name))
    wrong, _ = doctor.check_packages()
    assert wrong.state == "bad"
    assert "torch 1.0 is not >=2.11" in wrong.says


@pytest.mark.distributed
def test_ranks_meet_and_the_command_prints_what_it_finds():
    done = frepa("doctor", "--num-ranks", 2, "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["ranks"]["state"] == "ok", done
    assert "2 ranks meet by" in found["ranks"]["says"]
    assert "GB/s" in found["ranks"]["says"]

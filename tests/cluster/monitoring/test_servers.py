"""A real Prometheus and a real Alertmanager: made-up exporters, then a training run, fall ill and recover."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.launch import free_port
from cluster.monitoring.panels import read_boards
from cluster.monitoring.render import Places
from cluster.monitoring.stack import PROGRAMS, running
from frepa_dist.heartbeats import heartbeat_path, read_pulse
from shards.builder.build import BuildConfig, build_dataset
from shards.support.targets import unique_label, write_target
from tests.cluster.monitoring import exporters

SCALE = 1 / 60  # a minute of the rules is a second here
MISSING = [name for name in ("prometheus", "alertmanager") if not any(map(shutil.which, PROGRAMS[name]))]
ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.timeout(480),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs {', '.join(MISSING)}: apt-get install prometheus prometheus-alertmanager",
    ),
]


class Servers:
    """What the servers are asked."""

    def __init__(self, prometheus: str, alertmanager: str) -> None:
        self.prometheus, self.alertmanager = prometheus, alertmanager

    def query(self, text: str) -> list:
        """The series of an instant query."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{text}: {error.read().decode()}")

    def delivered(self, run: str) -> dict[str, dict]:
        """Alerts about a run that Alertmanager holds now, by name."""
        with urllib.request.urlopen(f"{self.alertmanager}/api/v2/alerts", timeout=10) as answer:  # noqa: S310
            found = json.load(answer)
        return {alert["labels"]["alertname"]: alert for alert in found if alert["labels"].get("run") == run}

    def wait(self, condition, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}; alerts: {self.query('ALERTS')}"
            time.sleep(0.1)

    def wait_for_alerts(self, run: str, names: set[str]) -> dict[str, dict]:
        self.wait(lambda: names <= set(self.delivered(run)), f"{names} do not arrive")
        return self.delivered(run)

    def wait_for_silence(self, run: str, names: set[str]) -> None:
        self.wait(lambda: not names & set(self.delivered(run)), f"{names} are not resolved")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def servers(tmp_path_factory, targets):
    ports = {name: free_port() for name in PROGRAMS}
    with running(tmp_path_factory.mktemp("monitor"), Places(targets), ports, SCALE) as stack:
        urls = {server.name: server.url for server in stack.servers}
        yield Servers(urls["prometheus"], urls["alertmanager"])


def as_grafana_asks(query: str) -> str:
    return query.replace("$run", exporters.RUN).replace("$rank", ".*").replace("$__rate_interval", "5s")


ILL = {
    "FrepaRunStalled",
    "FrepaHeartbeatLost",
    "FrepaStepsSkipped",
    "FrepaRunWentBack",
    "FrepaCheckpointFailing",
    "FrepaRestartStorm",
    "FrepaDiskAlmostFull",
    "FrepaTargetDown",
}
QUICK = {"FrepaRunStalled", "FrepaHeartbeatLost", "FrepaDiskAlmostFull", "FrepaTargetDown"}


def test_panels_show_a_healthy_fleet_and_alerts_an_ill_one(servers, targets, training):
    run = exporters.RUN
    with exporters.exporting(targets) as made:
        panels = [(board.name, panel) for board in read_boards() for panel in board.panels()]

        def empty() -> list[str]:
            return [
                f"{board}: {panel.title}: {query}"
                for board, panel in panels
                for _, query in panel.queries
                if not panel.table and not servers.query(as_grafana_asks(query))
            ]

        servers.wait(lambda: not empty(), "these panels show nothing", 40)
        (alerts,) = [panel for _, panel in panels if panel.table]
        assert servers.query(as_grafana_asks(alerts.queries[0][1])) == [], "nothing is wrong"

        made.is_stepping = False
        made.gauges |= {"frepa_supervisor_heartbeat_age_seconds": 60.0, "frepa_disk_free_bytes": 4e10}
        train, supervisor = made.exporters["train"], made.exporters["supervisor"]
        for kind in ("skipped", "returns"):
            train.add("frepa_train_guarded_steps_total", 1, kind=kind)
        train.add("frepa_train_checkpoints_total", 1, result="failed")
        supervisor.add("frepa_supervisor_restarts_total", 4)
        lost = {"job": "frepa_train", "run": run, "rank": "1", "node": "0"}
        path = write_target(targets, "127.0.0.1:9", lost)
        arrived = servers.wait_for_alerts(run, ILL)
        assert "made-up has taken no step for" in arrived["FrepaRunStalled"]["annotations"]["summary"]
        assert "37.25GiB left" in arrived["FrepaDiskAlmostFull"]["annotations"]["summary"]
        assert arrived["FrepaTargetDown"]["labels"]["rank"] == "1"
        routes = {name: alert["receivers"][0]["name"] for name, alert in arrived.items()}
        assert routes["FrepaRunStalled"] == "call"
        assert routes["FrepaStepsSkipped"] == "record"
        assert set(arrived) == ILL, "and no others"
        assert len(servers.query(as_grafana_asks(alerts.queries[0][1]))) >= len(ILL)

        made.is_stepping = True
        made.gauges |= exporters.GAUGES
        path.unlink()
        servers.wait_for_silence(run, QUICK)
    servers.wait(
        lambda: not servers.query(f'up{{run="{run}"}}'), "targets do not vanish with their processes"
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Root of a dataset of a few images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (72, 72, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    root = tmp_path_factory.mktemp("dataset") / "shards"
    build_dataset([folder], root, BuildConfig(modality="fundus", size=72, jobs=1))
    return root


@pytest.fixture(scope="module")
def training(tmp_path_factory, targets, dataset):
    """A run of two ranks under a supervisor, until it is asked to stop; a file makes its losses NaN."""
    folder = tmp_path_factory.mktemp("training")
    information = folder / "site" / "flawed-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flawed\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[frepa.methods]\nflawed = tests.cluster.monitoring.flawed_method:Flawed\n"
    )
    run, switch = folder / "run", folder / "switch"
    settings = {
        "output": run,
        "data.root": dataset,
        "data.num_workers": 0,
        "method.name": "flawed",
        "method.switch": switch,
        "method.model.size": "tiny",
        "method.model.image_size": 64,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.epochs": "null",
        "train.steps": 1_000_000,
        "train.log_every": 1,
        "train.checkpoint_every": 50,
        "train.guard.patience": 100_000,
        "train.metrics.port": 0,
        "train.metrics.targets": targets,
    }
    config = folder / "config.yaml"
    config.write_text("base: retmae/mae_vit_b\n")
    command = [sys.executable, "-m", "cluster.cli", "pretrain", "--config", str(config), "--num-ranks", "2"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        yield process, run, switch
    finally:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # at once
        process.wait(60)


def processes_of(run: Path) -> list[int]:
    return [read_pulse(heartbeat_path(run / "heartbeats", rank)).pid for rank in range(2)]


@pytest.mark.distributed
def test_a_training_run_is_watched_through_its_faults(servers, targets, training):
    process, run, switch = training
    name = unique_label(run)
    steps = f'run:frepa_train_step:max{{run="{name}"}}'
    servers.wait(
        lambda: process.poll() is not None or any(float(s["value"][1]) > 3 for s in servers.query(steps)),
        "no step is scraped",
        240,
    )
    assert process.poll() is None, (run.parent / "log").read_text()[-3000:]
    assert {labels["metric"]["job"] for labels in servers.query(f'up{{run="{name}"}} == 1')} == {
        "frepa_train",
        "frepa_supervisor",
    }
    assert servers.query(f'frepa_train_loss{{run="{name}", term="total"}}')

    switch.touch()
    arrived = servers.wait_for_alerts(name, {"FrepaStepsSkipped"})
    switch.unlink()
    assert "not finite" in arrived["FrepaStepsSkipped"]["annotations"]["summary"]

    stopped = processes_of(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        ill = {"FrepaRunStalled", "FrepaTargetDown"}
        arrived = servers.wait_for_alerts(name, ill)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert arrived["FrepaTargetDown"]["labels"]["rank"] == "1"
    servers.wait_for_silence(name, ill | {"FrepaStepsSkipped"})

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert not [path for path in targets.iterdir() if name in path.name]
    servers.wait(lambda: not servers.query(f'up{{run="{name}"}}'), "its targets do not vanish")
    time.sleep(4)
    assert servers.delivered(name) == {}, "a run that is over raises no alarm"

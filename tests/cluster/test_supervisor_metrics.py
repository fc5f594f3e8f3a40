"""The metrics of a supervisor, scraped while scripted ranks do as they are told."""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.nodes import Nodes
from cluster.supervise import supervise
from cluster.supervisor_metrics import Exports
from shards.support.errors import EnvironmentFault
from shards.support.metrics import METRICS
from shards.support.targets import unique_label, write_target
from shards.support.telemetry import MetricsConfig
from tests.cluster.test_supervise import QUICK, SCRIPT
from tests.scraping import Samples, scrape


def read_target(folder: Path, job: str) -> tuple[int, dict[str, str]]:
    """Port and labels of the one target of a job, once it is there."""
    deadline = time.monotonic() + 20
    while not (found := list(folder.glob(f"{job}-*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (group,) = json.loads(found[0].read_text())
    return int(group["targets"][0].rpartition(":")[2]), group["labels"]


def scrape_to_the_end(folder: Path) -> tuple[list[Samples], dict[str, str], list[str]]:
    """All that a supervisor shows from its first to its last moment, its labels, targets before the end."""
    port, labels = read_target(folder, "frepa_supervisor")
    seen: list[Samples] = []
    targets: list[str] = []
    while True:
        try:
            names = [path.name for path in folder.glob("*.json")]
            seen.append(scrape(port))
            targets = names
        except OSError:
            return seen, labels, targets
        time.sleep(0.01)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run whose rank 0 fails with code 5, then with 1, and at last trains to the end; two ranks."""
    folder = tmp_path_factory.mktemp("watched")
    run, targets, cache = folder / "run", folder / "targets", folder / "cache"
    run.mkdir()
    cache.mkdir()
    stale = {"job": "frepa_train", "run": unique_label(run), "rank": "1", "node": "0"}
    write_target(targets, "127.0.0.1:1", stale)  # a start that was killed with its supervisor
    write_target(targets, "127.0.0.1:2", stale | {"run": "other"})
    plan = folder / "plan.json"
    quiet = "steps 9 pause done"
    plan.write_text(
        json.dumps([["steps 3 pause fail 5", "steps 3 wait"], ["steps 1 fail 1", "wait"], [quiet, quiet]])
    )

    def command(arguments, nodes, _):
        write_target(targets, "127.0.0.1:3", stale | {"rank": "0"})  # these ranks are killed, and leave it
        return [sys.executable, str(SCRIPT), str(plan), "0,1", *arguments]

    exports = Exports(MetricsConfig(port=0, targets=targets), cache)
    with ThreadPoolExecutor(1) as pool:
        scraping = pool.submit(scrape_to_the_end, targets)
        code = supervise(["--config", "x"], run, Nodes((2,)), QUICK, command, exports)
        seen, labels, before = scraping.result(timeout=20)
    return code, seen, labels, before, [path.name for path in targets.iterdir()], run


def test_faults_restarts_and_disks_can_be_scraped(watched):
    code, seen, _, _, _, _ = watched
    assert code == 0
    last = seen[-1]
    assert last["frepa_supervisor_restarts_total",] == 2
    faults = {labels[0]: value for (name, *labels), value in last.items() if "faults" in name}
    assert faults == {"1": 1, "2": 0, "3": 0, "4": 0, "5": 1}
    assert seen[0]["frepa_supervisor_faults_total", "5"] == 0, "it is there before it grows"
    for place in ("run", "cache"):
        assert 0 < last["frepa_disk_free_bytes", place] < last["frepa_disk_size_bytes", place]


def test_ranks_are_counted_by_what_they_say(watched):
    _, seen, _, _, _, _ = watched
    states = [
        {key[1]: value for key, value in one.items() if key[0] == "frepa_supervisor_ranks"} for one in seen
    ]
    assert all(sum(count.values()) in (0, 2) for count in states), "two, or none between starts"
    assert any(count["starting"] == 2 for count in states)
    assert any(count["training"] == 2 for count in states)
    ages = [one["frepa_supervisor_heartbeat_age_seconds",] for one in seen]
    assert max(age for age in ages if not math.isnan(age)) > 0.2, "they pause"
    assert all(math.isnan(age) or age < QUICK.start_seconds for age in ages)


def test_it_exports_the_table(watched):
    _, seen, _, _, _, _ = watched
    assert {name for one in seen for name, *_ in one} == {
        metric.name for metric in METRICS if metric.exporter == "supervisor"
    }


def test_the_target_tells_run_and_node_and_goes_with_the_supervisor(watched):
    _, _, labels, before, after, run = watched
    assert labels == {"job": "frepa_supervisor", "run": unique_label(run), "node": "0"}
    assert {f"frepa_supervisor-{labels['run']}-0.json", "frepa_train-other-1.json"} <= set(before)
    assert f"frepa_train-{labels['run']}-1.json" not in before
    assert after == ["frepa_train-other-1.json"]


def test_a_port_in_use_is_an_error_before_ranks_start(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = MetricsConfig(port=taken.getsockname()[1] + 2)  # node 1 takes the second before it
        with pytest.raises(EnvironmentFault, match=r"train\.metrics\.port"):
            supervise([], tmp_path / "run", Nodes((1, 1), 1), QUICK, lambda *_: ["false"], Exports(settings))
    assert not (tmp_path / "run" / "starts").exists()

import contextlib
import json
import socket
import threading
import urllib.request

import pytest

from shards.support.errors import ConfigError, EnvironmentFault
from shards.support.metrics import METRICS
from shards.support.settings import validate
from shards.support.telemetry import MetricsConfig, Telemetry
from tests.scraping import scrape

ANY_PORT = MetricsConfig(port=0)
LABELS = {"run": "vit-1234", "rank": "0", "node": "0"}


@pytest.fixture(scope="module")
def served():
    with Telemetry.serve(ANY_PORT, "train", LABELS) as telemetry:
        yield telemetry


def test_what_is_set_added_and_observed_can_be_scraped(served):
    for value in (0.5, 0.25):
        served.set("frepa_train_loss", value, term="rec")
        served.add("frepa_train_samples_total", 4)
        served.observe("frepa_train_step_seconds", value)
    served.add("frepa_train_guarded_steps_total", 0, kind="skipped")
    found = scrape(served.port)
    assert found["frepa_train_loss", "rec"] == 0.25
    assert found["frepa_train_samples_total",] == 8
    assert found["frepa_train_step_seconds_count",] == 2
    assert found["frepa_train_step_seconds_bucket", "0.25"] == 1
    assert found["frepa_train_guarded_steps_total", "skipped"] == 0


def test_what_is_not_known_yet_is_not_shown_but_for_counters():
    with Telemetry.serve(ANY_PORT, "build", {"run": "x"}) as telemetry:
        names = {name for name, *_ in scrape(telemetry.port)}
    assert names == {"frepa_build_shards_total", "frepa_build_bytes_written_total"}


def test_a_followed_value_is_that_of_the_moment():
    values = iter([1.0, 2.0])
    with Telemetry.serve(ANY_PORT, "supervisor", {}) as telemetry:
        telemetry.follow("frepa_disk_free_bytes", lambda: next(values), place="run")
        assert [scrape(telemetry.port)["frepa_disk_free_bytes", "run"] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("action", "name", "labels"),
    [
        ("set", "frepa_train_stepp", {}),
        ("set", "frepa_sweep_trials", {"state": "running"}),  # of another exporter
        ("set", "frepa_train_loss", {}),
        ("set", "frepa_train_loss", {"terms": "rec"}),
        ("set", "frepa_train_step", {"term": "rec"}),
        ("set", "frepa_train_samples_total", {}),
        ("add", "frepa_train_step", {}),
        ("observe", "frepa_train_step", {}),
    ],
)
def test_what_is_not_in_the_table_is_a_bug(action, name, labels, served):
    with pytest.raises((KeyError, AssertionError)):
        getattr(served, action)(name, 1.0, **labels)


def test_the_metrics_of_every_exporter_can_be_made_by_many_threads_at_once():
    for exporter in ("train", "supervisor", "build", "sweep"):
        own = [metric for metric in METRICS if metric.exporter == exporter]
        with Telemetry.serve(ANY_PORT, exporter, {}) as telemetry:

            def use(own=own, telemetry=telemetry):
                for metric in own:
                    action = {"gauge": "set", "counter": "add", "histogram": "observe"}[metric.kind]
                    getattr(telemetry, action)(metric.name, 1.0, **dict.fromkeys(metric.labels, "x"))

            threads = [threading.Thread(target=use) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = scrape(telemetry.port)
        for metric in own:
            if metric.kind == "counter":
                assert found[(metric.name, *("x" for _ in metric.labels))] == 8
        shown = {
            name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, *_ in found
        }
        assert shown == {metric.name for metric in own}


def test_without_a_port_nothing_is_served_or_written(tmp_path):
    with Telemetry.serve(MetricsConfig(targets=tmp_path / "targets"), "train", LABELS) as telemetry:
        telemetry.set("frepa_train_step", 1.0)
    assert telemetry.port is None
    assert not (tmp_path / "targets").exists()


def test_a_port_in_use_is_an_error_that_says_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = MetricsConfig(port=taken.getsockname()[1] - 1)
        serving = Telemetry.serve(settings, "train", LABELS, offset=1, key="train.metrics")
        with pytest.raises(EnvironmentFault, match=r"train\.metrics\.port") as caught, serving:
            pass
    assert caught.value.exit_code == 5
    with pytest.raises(EnvironmentFault), Telemetry.serve(MetricsConfig(port=65535), "train", {}, offset=1):
        pass


def test_the_port_is_given_back_and_the_target_removed_whatever_ends_the_block(tmp_path):
    settings = MetricsConfig(port=0, targets=tmp_path)
    with contextlib.suppress(ZeroDivisionError), Telemetry.serve(settings, "train", LABELS) as telemetry:
        (path,) = tmp_path.glob("*.json")
        (group,) = json.loads(path.read_text())
        assert group == {
            "targets": [f"127.0.0.1:{telemetry.port}"],
            "labels": {"job": "frepa_train", **LABELS},
        }
        assert path.name == "frepa_train-vit-1234-0.json"
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{telemetry.port}/metrics", timeout=10)


@pytest.mark.parametrize("port", [-1, 80, 70000])
def test_a_port_that_cannot_be_is_refused(port):
    with pytest.raises(ConfigError, match="port"):
        validate(MetricsConfig, {"port": port}, where="metrics")


def test_ports_of_ranks_and_supervisors():
    assert MetricsConfig().port_of(3) is None
    assert MetricsConfig(port=0).port_of(3) == 0
    assert MetricsConfig(port=9100).port_of(3) == 9103

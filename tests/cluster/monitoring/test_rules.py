"""Rules and alerts, through promtool: valid, and each alert fires where it should and is silent elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.monitoring.metrics_page import read_alerts
from cluster.monitoring.render import RULES, Places, render, scale_times
from shards.support.errors import ConfigError
from shards.support.settings import parse_yaml

CASES = Path(__file__).with_name("alerts_test.yml")
ALERTS = {rule["alert"]: rule for rule in read_alerts()}


def run(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}: apt-get install prometheus prometheus-alertmanager")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.prometheus
def test_every_alert_fires_and_is_silent_as_the_cases_say():
    run("promtool", "test", "rules", CASES)


def test_every_alert_has_a_case_of_each_kind():
    cases = parse_yaml(CASES.read_text())["tests"]
    fires, silent = set(), set()
    for case in cases:
        for test in case["promql_expr_test"]:
            named = re.search(r'alertname=~?"([^"]+)"', test["expr"])
            if named is not None:
                (fires if test.get("exp_samples") else silent).update(named[1].split("|"))
    assert fires == set(ALERTS)
    assert silent == set(ALERTS)


@pytest.mark.parametrize("rule", ALERTS.values(), ids=list(ALERTS))
def test_every_alert_says_how_grave_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert 20 < len(rule["annotations"]["summary"]) < 120
    assert len(rule["annotations"]["description"]) > 120, "it says what to do"


@pytest.mark.prometheus
@pytest.mark.parametrize("scale", [1, 1 / 60])
def test_what_is_rendered_is_valid(tmp_path, scale):
    targets = tmp_path / "some targets"
    targets.mkdir()
    render(tmp_path / "out", Places(targets, alertmanager="here:1"), scale)
    told = run("promtool", "check", "config", tmp_path / "out" / "prometheus.yml")
    assert f"{len(ALERTS)} rules found" in told
    assert "SUCCESS: 2 rule files found" in told
    run("amtool", "check-config", tmp_path / "out" / "alertmanager.yml")
    settings = parse_yaml((tmp_path / "out" / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"{targets}/*.json"]
    assert settings["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["here:1"]
    assert {path.name for path in (tmp_path / "out" / "grafana" / "dashboards").iterdir()} == {
        "run.json",
        "fleet.json",
        "data.json",
        "sweep.json",
    }


def test_lengths_of_time_are_scaled_and_nothing_else():
    text = "rate(frepa_x_total[5m:10s]) > 2 * 60 and x > 10 * y  # rate5m, 600 s, for: 90s, median6h 1d"
    assert scale_times(text, 1) == text
    expected = (
        "rate(frepa_x_total[30000ms:1000ms]) > 12 and x > 10 * y  # rate5m, 600 s, for: 9000ms, "
        "median6h 8640000ms"
    )
    assert scale_times(text, 0.1) == expected


def test_no_length_of_time_is_a_bare_number():
    """Such a number would not be scaled; times of day are none."""
    for name in RULES:
        for rule in (rule for group in read_rules(name) for rule in group["rules"]):
            for limit in re.findall(
                r"(?:seconds|age)\S*(?:\{[^}]*\})?\)?\s*>\s*([1-9]\d*)(?! \*)\b", rule["expr"]
            ):
                pytest.fail(f"{limit} in {rule['expr']}")


def read_rules(name):
    from cluster.monitoring.panels import shipped

    return parse_yaml(shipped(name))["groups"]


def test_a_folder_that_prometheus_would_take_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must hold no"):
        render(tmp_path / "out", Places(tmp_path / "runs[1]"))

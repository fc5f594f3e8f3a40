"""The list of all metrics, rules and alerts as Markdown: what each says, and where it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cluster.monitoring.panels import Board, metrics_behind, names_in, shipped
from shards.support.metrics import METRICS, Exporter, Metric
from shards.support.settings import parse_yaml

EXPORTERS: dict[Exporter, str] = {
    "train": "Ranks of a run (job `frepa_train`)",
    "supervisor": "The supervisor of a node (job `frepa_supervisor`)",
    "build": "`frepa shards build` (job `frepa_build`)",
    "sweep": "The driver of a sweep (job `frepa_sweep`)",
}


def metrics_page(boards: Iterable[Board], recorded: dict[str, str]) -> str:
    """The whole page.

    Args:
        boards: all dashboards.
        recorded: recording rules by name.
    """
    places: dict[str, list[str]] = {}
    for board in boards:
        for panel in board.panels():
            names = set().union(*(names_in(query) for _, query in panel.queries))
            for name in sorted(names | metrics_behind(names, recorded)):
                places.setdefault(name, []).append(f"{board.name}: {panel.title}")
    shown = {name: ", ".join(dict.fromkeys(found)) for name, found in places.items()}
    lines = [
        "# Metrics, rules and alerts",
        "",
        "Made by `python -m cluster.monitoring.grafana` from `shards/support/metrics.py`, `panels.yml` and",
        "`rules/`.",
        "Every series has the labels of its target: `job`, `run`, `node`, `instance`, of ranks also `rank`.",
        "Where a metric is shown is said as `dashboard: panel`, also where a recording rule stands between.",
    ]
    for exporter, title in EXPORTERS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| metric | kind | labels | says | shown on |",
            "|---|---|---|---|---|",
        ]
        lines += [
            _row(metric, shown.get(metric.name, "")) for metric in METRICS if metric.exporter == exporter
        ]
    lines += ["", "## Recording rules", "", "| rule | shown on |", "|---|---|"]
    lines += [f"| `{name}` | {shown.get(name, '')} |" for name in recorded]
    lines += ["", "## Alerts", "", "| alert | severity | fires after | says |", "|---|---|---|---|"]
    lines += [_alert(rule) for rule in read_alerts()]
    return "\n".join(lines) + "\n"


def read_alerts() -> list[dict[str, Any]]:
    """The alert rules, as Prometheus reads them."""
    groups = parse_yaml(shipped("rules/alerts.yml"), where="alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _row(metric: Metric, shown: str) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} | {shown} |"


def _alert(rule: dict[str, Any]) -> str:
    words = re.sub(r"{{ *\$labels\.(\w+) *}}", r"*\1*", rule["annotations"]["summary"])
    words = re.sub(r"{{.*?}}B?", "*so much*", words)
    return f"| `{rule['alert']}` | {rule['labels']['severity']} | {rule.get('for', '0s')} | {words} |"

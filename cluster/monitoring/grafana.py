"""Grafana's dashboards and the list of metrics, made from `panels.yml` and the table of metrics.

`python -m cluster.monitoring.grafana` writes them anew; a test holds that they are what it writes. The JSON
is that of Grafana 10 and later (schema version 39).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.monitoring.metrics_page import metrics_page
from cluster.monitoring.panels import (
    COLUMNS,
    Board,
    Panel,
    metrics_behind,
    names_in,
    read_boards,
    read_recorded,
)
from shards.support.metrics import METRICS

DASHBOARDS, METRICS_PAGE = "dashboards", "METRICS.md"
SCHEMA_VERSION = 39
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLORS = ("green", "orange", "red")


def panel_json(panel: Panel, number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """A panel in Grafana's words."""
    names = names_in(panel.queries[0][1])
    names |= metrics_behind(names, read_recorded())
    metric = next((metric for metric in METRICS if metric.name in names), None)
    steps = panel.steps or ()
    defaults: dict[str, Any] = {
        "unit": panel.unit or (metric.unit if metric else "short"),
        "thresholds": {
            "mode": "absolute",
            "steps": [
                {"color": color, "value": value} for color, value in zip(COLORS, (None, *steps), strict=False)
            ],
        },
    }
    if panel.most is not None:
        defaults |= {"min": 0, "max": panel.most}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stack else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind in ("stat", "bargauge"):
        options["reduceOptions"] = {"calcs": ["lastNotNull"], "values": False, "fields": ""}
        options |= {"colorMode": "value"} if panel.stat else {"orientation": "horizontal"}
    instant = panel.kind != "timeseries"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text or (metric.text if metric else ""),
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
                "instant": instant,
                "range": not instant,
                **({"format": "table"} if panel.table else {}),
            }
            for place, (legend, query) in enumerate(panel.queries)
        ],
    }


def panels_json(board: Board) -> list[dict[str, Any]]:
    """All panels from left to right and top to bottom, below the titles of their rows."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in board.rows.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        made.append(
            {
                "id": len(made) + 1,
                "type": "row",
                "title": title,
                "gridPos": place,
                "collapsed": False,
                "panels": [],
            }
        )
        x, y, height = 0, y + 1, 0
        for panel in panels:
            width = panel.width or (4 if panel.stat else 8)
            if x + width > COLUMNS:
                x, y, height = 0, y + height, 0
            own = 4 if all(other.stat for other in panels) else 8
            made.append(panel_json(panel, len(made) + 1, x, y, width, own))
            x, height = x + width, max(height, own)
        y += height
    return made


def variable(name: str, label: str, query: str, *, several: bool) -> dict[str, Any]:
    """A variable whose values Prometheus knows."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
        "multi": several,
        "includeAll": several,
        **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if several else {}),
    }


def board_json(board: Board) -> dict[str, Any]:
    """A dashboard in Grafana's words."""
    variables = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        variable("run", "Run", f"label_values({board.runs_of}, run)", several=board.several_runs),
    ]
    if board.has_ranks:
        ranks = f'label_values({board.runs_of}{{run=~"$run"}}, rank)'
        variables.append(variable("rank", "Rank", ranks, several=True))
    alerts = {
        "name": "Alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing", run=~"$run"}',
        "titleFormat": "{{alertname}}",
        "tagKeys": "run,severity",
    }
    link = {"type": "dashboards", "title": "Frepa", "tags": ["frepa"], "asDropdown": False, "keepTime": True}
    return {
        "uid": f"frepa-{board.name}",
        "title": board.title,
        "description": board.text,
        "tags": ["frepa"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables},
        "annotations": {"list": [alerts]},
        "links": [link],
        "panels": panels_json(board),
    }


def generated() -> dict[str, str]:
    """All files that are made, by their paths in this folder."""
    boards = read_boards()
    files = {
        f"{DASHBOARDS}/{board.name}.json": json.dumps(board_json(board), indent=1) + "\n" for board in boards
    }
    return {**files, METRICS_PAGE: metrics_page(boards, read_recorded())}


if __name__ == "__main__":
    for name, text in generated().items():
        path = Path(__file__).parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

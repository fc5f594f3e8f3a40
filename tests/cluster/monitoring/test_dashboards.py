"""Dashboards and the list of metrics: made from the table, whole, and in Grafana's own words."""

from __future__ import annotations

import json

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from cluster.monitoring.grafana import board_json, generated
from cluster.monitoring.panels import (
    COLUMNS,
    Panel,
    metrics_behind,
    names_in,
    read_boards,
    read_recorded,
    shipped,
)
from shards.support.metrics import METRICS

BOARDS = {board.name: board for board in read_boards()}
TABLE = {metric.name for metric in METRICS}
# of Prometheus itself: what is scraped, and which alerts fire
OWN = {"up", "ALERTS"}
# of annotations, by Grafana's Prometheus datasource: the models of its dashboards leave them out
NOT_MODELLED = {"titleFormat", "tagKeys"}


def test_what_is_checked_in_is_what_is_made():
    for name, text in generated().items():
        assert shipped(name) == text, f"{name}: run `python -m cluster.monitoring.grafana`"


def queries(board):
    return [query for panel in board.panels() for _, query in panel.queries]


@pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
def test_panels_read_the_table_and_its_rules_alone(board):
    known = TABLE | set(read_recorded()) | OWN
    for query in queries(board):
        names = names_in(query)
        assert names, f"no metric in {query}"
        assert names <= known, f"{names - known} in {query}"


def test_rules_read_the_table_alone():
    from cluster.monitoring.metrics_page import read_alerts

    recorded = read_recorded()
    for text in [*recorded.values(), *(rule["expr"] for rule in read_alerts())]:
        assert names_in(text) <= TABLE | set(recorded) | OWN, text
        assert names_in(text), text


def test_every_metric_is_shown_somewhere():
    recorded = read_recorded()
    names = {name for board in BOARDS.values() for query in queries(board) for name in names_in(query)}
    assert TABLE - names - metrics_behind(names, recorded) == set()
    assert set(recorded) - names - {"run:frepa_train_step_seconds:mean"} == set(), "it is for alerts alone"


def test_names_are_found_in_queries():
    query = (
        'sum by (run) (rate(frepa_train_step_seconds_bucket{run=~"frepa_x|$run"}[5m])) / run:frepa_a:max > 1'
    )
    assert names_in(query) == {"frepa_train_step_seconds", "run:frepa_a:max"}
    assert names_in("frepa_nothing_total + up") == {"frepa_nothing_total", "up"}


def differences(ours, theirs, path=""):
    """What of ours is not in theirs, as paths."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key not in theirs:
                if value not in (None, [], {}) and key not in NOT_MODELLED:
                    yield f"{path}/{key}"
            else:
                yield from differences(value, theirs[key], f"{path}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{path}[{number}]")
    elif ours != theirs:
        yield f"{path}: {ours} or {theirs}"


def as_grafana_reads(data):
    """Through the models that Grafana publishes; they drop what they do not know."""
    plugins.register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(data), cls=JSONEncoder))


@pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
def test_grafana_knows_every_field(board):
    data = board_json(board)
    assert list(differences(data, as_grafana_reads(json.loads(json.dumps(data))))) == []


def test_a_field_that_grafana_does_not_know_is_found():
    data = json.loads(json.dumps(board_json(BOARDS["fleet"])))
    data["panels"][1]["options"]["colourMode"] = "value"
    data["panels"][2]["targets"][0]["expression"] = "up"
    found = list(differences(data, as_grafana_reads(json.loads(json.dumps(data)))))
    assert found == ["/panels[1]/options/colourMode", "/panels[2]/targets[0]/expression"]


@pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
def test_panels_lie_beside_each_other(board):
    data = board_json(board)
    cells = set()
    for panel in data["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{panel['title']} lies on another"
        cells |= own
        assert panel["type"] == "row" or panel["description"], panel["title"]
    ids = [panel["id"] for panel in data["panels"]]
    assert len(ids) == len(set(ids))
    assert [variable["name"] for variable in data["templating"]["list"]][:2] == ["datasource", "run"]


def test_a_panel_shows_one_kind_of_thing():
    with pytest.raises(ValueError, match="exactly one of"):
        Panel(title="nothing")
    with pytest.raises(ValueError, match="exactly one of"):
        Panel(title="two", stat="up", lines={"": "up"})

"""A sweep's driver is scraped: what it is told is served under the names of the table."""

from __future__ import annotations

import json

from cluster.sweep.config import SweepConfig
from cluster.sweep.exports import serve_sweep
from shards.support.metrics import METRICS
from tests.scraping import scrape


def test_all_metrics_of_the_table_are_served(tmp_path):
    sweep = SweepConfig.model_validate(
        {
            "base": "demo/retmae",
            "space": {"train.seed": {"grid": [0, 1, 2]}},
            "metric": {"kind": "probe", "images": "images"},
            "output": str(tmp_path / "weights"),
            "metrics": {"port": 0, "targets": str(tmp_path / "targets")},
        }
    )
    with serve_sweep(sweep) as publish:
        (file,) = (tmp_path / "targets").glob("*.json")
        (target,) = json.loads(file.read_text())
        assert target["labels"]["job"] == "frepa_sweep"
        port = int(target["targets"][0].rpartition(":")[2])
        publish({"running": 2, "done": 0}, None, 1)
        assert ("frepa_sweep_best_metric",) not in scrape(port)
        publish({"running": 1, "done": 1}, 0.75, 4)
        found = scrape(port)
    assert found[("frepa_sweep_trials", "running")] == 1
    assert found[("frepa_sweep_trials", "done")] == 1
    assert found[("frepa_sweep_planned_trials",)] == 3
    assert found[("frepa_sweep_best_metric",)] == 0.75
    assert found[("frepa_sweep_reports_total",)] == 4
    assert {name for name, *_ in found} == {m.name for m in METRICS if m.exporter == "sweep"}
    assert not file.exists()

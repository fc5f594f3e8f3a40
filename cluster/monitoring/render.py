"""The files of a Prometheus, an Alertmanager and a Grafana that watch runs, filled in for a place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.monitoring.grafana import DASHBOARDS
from cluster.monitoring.panels import read_boards, shipped
from shards.stores.atomic import replace_text, writing_to
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml, parse_yaml

RULES = ("rules/recording.yml", "rules/alerts.yml")
PROMETHEUS, ALERTMANAGER, GRAFANA = "prometheus.yml", "alertmanager.yml", "grafana"
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        targets: folder of files of targets, one for each node or process, which come and go.
        prometheus, alertmanager: HOST:PORT of each; without an Alertmanager alerts stay in Prometheus.
        webhook: URL to which Alertmanager sends; `/call` or `/record` is added by severity.
    """

    targets: Path
    prometheus: str = "127.0.0.1:9090"
    alertmanager: str | None = "127.0.0.1:9093"
    webhook: str = "http://127.0.0.1:9095"


def render(out: Path, places: Places, scale: float = 1.0) -> None:
    """Write all files below a folder: prometheus.yml, rules/, alertmanager.yml, grafana/.

    Args:
        out: the folder; files of an earlier call are written over.
        places: where things are.
        scale: factor of all intervals and lengths of time, so that tests need not wait.

    Raises:
        ConfigError: the folder of targets holds characters that Prometheus takes for a pattern.
        EnvironmentFault: a file cannot be written.
    """
    if set("*?[]{}\\") & set(str(places.targets.resolve())):
        raise ConfigError("the path of the targets must hold no *?[]{}\\", where=places.targets.resolve())
    files = {name: scale_times(shipped(name), scale) for name in RULES}
    files[PROMETHEUS] = dump_yaml(_prometheus(places, scale))
    files[ALERTMANAGER] = dump_yaml(_alertmanager(places, scale))
    boards = (out / GRAFANA / DASHBOARDS).resolve()
    for name, content in _provisioning(places, boards).items():
        files[f"{GRAFANA}/provisioning/{name}"] = dump_yaml(content)
    for board in read_boards():
        files[f"{GRAFANA}/{DASHBOARDS}/{board.name}.json"] = shipped(f"{DASHBOARDS}/{board.name}.json")
    with writing_to(out):
        for name, text in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            replace_text(out / name, text)


def scale_times(text: str, scale: float) -> str:
    """Multiply all lengths of time in rules or settings: `15s`, `[6h:1m]`, `5 * 60`."""
    if scale == 1:
        return text

    def length(found: re.Match[str]) -> str:
        return f"{max(1, round(int(found[1]) * _MILLISECONDS[found[2]] * scale))}ms"

    def product(found: re.Match[str]) -> str:
        return f"{int(found[1]) * int(found[2]) * scale:g}"

    text = re.sub(r"(?<!\w)(\d+)(ms|s|m|h|d)\b", length, text)
    return re.sub(r"(?<!\w)(\d+) \* (60|3600)\b", product, text)


def _prometheus(places: Places, scale: float) -> dict[str, Any]:
    settings: dict[str, Any] = parse_yaml(scale_times(shipped(PROMETHEUS), scale), where=PROMETHEUS)
    (discovery,) = settings["scrape_configs"][0]["file_sd_configs"]
    discovery["files"] = [str(places.targets.resolve() / "*.json")]
    if places.alertmanager is None:
        del settings["alerting"]
    else:
        settings["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [places.alertmanager]}]
    return settings


def _alertmanager(places: Places, scale: float) -> dict[str, Any]:
    settings: dict[str, Any] = parse_yaml(scale_times(shipped(ALERTMANAGER), scale), where=ALERTMANAGER)
    for receiver in settings["receivers"]:
        receiver["webhook_configs"] = [{"url": f"{places.webhook}/{receiver['name']}"}]
    return settings


def _provisioning(places: Places, dashboards: Path) -> dict[str, dict[str, Any]]:
    """What Grafana reads when it starts: where Prometheus is, and where the dashboards lie."""
    source = {
        "name": "Prometheus",
        "uid": "frepa-prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": f"http://{places.prometheus}",
        "isDefault": True,
        "jsonData": {"timeInterval": "15s"},
    }
    provider = {
        "name": "frepa",
        "folder": "Frepa",
        "type": "file",
        "allowUiUpdates": False,
        "options": {"path": str(dashboards)},
    }
    return {
        "datasources/frepa.yml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/frepa.yml": {"apiVersion": 1, "providers": [provider]},
    }

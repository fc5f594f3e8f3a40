"""Scrapes an exporter as Prometheus does: over HTTP, in the text format."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, ...], float]


def scrape(port: int | None, host: str = "127.0.0.1") -> Samples:
    """Get the samples of a target by name and label values: (`frepa_train_loss`, `rec`) -> 0.5."""
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

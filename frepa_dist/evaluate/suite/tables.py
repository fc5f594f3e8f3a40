"""The files of a suite beside its page: values of every source, means and differences, as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from frepa_dist.evaluate.suite.config import SuiteConfig
from frepa_dist.evaluate.suite.published import find_published
from frepa_dist.evaluate.suite.run import Place, Results
from frepa_dist.evaluate.suite.summary import Summary
from shards.stores.atomic import replace_text
from shards.support.settings import dump_yaml

VALUES, MEANS, DIFFERENCES, WHOLE, CONFIG = (
    "values.csv",
    "means.csv",
    "differences.csv",
    "suite.json",
    "config.yaml",
)


def write_tables(config: SuiteConfig, results: Results, summary: Summary) -> None:
    """Write the files into the output folder.

    Raises:
        EnvironmentFault: they cannot be written.
    """
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / VALUES, _to_csv(value_rows(config, results)))
    means = [row.model_dump(exclude={"by_seed"}) for task in summary.tasks for row in task.rows]
    replace_text(folder / MEANS, _to_csv(means))
    gaps = [gap.model_dump(exclude={"by_seed"}) for task in summary.tasks for gap in task.contrasts]
    replace_text(folder / DIFFERENCES, _to_csv(gaps))
    whole = {
        **summary.model_dump(mode="json"),
        "pretraining": {name: known.model_dump(mode="json") for name, known in results.pretraining.items()},
        "leakage": [
            {"task": at.task, "encoder": at.encoder, "seed": at.seed, "said": reading.leakage}
            for at, reading in results.readings.items()
            if reading.leakage is not None
        ],
        "failures": [
            {"task": at.task, "encoder": at.encoder, "seed": at.seed, "why": failure.words}
            for at, failure in results.failures.items()
        ],
        "published": {
            key: find_published(key).model_dump(mode="json")
            for task in config.tasks
            for key in task.published
        },
    }
    replace_text(folder / WHOLE, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    replace_text(folder / CONFIG, dump_yaml(config.model_dump(mode="json", exclude_none=True)))


def value_rows(config: SuiteConfig, results: Results) -> list[dict[str, object]]:
    """A row for each measure of each source, and one for each result that could not be had."""
    rows: list[dict[str, object]] = []
    for task in config.tasks:
        for entry in config.encoders:
            for seed, source in enumerate(entry.sources):
                place = Place(task.name, entry.name, seed)
                common = {"task": task.name, "kind": task.kind, "encoder": entry.name, "seed": seed}
                common["source"] = source
                if place in results.failures:
                    rows.append({**common, "state": results.failures[place].words})
                elif place in results.readings:
                    rows += [
                        {
                            **common,
                            "measure": name,
                            "value": measured.value,
                            "low": measured.low,
                            "high": measured.high,
                            "state": "done",
                        }
                        for name, measured in results.readings[place].measures.items()
                    ]
                else:
                    rows.append({**common, "state": "not run"})
    return rows


def _to_csv(rows: Sequence[dict[str, object]]) -> str:
    """Rows with a header of all their keys, in the order in which these appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

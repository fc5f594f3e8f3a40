"""What a sweep leaves: tables, the best config, a page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cluster.sweep.config import SweepConfig
from cluster.sweep.journal import TrialRecord
from cluster.sweep.layout import Layout
from cluster.sweep.page import build_page
from cluster.sweep.points import resolve
from cluster.sweep.table import Best, find_best, setting_rows, to_csv, to_text, trial_rows
from frepa_dist.runs import CONFIG, load_run_config
from shards.stores.atomic import replace_text
from shards.support.settings import dump_yaml

BEST, TABLE, SETTINGS, PAGE = "best.yaml", "table", "settings", "report.html"


def write_results(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> str:
    """Write all that is made of a journal; return what to print."""
    root = sweep.output
    rows, settings = trial_rows(sweep, trials), setting_rows(sweep, trials)
    for name, table in ((TABLE, rows), (SETTINGS, settings)):
        if table:
            replace_text(root / f"{name}.csv", to_csv(table))
            replace_text(root / f"{name}.json", json.dumps(table, indent=1) + "\n")
    lines = [to_text(table) for table in (rows, settings) if table]
    best = find_best(sweep, trials)
    if best is not None:
        replace_text(root / BEST, best_config(sweep, best))
        lines.append(f"best    {root / BEST}: {best.describe(sweep.metric.kind)}")
    if rows:
        build_page(sweep, trials, root / PAGE)
        lines.append(f"report  {root / PAGE}")
    return "\n\n".join([*lines[:-2], "\n".join(lines[-2:])]) if lines else "no trial has begun"


def best_config(sweep: SweepConfig, best: Best) -> str:
    """A run config as the best trial's, for a run of its own beside the trials."""
    config = resolve(sweep, best.trial.values, sweep.output / "best")
    trained = Layout(sweep.output).run(best.trial.name)
    if (trained / CONFIG).is_file():  # on the very data that the trials had
        stored = load_run_config(trained).data
        data = config.data.model_copy(update={"root": stored.root, "snapshot": stored.snapshot})
        config = config.model_copy(update={"data": data})
    told = ", ".join(f"{key} {value}" for key, value in best.trial.values.items())
    head = (
        f"# The best of a sweep: {best.describe(sweep.metric.kind)}, step {best.trial.reports[-1].step}\n"
        f"# {told}\n"
    )
    return head + dump_yaml(config.model_dump(mode="json"))

"""`frepa evaluate suite`. Heavy imports happen inside the command."""

from __future__ import annotations

import sys

import click

from cluster.options import set_option


@click.command("suite")
@click.argument("config")
@set_option
@click.option("--only", multiple=True, metavar="TASK", help="Compute this task alone; may be repeated.")
def evaluate_suite(config: str, overrides: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Many encoders on many tasks, side by side on one page, with paired tests and seeds apart.

    CONFIG is a file, or the name of a shipped one (evaluate/retmae). Into its `output` go report.html, tables
    as CSV, suite.json, and each result. Started again, it goes on where it stopped; what settings, weights or
    images have changed is computed anew. What fails is told, and the rest goes on; the exit code is then
    not 0.
    """
    from frepa_dist.evaluate.suite.config import read_suite
    from frepa_dist.evaluate.suite.page import REPORT, failure_rows, write_report
    from frepa_dist.evaluate.suite.run import run_suite
    from frepa_dist.evaluate.suite.summary import summarize
    from frepa_dist.evaluate.suite.tables import write_tables

    suite = read_suite(config, overrides)
    results = run_suite(suite, only=only, say=lambda line: click.echo(line, err=True))
    summary = summarize(suite, results)
    write_tables(suite, results, summary)
    write_report(suite, results, summary)
    known = len(results.cells) - results.num_computed
    click.echo(f"{results.num_computed} results computed, {known} known, {len(results.failures)} failed")
    for places, why in failure_rows(results):
        click.echo(f"failed  {places}: {why}", err=True)
    click.echo(f"report  {suite.output / REPORT}")
    sys.exit(results.exit_code)

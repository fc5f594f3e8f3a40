from __future__ import annotations

import json

import pytest

from cluster.sweep.journal import digest
from cluster.sweep.live import progress_line, progress_table
from cluster.sweep.page import build_page
from cluster.sweep.results import write_results
from frepa_dist.config import RunConfig
from shards.support.settings import load_settings
from tests.cluster.sweep.making import SEEDS, failure, finished, make_sweep, report, trial

WEIGHT, RATE = "method.hmi.weight", "train.base_learning_rate"


def records(num=10):
    return finished([({WEIGHT: 0.01 * (n + 1), RATE: (1e-3, 4e-3)[n % 2]}, 1 / (n + 1)) for n in range(num)])


def test_the_page_shows_results_importance_and_curves(tmp_path):
    build_page(make_sweep(), records(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for said in (
        "Permutation importance",
        "10 trials",
        "Parallel coordinates",
        "Learning curves",
        "partly luck",
    ):
        assert said in text
    assert text.count("<svg") == 3


def test_a_page_of_few_trials_says_why_there_is_no_importance(tmp_path):
    build_page(make_sweep(), digest([trial(0), failure(0, "no disk", final=True)]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Not computed" in text
    assert "no disk" in text


@pytest.mark.filterwarnings("error:.*collapsed")
def test_pictures_of_a_single_trial_have_room(tmp_path):
    sweep = make_sweep(space={RATE: {"loguniform": [1e-4, 1e-1]}})
    build_page(sweep, finished([({RATE: 1e-3}, 0.5)]), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("<svg") == 2


def test_a_sweep_leaves_tables_and_a_config_that_pretrain_takes(tmp_path):
    sweep = make_sweep(output=tmp_path)
    text = write_results(sweep, records())
    assert "best" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.csv",
        "table.json",
        "best.yaml",
        "report.html",
    }
    config = load_settings(RunConfig, tmp_path / "best.yaml")
    assert (config.method.hmi.weight, config.output) == (0.1, tmp_path / "best")
    assert config.train.keep_every is None
    assert len(json.loads((tmp_path / "table.json").read_text())) == 10


def test_seeds_are_put_together(tmp_path):
    sweep = make_sweep(output=tmp_path, space={WEIGHT: {"grid": [0.1, 0.2]}, **SEEDS})
    runs = [({WEIGHT: w, "train.seed": s}, w + s / 100) for w in (0.1, 0.2) for s in range(3)]
    write_results(sweep, finished(runs))
    first, second = json.loads((tmp_path / "settings.json").read_text())
    assert (first[WEIGHT], first["seeds"], second[WEIGHT]) == (0.1, 3, 0.2)
    assert "Settings over seeds" in (tmp_path / "report.html").read_text()


def test_progress_is_a_line_and_a_table():
    entries = [
        trial(0, {WEIGHT: 0.1, RATE: 1e-3}),
        report(0, 1, 0.5),
        trial(1),
        report(1, 1, 0.4, stopped=True),
    ]
    line = progress_line(make_sweep(), digest(entries))
    assert line == "sweep: 2 waiting, 1 running, 1 stopped, 2 reports; best high_band 0.4 (001)"
    table = progress_table(make_sweep(), digest(entries), 3)
    assert table.row_count == 2
    assert progress_table(make_sweep(), [], 3).row_count == 0

from __future__ import annotations

import csv
import io

from cluster.sweep.journal import digest
from cluster.sweep.table import count_states, find_best, setting_rows, to_csv, to_text, trial_rows
from tests.cluster.sweep.making import SEEDS, failure, finished, make_sweep, report, trial

WEIGHT = "method.hmi.weight"


def test_the_best_comes_first_and_what_failed_last():
    entries = [trial(n, {WEIGHT: n / 10}) for n in range(3)]
    entries += [report(0, 1, 0.9, last=True), report(1, 1, 0.7, last=True), failure(2, "no disk", final=True)]
    sweep, records = make_sweep(), digest(entries)
    rows = trial_rows(sweep, records)
    assert [row["trial"] for row in rows] == ["001", "000", "002"]
    assert rows[2]["error"] == "no disk"
    assert "no disk" in to_text(rows)
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["high_band"] for row in read] == ["0.7", "0.9", ""]
    assert count_states(records, 4) == {"waiting": 1, "running": 0, "done": 2, "stopped": 0, "failed": 1}


def test_who_came_to_the_end_goes_before_who_was_stopped():
    entries = [trial(0), trial(1), report(0, 1, 0.1, stopped=True), report(1, 1, 0.5, last=True)]
    assert find_best(make_sweep(), digest(entries)).trial.name == "001"
    assert find_best(make_sweep(), digest(entries[:3])).trial.name == "000"
    assert find_best(make_sweep(), digest(entries[:2])) is None


def test_more_is_better_where_it_is():
    records = finished([({WEIGHT: 0.1}, 0.6), ({WEIGHT: 0.2}, 0.8)])
    sweep = make_sweep(metric={"kind": "probe", "images": "x"})
    assert find_best(sweep, records).trial.name == "001"
    assert [row["trial"] for row in trial_rows(sweep, records)] == ["001", "000"]


def test_a_lucky_seed_does_not_win():
    sweep = make_sweep(space={WEIGHT: {"grid": [0.1, 0.2]}, **SEEDS})
    lucky = [({WEIGHT: 0.1, "train.seed": s}, value) for s, value in enumerate((0.1, 0.9, 0.9))]
    steady = [({WEIGHT: 0.2, "train.seed": s}, value) for s, value in enumerate((0.5, 0.5, 0.5))]
    records = finished(lucky + steady)
    best = find_best(sweep, records)
    assert (best.trial.values[WEIGHT], best.value, best.seeds) == (0.2, 0.5, 3)
    assert best.describe("high_band") == "high_band 0.5 (mean of 3 seeds, from 003)"
    first, second = setting_rows(sweep, records)
    assert (first[WEIGHT], first["mean high_band"], first["standard deviation"], first["seeds"]) == (
        0.2,
        0.5,
        0,
        3,
    )
    assert second["standard deviation"] > 0.4
    # nor a setting of which one seed alone came through
    assert find_best(sweep, finished(lucky[:1] + steady)).trial.values[WEIGHT] == 0.2

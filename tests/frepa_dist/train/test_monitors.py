"""DeepSpeed's monitors as they are; test_opponent.py holds that a run writes to them."""

from __future__ import annotations

import errno
import importlib.util
from collections import defaultdict

import pytest

from frepa_dist.config import TrainConfig
from frepa_dist.train.engines import student_settings
from frepa_dist.train.monitors import Monitors
from shards.support.errors import ConfigError
from tests.one_rank import one_rank


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank() as world:
        yield world


def write_steps(monitors, *steps, factor=1.0):
    for step in steps:
        monitors.write({"step": step, "loss": factor * step, "loss/rec": 2 * factor * step})


def test_a_run_that_goes_back_appends_and_has_no_step_twice(tmp_path):
    block = {"csv_monitor": {"enabled": True}}
    path = tmp_path / "monitors" / "csv" / "loss_rec.csv"
    first = Monitors(block, tmp_path)
    first.go_back(0)  # nothing is there
    write_steps(first, 1, 2, 3)
    path.write_text(path.read_text() + "4")  # torn by a crash
    second = Monitors(block, tmp_path)
    second.go_back(2)
    write_steps(second, 3, 4, factor=10.0)
    assert path.read_text().split() == ["step,rec", "1,2.0", "2,4.0", "3,60.0", "4,80.0"]
    second.go_back(1)  # in the same process
    write_steps(second, 2)
    assert path.read_text().split() == ["step,rec", "1,2.0", "2,4.0"]


def test_files_go_where_a_block_says(tmp_path):
    block = {"enabled": True, "output_path": str(tmp_path / "elsewhere"), "job_name": "mine"}
    write_steps(Monitors({"csv_monitor": block}, tmp_path / "run"), 1)
    assert (tmp_path / "elsewhere" / "mine" / "loss.csv").is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{}, {"csv_monitor": None}, {"csv_monitor": {"enabled": False}}])
def test_nothing_is_written_where_none_is_on(settings, tmp_path):
    monitors = Monitors(settings, tmp_path)
    monitors.go_back(1)
    write_steps(monitors, 1)
    assert not list(tmp_path.iterdir())


def test_wrong_blocks_and_missing_packages_are_errors_that_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.deepspeed\.csv_monitor\.enabled"):
        Monitors({"csv_monitor": {"enabled": "perhaps"}, "tensorboard": {"enabled": True}}, tmp_path)
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match="install 'wandb'"):
            Monitors({"wandb": {"enabled": True}}, tmp_path)


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch, capsys):
    monitors = Monitors({"csv_monitor": {"enabled": True}}, tmp_path)

    def fail(events):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(monitors._master, "write_events", fail)
    write_steps(monitors, 7)
    assert "step 7 are not written" in capsys.readouterr().err


def test_engines_are_told_of_no_monitor():
    config = TrainConfig(steps=1, deepspeed={"csv_monitor": {"enabled": True}, "wall_clock_breakdown": True})
    assert student_settings(config).more == {"wall_clock_breakdown": True}


def test_tensorboard_drops_the_steps_that_are_written_again(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    block = {"tensorboard": {"enabled": True}}
    write_steps(Monitors(block, tmp_path), 1, 2, 3)
    second = Monitors(block, tmp_path)
    second.go_back(2)
    write_steps(second, 3, 4, factor=10.0)
    read = EventAccumulator(str(tmp_path / "monitors" / "tensorboard"))
    read.Reload()
    values = defaultdict(list)
    for event in read.Scalars("loss"):
        values[event.step].append(event.value)
    assert values == {1: [1], 2: [2], 3: [30], 4: [40]}

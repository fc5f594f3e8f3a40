from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shards.support.errors import DataError, EnvironmentFault
from shards.workers.ray_pool import run_tasks_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


# functions inside functions travel by value: Ray's workers cannot import a test


def make_divide():
    def divide(number: int) -> int:
        if number < 0:
            raise DataError("negative", where=number, fix="take another one")
        return 36 // number

    return divide


def test_every_task_is_done_once():
    results = run_tasks_on_ray(make_divide(), range(1, 23), jobs=2)
    assert sorted(results) == sorted(36 // n for n in range(1, 23))


def test_errors_come_back_as_themselves():
    with pytest.raises(DataError, match=r"negative.*take another one") as caught:
        list(run_tasks_on_ray(make_divide(), [1, -2, 3], jobs=2))
    assert caught.value.where == -2
    with pytest.raises(ZeroDivisionError):
        list(run_tasks_on_ray(make_divide(), [1, 0], jobs=1))


def test_a_task_survives_the_death_of_its_worker(tmp_path: Path):
    def die_once(marker: str) -> int:
        if not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    markers = [str(tmp_path / name) for name in ("a", "b")]
    pids = list(run_tasks_on_ray(die_once, markers, jobs=2))
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(EnvironmentFault, match=r"127\.0\.0\.1:1.*--executor local"):
        list(run_tasks_on_ray(make_divide(), [1], jobs=1, address="127.0.0.1:1"))

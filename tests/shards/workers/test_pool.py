"""The pool: errors come back whole, and no worker stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from shards.support.errors import DataError, EnvironmentFault
from shards.workers.pool import run_tasks


def end_this_process(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def raise_data_error(task: int) -> int:
    if task == 3:
        raise DataError("third", where="x")
    time.sleep(0.01)
    return task


def test_a_killed_worker_is_told():
    with pytest.raises(EnvironmentFault, match="fewer jobs"):
        list(run_tasks(end_this_process, range(4), 2))


def test_an_error_in_a_worker_ends_all_and_keeps_its_fields():
    with pytest.raises(DataError) as caught:
        list(run_tasks(raise_data_error, range(1000), 2))
    assert (caught.value.what, caught.value.where) == ("third", "x")
    assert not multiprocessing.active_children()


def test_tasks_are_not_all_submitted_at_once():
    drawn = []

    def tasks():
        for number in range(50):
            drawn.append(number)
            yield number

    results = run_tasks(abs, tasks(), 2)
    first = next(results)
    assert len(drawn) <= 6
    assert sorted([first, *results]) == list(range(50))

"""Threads of processes that share a machine's cores."""

from __future__ import annotations

import os

import pytest
import torch

from frepa_dist.threads import share_cores


@pytest.fixture(autouse=True)
def as_before():
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "processes", "expected"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_processes_share_the_cores_that_they_may_use(monkeypatch, cores, processes, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    share_cores(processes)
    assert torch.get_num_threads() == expected


def test_who_says_how_many_is_heard(monkeypatch):
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share_cores(1)
    assert torch.get_num_threads() == 3

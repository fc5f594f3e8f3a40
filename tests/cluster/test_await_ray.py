from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.await_ray import await_nodes
from cluster.launch import free_port
from shards.support.errors import EnvironmentFault


def test_it_waits_for_all_nodes():
    counts = iter([0, 1, 1, 3])
    await_nodes("head:1", 2, 60.0, lambda _: next(counts), poll_seconds=0)
    assert not list(counts)


def test_the_wait_ends():
    with pytest.raises(EnvironmentFault, match=r"head:1: 1 of 2 nodes .* after 0 s"):
        await_nodes("head:1", 2, 0.05, lambda _: 1, poll_seconds=0.1)


def test_a_job_script_sees_that_nobody_came():
    command = [sys.executable, "-m", "cluster.await_ray", f"127.0.0.1:{free_port()}", "--nodes", "1"]
    ran = subprocess.run([*command, "--timeout", "0.1"], capture_output=True, text=True, check=False)
    assert ran.returncode == 5
    assert "0 of 1 nodes" in ran.stderr

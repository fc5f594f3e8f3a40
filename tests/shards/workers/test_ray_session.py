from __future__ import annotations

import os

import psutil
import pytest
from ray._private import ray_constants

from shards.workers.ray_session import CLUSTER_VARIABLE, ray_session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def test_a_local_ray_listens_on_the_loopback_alone():
    before = os.environ.get(CLUSTER_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER
    # of other tests in this process
    others = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    with ray_session(None, num_cpus=1):
        before_ray = {(c.laddr.ip, c.laddr.port) for c in others}
        this = psutil.Process()
        listening = [
            (process.name(), connection.laddr.ip)
            for process in [this, *this.children(recursive=True)]
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
            and (connection.laddr.ip, connection.laddr.port) not in before_ray
        ]
    assert len(listening) >= 3  # what is looked for is there
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert (os.environ.get(CLUSTER_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER) == before

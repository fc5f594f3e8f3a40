import socket
import urllib.request

import pytest

from shards.support.errors import EnvironmentFault
from shards.support.telemetry import Telemetry


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_logged_numbers_can_be_scraped_and_the_port_is_given_back():
    port = free_port()
    for value in (0.5, 0.25):
        with Telemetry.serve(port) as telemetry:
            telemetry.set_step({"loss/rec": value, "time/forward": 2.0})
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        assert f"frepa_loss_rec {value}" in text
        assert "frepa_time_forward_seconds 2.0" in text


def test_a_port_in_use_is_an_error_that_says_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=r"train\.metrics_port") as caught, Telemetry.serve(port):
            pass
    assert caught.value.exit_code == 5


def test_without_a_port_nothing_is_served():
    with Telemetry.serve(None) as telemetry:
        telemetry.set_step({"loss": 1.0})

import socket

import pytest

from cluster.launch import check_port, deepspeed_command, free_port
from shards.support.errors import EnvironmentFault


def test_a_port_in_use_is_refused_before_ranks_start():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentFault, match="--master-port"):
            check_port(taken.getsockname()[1])


def test_a_free_port_passes():
    check_port(free_port())


def test_the_command_is_the_launcher_with_our_module():
    command = deepspeed_command(["--config", "x"], num_ranks=2, master_port=1234)
    assert command[1].endswith("deepspeed")
    assert command[-4:] == ["--module", "frepa_dist.train", "--config", "x"]
    assert command[command.index("--num_accelerators") + 1] == "2"


def test_only_the_devices_that_the_user_allows_are_taken():
    command = deepspeed_command([], num_ranks=1, master_port=1, visible_devices="3,5")
    assert command[command.index("--include") + 1] == "localhost:3"
    assert "--num_accelerators" not in command

import base64
import json
import socket

import pytest

from cluster.launch import check_port, free_port, launch_command
from cluster.nodes import Nodes
from shards.support.errors import EnvironmentFault


def test_a_port_in_use_is_refused_before_ranks_start():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentFault, match="--master-port"):
            check_port(taken.getsockname()[1])


def test_a_free_port_passes():
    check_port(free_port())


def world_of(command: list[str]) -> dict[str, list[int]]:
    (encoded,) = [part.split("=", 1)[1] for part in command if part.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(encoded))


def test_the_command_is_the_launcher_with_our_module():
    command = launch_command(["--config", "x"], Nodes((2,), master_port=1234))
    assert command[-4:] == ["--module", "frepa_dist.train", "--config", "x"]
    assert world_of(command) == {"node-0": [0, 1]}
    assert {"--node_rank=0", "--master_addr=127.0.0.1", "--master_port=1234"} <= set(command)


def test_only_the_devices_that_the_user_allows_are_taken():
    command = launch_command([], Nodes((1,), master_port=1), visible_devices="3,5")
    assert world_of(command) == {"node-0": [3]}


def test_each_node_starts_its_own_ranks():
    nodes = Nodes((2, 1), node_rank=1, master_addr="10.0.0.1", master_port=29500)
    command = launch_command([], nodes, visible_devices="3")
    assert world_of(command) == {"node-0": [0, 1], "node-1": [3]}
    assert {"--node_rank=1", "--master_addr=10.0.0.1"} <= set(command)
    assert list(nodes.local_ranks) == [2]

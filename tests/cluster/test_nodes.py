from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.nodes import NodeOptions, Nodes, expand_hostlist, find_nodes, read_hostfile
from shards.support.errors import ConfigError

SLURM = {
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08],gpu12",
    "SLURM_JOB_ID": "123456",
}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "2",
    "RANK": "1",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("gpu[07-10]", ["gpu07", "gpu08", "gpu09", "gpu10"]),
        ("a[1,3-4]-x,b2", ["a1-x", "a3-x", "a4-x", "b2"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("node-a.b[099-101]", ["node-a.b099", "node-a.b100", "node-a.b101"]),
    ],
)
def test_slurm_names_are_written_out(text, names):
    assert expand_hostlist(text) == names


@pytest.mark.parametrize("text", ["", "a[1-", "a[x]", "a[1-2"])
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(ConfigError, match="no list of hosts"):
        expand_hostlist(text)


def test_without_options_it_is_this_machine_alone():
    assert find_nodes(NodeOptions(), {}, 2) == Nodes((2,))
    assert find_nodes(NodeOptions(num_ranks=4, master_port=7), {}, 2) == Nodes((4,), master_port=7)
    alone = {**SLURM, "SLURM_STEP_NUM_NODES": "1"}
    assert find_nodes(NodeOptions(), alone, 2) == Nodes((2,))
    assert find_nodes(NodeOptions(num_nodes=1), SLURM, 2) == Nodes((2,))


def test_srun_says_where_the_nodes_are():
    assert find_nodes(NodeOptions(num_ranks=8), SLURM, 2) == Nodes((8, 8, 8), 1, "gpu07", 23456)
    other = find_nodes(NodeOptions(num_ranks=8), {**SLURM, "SLURM_NODEID": "2"}, 2)
    assert list(other.local_ranks) == list(range(16, 24))
    assert other.world_size == 24


def test_one_task_per_rank_is_refused():
    with pytest.raises(ConfigError, match="--ntasks-per-node=1"):
        find_nodes(NodeOptions(), {**SLURM, "SLURM_STEP_NUM_TASKS": "24"}, 2)


def test_a_pytorchjob_says_where_the_pods_are():
    assert find_nodes(NodeOptions(), KUBEFLOW, 4) == Nodes((4, 4), 1, "job-master-0", 23456)
    with pytest.raises(ConfigError, match="elasticPolicy"):
        find_nodes(NodeOptions(), {**KUBEFLOW, "PET_NNODES": "1:4"}, 4)


def test_an_indexed_job_says_which_of_its_pods_this_is():
    named = NodeOptions(num_nodes=3, master_addr="job-0.job")
    index = {"JOB_COMPLETION_INDEX": "2"}
    assert find_nodes(named, index, 4) == Nodes((4, 4, 4), 2, "job-0.job", 29500)
    assert find_nodes(replace(named, node_rank=1), index, 4).node_rank == 1
    assert find_nodes(NodeOptions(), index, 4) == Nodes((4,))  # a job of single pods
    with pytest.raises(ConfigError, match="--master-addr"):
        find_nodes(replace(named, master_addr=None), index, 4)
    with pytest.raises(ConfigError, match="allowed: 0 to 2"):
        find_nodes(named, {"JOB_COMPLETION_INDEX": "3"}, 4)


def test_options_come_first():
    named = NodeOptions(num_ranks=1, num_nodes=2, node_rank=0, master_addr="10.0.0.1")
    assert find_nodes(named, SLURM, 2) == Nodes((1, 1), 0, "10.0.0.1", 29500)
    with pytest.raises(ConfigError, match="--node-rank"):
        find_nodes(NodeOptions(num_nodes=2), {}, 2)
    with pytest.raises(ConfigError, match="allowed: 0 to 1"):
        find_nodes(NodeOptions(num_nodes=2, node_rank=2, master_addr="x"), {}, 2)


def test_a_hostfile_is_that_of_the_deepspeed_launcher(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nworker-1 slots=8\n\nworker-2   slots=4  # the old one\n")
    assert read_hostfile(path) == {"worker-1": 8, "worker-2": 4}
    named = NodeOptions(hostfile=path, node_rank=1)
    assert find_nodes(named, {}, 2) == Nodes((8, 4), 1, "worker-1", 29500)
    with pytest.raises(ConfigError, match="which of them"):
        find_nodes(NodeOptions(hostfile=path), {}, 2)
    path.write_text("worker-1 slots=8\nworker-1 slots=8\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_hostfile(path)
    path.write_text("worker-1 8\n")
    with pytest.raises(ConfigError, match="slots=N"):
        read_hostfile(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")

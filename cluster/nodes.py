"""Where a run's ranks are: on this machine alone, or on several that start the same command each.

Told by options, by a hostfile (that of the `deepspeed` launcher), by Slurm's `srun`, or by the variables that
Kubeflow's PyTorchJob sets in its pods. In the pods of an indexed Job of Kubernetes, options say all but which
of them this is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.support.errors import ConfigError

LOCALHOST = "127.0.0.1"
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which of them this is.

    Attributes:
        slots: ranks of each node.
        node_rank: which one this is.
        master_addr: where the ranks meet: an address of node 0.
        master_port: the port there; None takes a free one at every start (one node only).
    """

    slots: tuple[int, ...]
    node_rank: int = 0
    master_addr: str = LOCALHOST
    master_port: int | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(self.slots)

    @property
    def local_ranks(self) -> range:
        """The ranks of this node, by their place among all."""
        first = sum(self.slots[: self.node_rank])
        return range(first, first + self.slots[self.node_rank])

    @property
    def is_main(self) -> bool:
        """Whether rank 0 is here."""
        return self.node_rank == 0


@dataclass(frozen=True)
class NodeOptions:
    """What the command line says of nodes; None where it says nothing."""

    num_ranks: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    hostfile: Path | None = None


def find_nodes(options: NodeOptions, environment: Mapping[str, str], default_ranks: int) -> Nodes:
    """Find out where the ranks are; the command line comes before the environment.

    Args:
        options: of the command line.
        environment: variables of this process.
        default_ranks: ranks of this node where nothing says.

    Raises:
        ConfigError: the sources are incomplete or contradict each other.
    """
    ranks = options.num_ranks or default_ranks
    if options.hostfile is not None:
        return _from_hostfile(options)
    if options.num_nodes is not None and options.num_nodes > 1:
        rank = options.node_rank
        if rank is None and "JOB_COMPLETION_INDEX" in environment:
            rank = int(environment["JOB_COMPLETION_INDEX"])
        if rank is None or options.master_addr is None:
            raise ConfigError(
                "several nodes need to know each other",
                where="--num-nodes",
                fix="give --node-rank (0, 1, ...: another on each) and --master-addr (of node 0, on all)",
            )
        return _checked(
            (ranks,) * options.num_nodes,
            rank,
            options.master_addr,
            options.master_port or DEFAULT_PORT,
        )
    if options.num_nodes is None and int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        return _from_slurm(options, environment, ranks)
    if options.num_nodes is None and environment.get("PET_NNODES", "1") != "1":
        return _from_kubeflow(options, environment, ranks)
    return Nodes((ranks,), 0, LOCALHOST, options.master_port)


def _from_hostfile(options: NodeOptions) -> Nodes:
    assert options.hostfile is not None
    hosts = read_hostfile(options.hostfile)
    if len(hosts) == 1:
        return Nodes(tuple(hosts.values()), 0, LOCALHOST, options.master_port)
    if options.node_rank is None:
        raise ConfigError(
            f"{len(hosts)} hosts: which of them is this one?",
            where="--hostfile",
            fix="give --node-rank: the place of this host in the file, from 0",
        )
    address = options.master_addr or next(iter(hosts))
    return _checked(tuple(hosts.values()), options.node_rank, address, options.master_port or DEFAULT_PORT)


def _from_slurm(options: NodeOptions, environment: Mapping[str, str], ranks: int) -> Nodes:
    """Nodes of a job step; see OUTPUT ENVIRONMENT VARIABLES in srun(1)."""
    num_nodes = int(environment["SLURM_STEP_NUM_NODES"])
    if int(environment.get("SLURM_STEP_NUM_TASKS", num_nodes)) != num_nodes:
        raise ConfigError(
            "the launcher of a node starts its ranks by itself",
            where="srun",
            fix="start one task on each node: srun --ntasks-per-node=1 frepa pretrain ...",
        )
    address = options.master_addr or expand_hostlist(environment["SLURM_STEP_NODELIST"])[0]
    # two jobs that share a node should not meet on one port, and all nodes must name the same
    port = options.master_port or 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000
    return _checked((ranks,) * num_nodes, int(environment["SLURM_NODEID"]), address, port)


def _from_kubeflow(options: NodeOptions, environment: Mapping[str, str], ranks: int) -> Nodes:
    """Pods of a PyTorchJob: PET_NNODES, PET_NODE_RANK, MASTER_ADDR, MASTER_PORT."""
    if not environment["PET_NNODES"].isdigit():
        raise ConfigError(
            f"a number of nodes that changes ({environment['PET_NNODES']}) is not supported",
            where="PET_NNODES",
            fix="leave elasticPolicy out of the PyTorchJob",
        )
    rank = options.node_rank
    if rank is None:
        rank = int(environment.get("PET_NODE_RANK", environment.get("RANK", "0")))
    address = options.master_addr or environment.get("PET_MASTER_ADDR", environment.get("MASTER_ADDR"))
    if address is None:
        raise ConfigError("PET_NNODES is set, MASTER_ADDR is not", fix="give --master-addr and --num-nodes")
    named = environment.get("PET_MASTER_PORT", environment.get("MASTER_PORT", DEFAULT_PORT))
    return _checked(
        (ranks,) * int(environment["PET_NNODES"]), rank, address, options.master_port or int(named)
    )


def _checked(slots: tuple[int, ...], node_rank: int, address: str, port: int) -> Nodes:
    if not 0 <= node_rank < len(slots):
        raise ConfigError(f"no node {node_rank}", where="--node-rank", allowed=f"0 to {len(slots) - 1}")
    return Nodes(slots, node_rank, address, port)


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their ranks, in order: lines `NAME slots=N`, `#` begins a comment.

    Raises:
        ConfigError: there is no such file, or a line is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if found is None or found[1] in hosts:
            raise ConfigError(
                f"line {number} is no host: {line!r}", where=path, allowed="NAME slots=N, each name once"
            )
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError("names no host", where=path, allowed="lines NAME slots=N")
    return hosts


def expand_hostlist(text: str) -> list[str]:
    """Names of Slurm's short form: `a[01-03,7]-x,b` is a01-x, a02-x, a03-x, a7-x and b.

    Raises:
        ConfigError: brackets that do not close, or a range that is none.
    """
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        prefixes = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            endings = [plain] if plain else _expand_ranges(ranges, text)
            prefixes = [prefix + ending for prefix in prefixes for ending in endings]
        names += prefixes
    if not names or text.count("[") != text.count("]"):
        raise ConfigError(f"no list of hosts: {text!r}", where="SLURM_STEP_NODELIST")
    return names


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise ConfigError(f"no list of hosts: {text!r}", where="SLURM_STEP_NODELIST")
        first, last = found[1], found[2] or found[1]
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers

"""Preflight: what would stop a run, or slow it down, found in a minute and before GPUs are paid for.

Each check gives findings; a check that fails does not keep the others from being made.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import TYPE_CHECKING, Literal, NamedTuple

from packaging.requirements import Requirement

from cluster.launch import free_port, launch_command, rank_environment
from cluster.nodes import Nodes
from shards.support.errors import FrepaError

if TYPE_CHECKING:
    from frepa_dist.config import RunConfig
    from frepa_dist.models.cost import Cost

State = Literal["ok", "warning", "bad"]
SHOWN_PACKAGES = ("torch", "deepspeed", "timm", "numpy")
# below this DeepSpeed's ranks on CPU, NCCL and the loaders' workers run out of shared memory
SHARED_MEMORY_BYTES = 1 << 30
# of a device's memory, what libraries' workspaces, fragmentation and the CUDA context leave
USABLE_SHARE = 0.9
REDUCE_SECONDS = 180


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        check: its name.
        state: whether a run can start.
        says: what was found.
        fix: how to mend it.
    """

    check: str
    state: State
    says: str
    fix: str = ""


def check_packages() -> Iterator[Finding]:
    """Are the versions those that the package asks for?"""
    wrong = []
    for text in distribution("frepa").requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        yield Finding("packages", "bad", "; ".join(wrong), "pip install --upgrade frepa")
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN_PACKAGES)
    python = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding("packages", "ok", f"Python {python}, {shown}")


def check_devices(num_ranks: int) -> Iterator[Finding]:
    """Is there a GPU for each rank, or a core?"""
    import torch

    number = torch.cuda.device_count()
    if not number:
        cores = len(os.sched_getaffinity(0))
        state: State = "warning" if cores < num_ranks else "ok"
        yield Finding("devices", state, f"no GPU; {cores} cores for {num_ranks} ranks", "use fewer ranks")
        return
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(number)}))
    fix = "use fewer ranks, or show more devices in CUDA_VISIBLE_DEVICES"
    yield Finding("devices", "bad" if number < num_ranks else "ok", f"{number} GPUs: {names}", fix)


def check_shared_memory() -> Iterator[Finding]:
    """Is there shared memory for ranks and loaders?"""
    free = shutil.disk_usage("/dev/shm").free  # noqa: S108
    state: State = "ok" if free >= SHARED_MEMORY_BYTES else "warning"
    fix = "start the container with more, as `docker run --shm-size 8g`, or mount a larger /dev/shm"
    yield Finding("shared memory", state, f"{free / 2**30:.1f} GiB free", fix)


def check_ranks(num_ranks: int) -> Iterator[Finding]:
    """Do ranks meet, and how fast do they add up gradients?"""
    environment, visible = rank_environment()
    nodes = Nodes((num_ranks,), master_port=free_port())
    command = launch_command([], nodes, visible, module="cluster.doctor_ranks")
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=REDUCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        fix = "look at the network between the ranks; NCCL_DEBUG=INFO says what it does"
        yield Finding("ranks", "bad", f"{num_ranks} ranks did not meet in {REDUCE_SECONDS} s", fix)
        return
    found = [line for line in done.stdout.splitlines() if line.startswith('{"all_reduce')]
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in said if "error" in line.lower()), said[-1] if said else "no word")
        yield Finding("ranks", "bad", f"{num_ranks} ranks could not meet: {why}")
        return
    measured = json.loads(found[-1])
    yield Finding(
        "ranks",
        "ok",
        f"{num_ranks} ranks meet by {measured['backend']}; all-reduce of "
        f"{measured['all_reduce_bytes'] >> 20} MiB at {measured['bus_bytes_per_second'] / 1e9:.2f} GB/s "
        "on the bus",
    )


def check_batch(config: RunConfig, num_ranks: int) -> Iterator[Finding]:
    """Does the global batch fit the ranks?"""
    from shards.read.order import check_batch_sizes

    train = config.train
    accumulation = check_batch_sizes(train.global_batch_size, num_ranks, train.micro_batch_size)
    parts = f"{num_ranks} ranks x {train.micro_batch_size} x {accumulation} accumulated"
    yield Finding("batch", "ok", f"{train.global_batch_size} = {parts}")


def count_steps(config: RunConfig, num_ranks: int) -> tuple[int, int]:
    """Steps of the first epoch, and of the whole run; 0 where the samples fill no global batch."""
    from shards.read.stream import SampleStream

    stream = SampleStream(
        config.stream_config().model_copy(update={"num_workers": 0}),
        config.order_config(),
        0,
        num_ranks,
        config.train.micro_batch_size,
    )
    return stream.num_batches(0), config.train.steps or stream.total_batches(config.train.epochs or 0)


def check_data(config: RunConfig, num_ranks: int) -> Iterator[Finding]:
    """Are the shards there, with the HF tokens asked for, and can one sample of each modality be read?"""
    from shards.read.reader import ShardReader
    from shards.read.views import open_snapshot

    snapshot = open_snapshot(config.stream_config())
    batches, steps = count_steps(config, num_ranks)
    if not batches:
        fix = "build more shards, or take a smaller global batch"
        yield Finding("data", "bad", f"{snapshot.counts.samples} samples fill no global batch", fix)
        return
    reader = ShardReader(config.data.root, snapshot)
    for modality in snapshot.modalities:
        number = next(i for i, s in enumerate(snapshot.shards) if s.modality == modality and s.num_samples)
        reader.read(number, 0)
    held = f"{snapshot.counts.samples} samples of {', '.join(snapshot.modalities)}"
    length = f"{batches} steps an epoch, {steps} in all ({steps / batches:.1f} epochs)"
    yield Finding("data", "ok", f"{held} in {len(snapshot.shards)} shards; {length}")


def check_ports(config: RunConfig, num_ranks: int) -> Iterator[Finding]:
    """Are the ports of the metrics free: that of this node's supervisor, and those of the ranks?"""
    metrics = config.train.metrics
    if not metrics.port:  # none, or any that is free
        return
    first, last = metrics.port - 1, metrics.port + num_ranks - 1
    taken = []
    for port in range(first, last + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((metrics.address, port))
            except OSError:
                taken.append(str(port))
    if taken:
        fix = (
            f"choose another train.metrics.port: rank r takes the port + r, the supervisor the port - 1, so "
            f"{num_ranks + 1} in a row; or 0, which takes any"
        )
        yield Finding("ports", "bad", f"{', '.join(taken)} of {metrics.address} in use", fix)
    else:
        yield Finding("ports", "ok", f"{first} to {last} free for metrics")


def check_output(config: RunConfig, cost: Cost) -> Iterator[Finding]:
    """Is the run folder unused and writable, and does its disk hold the checkpoints?"""
    from frepa_dist.runs import check_unused

    check_unused(config.output)
    place = config.output.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield Finding("output", "bad", f"{place} cannot be written to", "choose another `output`")
        return
    # all of the optimizer, whichever rank holds it, and the student once more in fp32 for evaluation
    trained = sum(cost.memory[name] for name in ("weights", "optimizer", "other networks"))
    one = trained + 4 * cost.parameters["student"]
    number = config.train.keep_checkpoints + 1  # the next is written before the oldest goes
    free = shutil.disk_usage(place).free
    says = f"{free / 2**30:.1f} GiB free for {number} checkpoints of about {one / 2**30:.2f} GiB"
    fix = "free disk space, keep fewer checkpoints (train.keep_checkpoints), or choose another `output`"
    yield Finding("output", "ok" if free > number * one else "bad", says, fix)


def check_memory(config: RunConfig, num_ranks: int, cost: Cost) -> Iterator[Finding]:
    """Does a rank's part fit where it computes?"""
    import torch

    if torch.cuda.is_available():
        room, place = torch.cuda.get_device_properties(0).total_memory, "of a GPU"
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_ranks
        place = "of this machine for each rank"
    says = f"about {cost.total_memory / 2**30:.1f} GiB a rank, counted; {room / 2**30:.1f} GiB {place}"
    fix = "a smaller train.micro_batch_size, a higher train.zero_stage, or activation_checkpointing"
    fits = cost.total_memory < USABLE_SHARE * room
    yield Finding("memory", "ok" if fits else "warning", says, fix)


def examine(config: RunConfig | None, num_ranks: int) -> Iterator[Finding]:
    """Make all checks; those of a run where there is a config.

    Args:
        config: of the run that is to start.
        num_ranks: processes on this machine.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", check_packages),
        ("devices", lambda: check_devices(num_ranks)),
        ("shared memory", check_shared_memory),
        ("ranks", lambda: check_ranks(num_ranks)),
    ]
    if config is not None:
        from frepa_dist.models.cost import count_cost

        checks += [
            ("batch", lambda: check_batch(config, num_ranks)),
            ("data", lambda: check_data(config, num_ranks)),
            ("ports", lambda: check_ports(config, num_ranks)),
            ("output", lambda: check_output(config, count_cost(config, 1))),
            ("memory", lambda: check_memory(config, num_ranks, count_cost(config, num_ranks))),
        ]
    for name, check in checks:
        try:
            yield from check()
        except FrepaError as error:
            yield Finding(name, "bad", str(error))

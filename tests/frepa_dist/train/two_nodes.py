"""Started by test_two_nodes.py in a network namespace of its own: two nodes, a cable between them, its cut.

python two_nodes.py RUN COMMAND...: starts COMMAND on both nodes, cuts the link once RUN has logged a few
steps until both have told of a fault, and prints the exit codes.

Node 1 is a second namespace, joined to this one by a pair of veth devices: TCP between them is the kernel's
own, and packets are lost without a word while the link is down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from frepa_dist.runs import read_json_lines, read_metrics

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CUT_AFTER = 4  # steps


def call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def connect() -> tuple[subprocess.Popen[bytes], list[str]]:
    """Make the second namespace; the process that holds it, and what is put before a command to run there."""
    call("ip", "link", "set", "lo", "up")
    holder = subprocess.Popen(["unshare", "--net", "sleep", "3000"])
    own = os.readlink("/proc/self/ns/net")
    wait(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, 10)
    there = ["nsenter", "--target", str(holder.pid), "--net"]
    call("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1", "netns", holder.pid)
    for number, prefix in enumerate(([], there)):
        call(*prefix, "ip", "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"veth{number}")
        call(*prefix, "ip", "link", "set", f"veth{number}", "up")
    call(*there, "ip", "link", "set", "lo", "up")
    return holder, there


def wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def nodes_with_fault(run: Path) -> set[int]:
    return {event["node"] for event in read_json_lines(run / "events.jsonl") if event["event"] == "fault"}


def main(run: Path, command: list[str]) -> None:
    holder, there = connect()
    nodes = []
    try:
        for number, prefix in enumerate(([], there)):
            place = ["--num-nodes", "2", "--node-rank", str(number), "--master-addr", ADDRESSES[0]]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"veth{number}"}
            nodes.append(subprocess.Popen([*prefix, *command, *place], env=environment, stdout=sys.stderr))
        wait(lambda: bool(read_metrics(run)) and read_metrics(run)[-1]["step"] >= CUT_AFTER, 300)
        call("ip", "link", "set", "veth0", "down")
        wait(lambda: nodes_with_fault(run) == {0, 1}, 300)
        call("ip", "link", "set", "veth0", "up")
        print(json.dumps([process.wait(timeout=600) for process in nodes]))
    finally:
        for process in nodes:
            process.kill()  # its ranks see that it is gone, and end
        holder.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

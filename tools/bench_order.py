"""The order of samples at full size: seconds and memory to plan an epoch, and to begin anywhere in it.

    python tools/bench_order.py [--world-size 256] [--global-batch-size 4096] [--samples-per-shard 2000]

17.6 M samples, the images of Frepa's seven public modalities, 1 % of them excluded as duplicates. There are
no pixels and no index: the plan needs the number of samples in each shard only. The first batch after a
resume is timed on a new plan each time, since a resumed run has nothing else.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np

from shards.order import EpochPlan, OrderConfig, plan_epoch

SAMPLES = {
    "ct": 9_973_332,
    "mri": 6_556_603,
    "xray": 601_426,
    "ultrasound": 87_291,
    "oct": 123_608,
    "fundus": 163_291,
    "dermoscopy": 98_397,
}


def create_shards(samples_per_shard: int) -> tuple[list[int], list[str], dict[int, np.ndarray]]:
    """Counts, modalities and 1 % of exclusions."""
    counts, modalities = [], []
    for modality, num in SAMPLES.items():
        shards = -(-num // samples_per_shard)
        counts += np.diff(np.arange(shards + 1) * num // shards).tolist()
        modalities += [modality] * shards
    rng = np.random.default_rng(0)
    exclusions = {i: np.flatnonzero(rng.random(count) < 0.01) for i, count in enumerate(counts)}
    return counts, modalities, exclusions


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--global-batch-size", type=int, default=4096)
    parser.add_argument("--world-size", type=int, default=256)
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    counts, modalities, exclusions = create_shards(args.samples_per_shard)
    config = OrderConfig(global_batch_size=args.global_batch_size, modality_weights={"fundus": 2.0})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(counts, exclusions, config, epoch, modalities=modalities)

    start = time.perf_counter()
    whole = plan(0)
    seconds = time.perf_counter() - start
    print(f"{whole.num_samples:,} samples in {len(counts):,} shards, {whole.num_batches:,} batches")
    print(f"plan: {seconds * 1e3:.1f} ms")

    places = [int(share * whole.num_batches) for share in (0.0, 0.25, 0.5, 0.9, 0.999)]
    times: dict[int, list[float]] = {k: [] for k in places}
    for repeat in range(args.repeats):  # in turn, so that a busy moment of the machine meets all places
        for k in places:
            start = time.perf_counter()
            plan(0).rank_batch(k, repeat % args.world_size, args.world_size)
            times[k].append(time.perf_counter() - start)
    medians = [statistics.median(values) for values in times.values()]
    for k, median in zip(places, medians, strict=True):
        print(f"resume at batch {k:5d}: plan and first batch of a rank in {median * 1e3:.2f} ms")
    print(f"slowest / fastest place: {max(medians) / min(medians):.2f}")

    start = time.perf_counter()
    for k in range(whole.num_batches):
        whole.batch(k)
    print(f"all global batches of the epoch: {time.perf_counter() - start:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory: {peak / 1024:.0f} MiB, of it {before / 1024:.0f} MiB before planning")


if __name__ == "__main__":
    main()

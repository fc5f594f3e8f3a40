"""Our loader beside webdataset's pipeline, mosaicml-streaming and litdata on the same images, in one run.

    python tools/bench_loader.py [--images 2048] [--decoded 512] [--rounds 5] [--skip-peers]

Images: synthetic fundus photographs, 512 pixels, half JPEG 92 and half PNG as the build writes it. Each side
reads them in one process, shuffled; the figure is images per second of that process' CPU time (all threads),
from the first image on. What a side reads ahead of it is not counted (webdataset: 100 images for its shuffle
buffer), so few images flatter it. The sides take turns within a round, each in a fresh fork; ratios are
medians over rounds. Peers are compared with where they are installed.

Raw: the stored bytes. Ours checks each crc32c, and no peer does. webdataset is given tars of images alone, as
well as our own tars, whose other members it has to read past. Decoded: every side decodes with the same call
of OpenCV; `own` is what a peer does by itself (Pillow). Ours is given once with the response map, which peers
do not have, and once without.

Resume: at 90 % of an epoch of 100,000 images of 96 pixels, in process, until the first raw sample is there;
ours starts from nothing (snapshot, exclusions, plan, index). Users of webdataset have to skip by iteration,
and the larger the images, the longer that takes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.dataset  # noqa: F401 (by our reader; imports are measured on no side)
import webdataset as wds
from bench_dataset import draw_pictures, write_dataset, write_image_tars, write_peers
from PIL import Image

from shards.dataset import load_snapshot
from shards.decoding import Stored, decode_image
from shards.read.kept import exclusion_rows
from shards.read.order import OrderConfig, plan_epoch
from shards.read.reader import ShardReader

PEERS = {"mosaicml-streaming": "streaming", "litdata": "litdata"}
BATCH = 64
Side = Callable[[], Iterable[Any]]


def our_places(root: Path, start: float = 0.0) -> Iterator[tuple[ShardReader, list[tuple[int, int]]]]:
    """The reader and the places of each batch, in the order of training, from a share of the epoch on."""
    snapshot = load_snapshot(root)
    excluded = exclusion_rows(root, snapshot)
    reader = ShardReader(root, snapshot)
    counts = [shard.num_samples for shard in snapshot.shards]
    plan = plan_epoch(counts, excluded, OrderConfig(global_batch_size=BATCH), 0)
    for k in range(int(start * plan.num_batches), plan.num_batches):
        slots = plan.batch(k)
        yield reader, list(zip(slots.shard.tolist(), slots.row.tolist(), strict=True))


def ours_raw(root: Path, start: float = 0.0) -> Iterator[bytes]:
    """Stored bytes, checked."""
    for reader, places in our_places(root, start):
        for shard, row in places:
            yield reader.read_bytes(shard, row)


def ours_decoded(root: Path) -> Iterator[Any]:
    """Pixels alone."""
    for data in ours_raw(root):
        yield decode(data)


def ours_samples(root: Path) -> Iterator[Any]:
    """Samples as training gets them: pixels and response map."""
    for reader, places in our_places(root):
        yield from reader.read_many(places)


def webdataset_raw(folder: Path) -> Iterator[bytes]:
    """Stored bytes, shuffled in webdataset's buffer."""
    tars = sorted(map(str, folder.glob("**/*.tar")))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), detshuffle=True).shuffle(1000)
    for sample in dataset:
        yield sample["jpg"] if "jpg" in sample else sample["png"]


def webdataset_own(folder: Path) -> Iterator[Any]:
    """Pixels by webdataset's own decoder."""
    tars = sorted(map(str, folder.glob("**/*.tar")))
    yield from wds.WebDataset(tars, shardshuffle=len(tars), detshuffle=True).shuffle(1000).decode("rgb8")


def streaming_raw(folder: Path) -> Iterator[bytes]:
    """Stored bytes by mosaicml-streaming."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    for sample in dataset:
        yield sample["image"]


def litdata_raw(folder: Path) -> Iterator[bytes]:
    """Stored bytes by litdata."""
    import litdata

    for sample in litdata.StreamingDataset(str(folder), shuffle=True):
        yield sample["image"]


def decode(data: bytes) -> Any:
    """Decode by the call that our loader makes."""
    return decode_image(data, Stored("png", "uint8", 512, 512, 3), "")


def decoded(side: Callable[[Path], Iterable[bytes]], folder: Path) -> Iterator[Any]:
    """Decode what a side reads, by the same call as ours."""
    return map(decode, side(folder))


def own_decoded(side: Callable[[Path], Iterable[bytes]], folder: Path) -> Iterator[Any]:
    """Decode what a side reads by Pillow, as its own image types do."""
    return (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in side(folder))


def consume(side: Side) -> tuple[float, int]:
    """Read a side from its first item to its end; return CPU seconds and how many items came."""
    items = iter(side())
    next(items)
    cpu, num = time.process_time(), 1
    for _ in items:
        num += 1
    return time.process_time() - cpu, num


def seconds_to_first(side: Side) -> float:
    """Wall seconds until a side gives its first item."""
    begin = time.perf_counter()
    next(iter(side()))
    return time.perf_counter() - begin


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fork; this process starts no thread, which would make forking unsafe."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        cv2.setNumThreads(1)
        sender.send(function(*args))
        sender.close()
        os._exit(0)  # some peers' threads would keep it

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        if not receiver.poll(300):
            process.kill()
            sys.exit(f"{function.__name__}{args}: no end after 300 s")
        return receiver.recv()
    finally:
        process.join()


def compare(title: str, sides: dict[str, Side], num: int, rounds: int) -> None:
    """Print images per CPU-second of each side over `num` images, and the ratio of the first one to it."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for r in range(rounds + 1):
        for name, side in sides.items():
            cpu, seen = in_fork(consume, side)
            assert seen == num, (name, seen)
            if r:  # the first round warms the page cache
                rates[name].append((num - 1) / cpu)
    print(f"\n{title}: images per CPU-second, {num} images, median of {rounds} rounds")
    print("| side | images/CPU-s | ours / it |\n|---|---:|---:|")
    first = rates[next(iter(sides))]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        print(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} |", flush=True)


def prepare(folder: Path, num: int, num_decoded: int, names: Sequence[str]) -> None:
    """Write images for reading and, fewer, for decoding in all formats; and small ones for the resume."""
    pictures = draw_pictures(num, 512, 100)
    size = sum(len(picture.data) for picture in pictures) / len(pictures) / 1024
    print(f"{num} images of {size:.0f} KiB on average")
    for part, some in (("raw", pictures), ("decoded", pictures[:num_decoded])):
        (folder / part).mkdir()
        write_dataset(folder / part / "ours", some, per_shard=100)
        write_image_tars(folder / part / "tars", some, 100)
        write_peers(folder / part, some, names)
    small = draw_pictures(1000, 96, 50)
    write_dataset(folder / "resume", small, per_shard=1000, links=100)
    write_image_tars(folder / "resume_tars", small, 1000)


def peers_of(folder: Path, names: Sequence[str]) -> dict[str, tuple[Callable[[Path], Iterator[bytes]], Path]]:
    """How each peer reads raw bytes, and where from."""
    peers: dict[str, tuple[Callable[[Path], Iterator[bytes]], Path]] = {
        "webdataset, images alone": (webdataset_raw, folder / "tars"),
        "webdataset, our tars": (webdataset_raw, folder / "ours"),
    }
    if "mosaicml-streaming" in names:
        peers["mosaicml-streaming"] = (streaming_raw, folder / "mds")
    if "litdata" in names:
        peers["litdata"] = (litdata_raw, folder / "lit")
    return peers


def skip_by_iteration(folder: Path) -> Iterator[Any]:
    """The rest of an epoch of webdataset, after 90,000 of 100,000 samples."""
    for n, sample in enumerate(wds.WebDataset([str(folder / "000000.tar")] * 100, shardshuffle=False)):
        if n >= 90_000:
            yield sample


def compare_resume(folder: Path, rounds: int) -> None:
    """Print the seconds to the first raw sample at 90 % of an epoch of 100,000 images."""
    sides: dict[str, Side] = {
        "ours": partial(ours_raw, folder / "resume", 0.9),
        "webdataset": partial(skip_by_iteration, folder / "resume_tars"),
    }
    seconds = {name: [in_fork(seconds_to_first, side) for _ in range(rounds)] for name, side in sides.items()}
    print("\nResume at sample 90,000 of 100,000, to the first raw sample")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.4f} s |")
    medians = [statistics.median(values) for values in seconds.values()]
    print(f"webdataset / ours: {medians[1] / medians[0]:.0f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2048, help=f"a multiple of {BATCH}")
    parser.add_argument("--decoded", type=int, default=512, help="images to decode; likewise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-peers", action="store_true", help="webdataset alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    names = [] if args.skip_peers else found
    for name in names:  # before the forks: importing is not what is measured
        importlib.import_module(PEERS[name])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ["webdataset", *names])
    print(f"{versions}; missing: {', '.join(sorted(set(PEERS) - set(names))) or 'none'}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_fork(prepare, folder, args.images, args.decoded, names)
        ours: dict[str, Side] = {"ours": partial(ours_raw, folder / "raw" / "ours")}
        for name, (side, place) in peers_of(folder / "raw", names).items():
            ours[name] = partial(side, place)
        compare("Raw bytes", ours, args.images, args.rounds)
        place = folder / "decoded" / "ours"
        sides: dict[str, Side] = {"ours, pixels alone": partial(ours_decoded, place)}
        sides["ours, with the response map"] = partial(ours_samples, place)
        for name, (side, place) in peers_of(folder / "decoded", names).items():
            sides[f"{name}, OpenCV"] = partial(decoded, side, place)
            if "our tars" not in name:
                own = webdataset_own if side is webdataset_raw else partial(own_decoded, side)
                sides[f"{name}, own"] = partial(own, place)
        compare("Decoded", sides, args.decoded, args.rounds)
        compare_resume(folder, args.rounds)


if __name__ == "__main__":
    main()

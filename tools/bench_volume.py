"""What the volume encoder can and costs.

    python tools/bench_volume.py                           both of the next two
    python tools/bench_volume.py tasks                     synthetic tasks that need several slices
    python tools/bench_volume.py memory                    peak memory and seconds against `slice_chunk`
    python tools/bench_volume.py real FOLDER [ENCODER ...] a self-made task on the slices of one real volume

FOLDER holds the slices as images whose names end with their numbers, or is a NIfTI file. Neighboring slices
in their order are to be told from the same ones shuffled; stacks of the first two thirds of the volume are
learned from, those of the last third judged.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from volume_tasks import lasting_blobs, write_bead_volumes, write_nifti

from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.volume import compare_heads
from frepa_dist.evaluate.volume_data import (
    LabeledVolumes,
    SliceEncoder,
    SliceImages,
    label_volumes,
    store_maps,
)
from frepa_dist.evaluate.volume_dense import DenseVolume, train_dense
from frepa_dist.evaluate.volume_training import VolumeTraining
from frepa_dist.models.backbones import Backbone
from frepa_dist.models.volume import VolumeEncoder, VolumeSettings
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.read.reader import ShardReader
from shards.read.volumes import Volume, list_volumes

CPU = torch.device("cpu")
SEEDS = range(3)
SALT = "beads and blobs, not secret"  # names, and with them the split, are the same each time


class Stub(nn.Module):
    """A random 2D encoder of one convolution."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, stride, stride=stride), nn.GELU(), nn.GroupNorm(1, width)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] -> maps."""
        return self.layers((images - 0.3) / 0.2)


def bench_tasks() -> None:
    """Beads (classification) and blobs (dense), with attention between slices and without."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        labels = write_bead_volumes(root / "source", 240)
        config = BuildConfig(modality="mri", size=32, min_side=32, labels=labels, jobs=1, salt=SALT)
        build_dataset([root / "source"], root / "shards", config)
        snapshot = load_snapshot(root / "shards")
        volumes = list_volumes(root / "shards", snapshot)
        images = SliceImages(ShardReader(root / "shards", snapshot), volumes, 32, None)
        for seed in SEEDS:
            torch.manual_seed(seed)
            data = label_volumes(volumes, "label", seed, root)
            maps = store_maps(Stub(32, 16), images, volumes, root, CPU, num=64)
            settings = VolumeSettings(num_slices=8, overlap=2, width=64, depth=2)
            training = VolumeTraining(
                epochs=60, batch_size=16, learning_rate=2e-3, weight_decay=0.5, seed=seed
            )
            heads = compare_heads(None, 32, maps, data, settings, training, CPU, num_resamples=200)
            for title, head in zip(("between slices", "2D control"), heads, strict=True):
                print(
                    f"beads  seed {seed}  {title:<15} accuracy {head.accuracy:.3f} "
                    f"[{head.accuracy_low:.3f}, {head.accuracy_high:.3f}] train {head.train_accuracy:.3f}  "
                    f"{head.seconds:.0f} s",
                    flush=True,
                )
    for seed in SEEDS:
        train, test = ([_blobs(1000 * seed + n) for n in range(*part)] for part in ((48,), (500, 524)))
        for between in (True, False):
            torch.manual_seed(seed)
            settings = VolumeSettings(
                num_slices=6, overlap=2, width=32, depth=2, patch=1, slice_chunk=64, between=between
            )
            training = VolumeTraining(epochs=24, learning_rate=2e-3, seed=seed)
            began = time.perf_counter()
            *_, found = train_dense(
                Stub(16, 8), 16, 8, train, test, 2, settings=settings, training=training, head_width=16
            )
            title = "between slices" if between else "2D control"
            print(
                f"blobs  seed {seed}  {title:<15} Dice {found.dice[0]:.3f}  "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )


def _blobs(seed: int) -> DenseVolume:
    volume, mask = lasting_blobs(seed)
    images = torch.from_numpy(volume).float() / 255
    return DenseVolume(images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(mask).long())


def bench_memory(backbone: str) -> None:
    """Each case in a process of its own, since memory that was freed stays with a process."""
    print(f"{backbone} at 224, 16 slices, transformer of the default size, float32, one forward and backward")
    for kind in ("frozen", "trained", "not recomputed"):
        for chunk in (16,) if kind == "not recomputed" else (1, 2, 4, 8, 16):
            arguments = [sys.executable, __file__, "child", backbone, kind, str(chunk)]
            done = subprocess.run(arguments, check=True, capture_output=True, text=True)
            print(f"{kind:<15} slice_chunk {chunk:>2}  {done.stdout.strip()}", flush=True)


def measure_memory(backbone: str, kind: str, chunk: int) -> None:
    """Print what one step takes beyond the weights."""
    torch.manual_seed(0)
    encoder = Backbone(backbone, 224)
    settings = VolumeSettings(slice_chunk=chunk)
    model = VolumeEncoder(encoder, encoder.width, settings, train_encoder=kind != "frozen")
    if kind == "not recomputed":
        model.encode_slices = encoder.forward  # type: ignore[method-assign]
    images = torch.rand(1, 16, 3, 224, 224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    model(images).square().mean().backward()
    seconds = time.perf_counter() - began
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{held / 1024:6.0f} MiB beyond weights and images  {seconds:5.2f} s a volume")


def bench_real(source: Path, encoders: list[str], num: int = 8) -> None:
    """Stacks in order against shuffled ones, judged at the far end of the same volume."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "source").mkdir()
        if source.is_dir():
            write_nifti(root / "source" / "volume.nii", _read_slices(source))
        else:
            (root / "source" / source.name).write_bytes(source.read_bytes())
        config = BuildConfig(modality="mri", size=512, min_side=32, min_std=0.1, jobs=1)
        build_dataset([root / "source"], root / "shards", config)
        snapshot = load_snapshot(root / "shards")
        (volume,) = list_volumes(root / "shards", snapshot)
        orders, data = _make_stacks(len(volume.slices), num)
        print(
            f"{len(volume.slices)} slices; stacks of {num}: {int((~data.is_test).sum())} to learn from, "
            f"{int(data.is_test.sum())} to judge"
        )
        for source_name in encoders:
            encoder = load_encoder(source_name, CPU)
            reader = ShardReader(root / "shards", snapshot)
            images = SliceImages(reader, [volume], encoder.image_size, None)
            began = time.perf_counter()
            maps = store_maps(SliceEncoder(encoder), images, [volume], root, CPU, num=4)
            seconds = time.perf_counter() - began

            def load(number: int, rows: np.ndarray, maps=maps) -> torch.Tensor:
                return maps(0, orders[number][rows.clip(0)])

            for seed in SEEDS:
                training = VolumeTraining(epochs=40, batch_size=16, learning_rate=5e-4, seed=seed)
                # patches of half a side: few images, so few tokens
                patch = maps(0, np.zeros((1, 1), np.int64)).shape[-1] // 2
                settings = VolumeSettings(num_slices=num, overlap=0, width=64, depth=2, patch=patch)
                heads = compare_heads(
                    None, encoder.width, load, data, settings, training, CPU, num_resamples=200
                )
                for title, head in zip(("between slices", "2D control"), heads, strict=True):
                    print(
                        f"{source_name:<22} seed {seed}  {title:<15} accuracy {head.accuracy:.3f}  "
                        f"AUROC {head.auroc:.3f}  train {head.train_accuracy:.3f}  encode {seconds:.1f} s, "
                        f"head {head.seconds:.0f} s",
                        flush=True,
                    )


def _make_stacks(num_slices: int, num: int, each: int = 8) -> tuple[list[np.ndarray], LabeledVolumes]:
    """Stacks of neighboring slices, half of them shuffled; the last third is the test part."""
    cut = num_slices * 2 // 3
    learned = range(cut - num)
    judged = range(cut, num_slices - num + 1)
    orders, y, is_test = [], [], []
    for first in (*learned, *judged):
        for variant in range(2 * each):
            rng = np.random.default_rng([variant, first])
            order = np.arange(num)
            if variant % 2:
                order = rng.permutation(num)
            orders.append(first + order)
            y.append(variant % 2)
            is_test.append(first in judged)
    place = np.arange(num)
    stacks = [
        Volume(str(i), "mri", "stack", None, {}, frozenset(), place, place, place, 0, i)
        for i in range(len(orders))
    ]
    data = LabeledVolumes(
        stacks, ["in order", "shuffled"], np.array(y), np.arange(len(y)), np.array(is_test), "given", 0
    )
    return orders, data


def _read_slices(folder: Path) -> np.ndarray:
    from PIL import Image

    paths = [path for path in folder.iterdir() if re.search(r"\d+$", path.stem)]
    paths.sort(key=lambda path: int(re.search(r"\d+$", path.stem).group()))  # type: ignore[union-attr]
    return np.stack([np.asarray(Image.open(path).convert("L")) for path in paths])


def main() -> None:
    """Run one of the benchmarks."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["all", "tasks", "memory", "real", "child"], default="all")
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    if given.what in ("all", "tasks"):
        bench_tasks()
    if given.what in ("all", "memory"):
        bench_memory(given.arguments[0] if given.arguments else "vit_tiny")
    if given.what == "child":
        backbone, kind, chunk = given.arguments
        measure_memory(backbone, kind, int(chunk))
    if given.what == "real":
        encoders = given.arguments[1:] or ["random:convnext_twin", "random:vit_pico"]
        bench_real(Path(given.arguments[0]), encoders)


if __name__ == "__main__":
    main()

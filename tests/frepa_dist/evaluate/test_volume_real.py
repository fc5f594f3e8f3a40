"""Real volumes, from files through shards and the volume encoder: OCT of an eye, MRI that nibabel ships."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from frepa_dist.models.backbones import Backbone
from frepa_dist.models.volume import VolumeEncoder, VolumeSettings
from frepa_dist.models.volume_slots import cut_slots, merge_slots
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.read.reader import ShardReader
from shards.read.volumes import list_volumes, read_volume
from shards.read.windows import to_unit_range
from tools.volume_tasks import write_nifti


def rebuild(source: Path, root: Path, **options: object):
    build_dataset([source], root, BuildConfig(jobs=1, shard_bytes=1, **options))
    snapshot = load_snapshot(root)
    (volume,) = list_volumes(root, snapshot)
    return volume, ShardReader(root, snapshot)


def encode(pixels: np.ndarray, window: tuple[float, float], slices: np.ndarray) -> tuple:
    """What the 2D encoder and, awake, the volume encoder make of a volume."""
    torch.manual_seed(0)
    settings = VolumeSettings(width=32, depth=2, num_heads=2)
    encoder = Backbone("vit_pico", 64)
    model = VolumeEncoder(encoder, encoder.width, settings).eval()
    images = to_unit_range(torch.from_numpy(pixels)[:, None], torch.tensor([window] * len(pixels)))
    slots = cut_slots(slices, settings.num_slices, settings.overlap)
    windows, mask = images[torch.from_numpy(slots.rows)], torch.from_numpy(slots.rows >= 0)
    with torch.no_grad():
        plain = torch.cat([encoder(part) for part in images.split(8)])
        asleep = merge_slots(model(windows, mask), slots)
        torch.nn.init.normal_(model.mixer.project.weight, std=0.1)
        return plain, asleep, merge_slots(model(windows, mask), slots)


@pytest.mark.real_data
def test_an_oct_volume(tmp_path):
    folder = os.environ.get("FREPA_TEST_DATA")
    if not folder:
        pytest.skip("FREPA_TEST_DATA does not name a folder of real images")
    files = (Path(folder) / "oct" / "duke_dme_subject01" / "images").glob("*.jpg")
    ordered = sorted(files, key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    if not ordered:
        pytest.skip("no oct/duke_dme_subject01 in FREPA_TEST_DATA")
    eye = np.stack([np.asarray(Image.open(path)) for path in ordered])
    (tmp_path / "source").mkdir()
    write_nifti(tmp_path / "source" / "eye.nii", eye)
    volume, reader = rebuild(tmp_path / "source", tmp_path / "root", modality="oct", size=512)
    assert volume.slices.tolist() == list(range(len(eye)))
    np.testing.assert_array_equal(read_volume(reader, volume).pixels, eye)
    plain, asleep, awake = encode(*read_volume(reader, volume, size=64))
    assert plain.shape == (61, 64, 4, 4)
    torch.testing.assert_close(asleep, plain, rtol=1e-4, atol=1e-5)
    assert awake.isfinite().all()
    assert (awake - plain).abs().max() > 1e-3


def test_an_mri_volume_that_nibabel_ships(tmp_path):
    path = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    if not path.is_file():
        pytest.skip("this nibabel comes without its test data")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    volume, reader = rebuild(
        tmp_path / "source", tmp_path / "root", modality="mri", size=64, min_side=32, min_std=0.5
    )
    found = read_volume(reader, volume)
    original = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    assert len(found.slices) == original.shape[2] - volume.num_missing
    shown = original[::-1, ::-1].T  # slices, rows, columns: from front to back, from right to left
    num = len(found.slices)
    alike = np.corrcoef(found.pixels.reshape(num, -1), shown.reshape(len(shown), -1))[:num, num:]
    assert alike.argmax(axis=1).tolist() == found.slices.tolist()  # values are windowed, so not equal
    assert alike.max(axis=1).min() > 0.9
    plain, asleep, _ = encode(*read_volume(reader, volume, size=64))
    torch.testing.assert_close(asleep, plain, rtol=1e-4, atol=1e-5)

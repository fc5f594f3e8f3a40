"""Labeled volumes, what a head is given of them, its training and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from cluster.volume_cli import WINDOWS, evaluate_volume
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.volume import accuracy, compare_heads
from frepa_dist.evaluate.volume_data import SliceEncoder, SliceImages, label_volumes, store_maps
from frepa_dist.evaluate.volume_result import HeadResult, VolumeResult
from frepa_dist.evaluate.volume_training import VolumeTraining
from frepa_dist.models.volume import VolumeSettings
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.read.reader import ShardReader
from shards.read.volumes import Volume, list_volumes, read_volume
from shards.read.windows import CT_WINDOWS, to_unit_range
from shards.support.errors import ConfigError, DataError, DivergedError, EnvironmentFault
from tools.volume_tasks import moving_bead, write_bead_volumes, write_labels, write_nifti

CPU = torch.device("cpu")
TINY = VolumeSettings(num_slices=4, overlap=1, width=16, depth=2, num_heads=2, slice_chunk=3)
SHORT = VolumeTraining(epochs=2, batch_size=4)


class Stub(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, images):
        return self.module(images)


@pytest.fixture(scope="module")
def bead_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beads")
    labels = write_bead_volumes(folder / "source", 16)
    config = BuildConfig(modality="mri", size=32, min_side=32, labels=labels, jobs=1)
    build_dataset([folder / "source"], folder / "root", config)
    return folder / "root"


def opened(root):
    snapshot = load_snapshot(root)
    volumes = list_volumes(root, snapshot)
    return volumes, SliceImages(ShardReader(root, snapshot), volumes, 32, None)


def volume(number, group=None, varying=(), **labels):
    slices = np.arange(3)
    return Volume(
        f"v{number}", "mri", "s", None, labels, frozenset(varying), slices, slices, slices, 0,
        number if group is None else group,
    )  # fmt: skip


def test_a_split_that_is_made_parts_no_group_and_has_all_classes_on_both_sides():
    volumes = [volume(n, group=n // 2, label="ab"[n // 2 % 2]) for n in range(24)]
    found = label_volumes(volumes, "label", 0, "here")
    assert (found.split, found.classes, found.num_left_out) == ("made", ["a", "b"], 0)
    assert not set(found.groups[found.is_test]) & set(found.groups[~found.is_test])
    assert set(found.y[found.is_test]) == set(found.y[~found.is_test]) == {0, 1}
    again = label_volumes(volumes, "label", 1, "here")
    assert (again.is_test != found.is_test).any()


def test_a_split_that_is_given_is_kept():
    splits = ["train", "train", "val", "testing"] * 2
    volumes = [volume(n, label="ab"[n // 4], split=split) for n, split in enumerate(splits)]
    found = label_volumes([*volumes, volume(9, split="train")], "label", 0, "here")
    assert (found.split, found.num_left_out) == ("given", 1)
    assert found.is_test.tolist() == [False, False, False, True] * 2


@pytest.mark.parametrize(
    ("volumes", "error", "words"),
    [
        (
            [volume(0, varying=["label"])],
            DataError,
            "'label' differs among the slices of 1 volumes, such as v0",
        ),
        ([volume(0, grade="1")], ConfigError, "none of 1 volumes has a label 'label'; allowed: grade"),
        ([volume(n, label="a") for n in range(9)], DataError, "too few volumes of a class: a 9"),
        ([volume(0, label="a"), volume(1, label="b")], DataError, "too few volumes of a class: a 1, b 1"),
        (
            [volume(n, label="ab"[n % 2], split="x") for n in range(4)],
            ConfigError,
            "unknown split 'x'.*allowed",
        ),
        (
            [volume(0, label="a"), *(volume(n, label="ab"[n % 2], split="train") for n in range(1, 9))],
            ConfigError,
            "1 of 9 volumes are in no part of the split that is given.*such as v0",
        ),
        (
            [volume(n, label="ab"[n % 2], varying=["split"]) for n in range(9)],
            ConfigError,
            "9 of 9 volumes are in no part of the split that is given, or in several",
        ),
        (
            [volume(n, 7, label="ab"[n // 4], split=s) for n, s in enumerate(["train", "test"] * 4)],
            DataError,
            "volumes of one patient, or volumes that share slices, on both sides",
        ),
    ],
)
def test_labels_that_cannot_be_used(volumes, error, words):
    with pytest.raises(error, match=words) as caught:
        label_volumes(volumes, "label", 0, "here")
    assert "here" in str(caught.value)


def test_images_are_the_slices_in_the_one_conversion_and_zeros_where_none_is(bead_root):
    volumes, images = opened(bead_root)
    reader = ShardReader(bead_root, load_snapshot(bead_root))
    pixels, window, _ = read_volume(reader, volumes[3], size=32)
    expected = to_unit_range(torch.from_numpy(pixels)[:, None], torch.tensor([window] * len(pixels)))
    rows = np.array([[5, -1, 0], [7, 5, 5]])
    found = images(3, rows)
    assert found.shape == (2, 3, 3, 32, 32)
    assert not found[0, 1].any()
    for place in np.argwhere(rows >= 0):
        assert torch.equal(found[tuple(place)], expected[rows[tuple(place)]])


def test_stored_maps_are_those_of_the_encoder(bead_root, tmp_path):
    volumes, images = opened(bead_root)
    stub = Stub()
    maps = store_maps(stub, images, volumes, tmp_path, CPU, num=3)
    rows = np.array([[7, 0, -1, 3]])
    for number in (0, 9, 15):
        expected = stub(images(number, rows)[0]).detach()
        found = maps(number, rows)[0]
        torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-3, atol=1e-3)
        assert found.isfinite().all()


def test_maps_that_cannot_be_stored(bead_root, tmp_path, monkeypatch):
    volumes, images = opened(bead_root)
    with pytest.raises(DataError, match="holds NaN, infinity or values beyond"):
        store_maps(lambda x: Stub()(x) * 1e9, images, volumes, tmp_path, CPU, num=3)
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentFault, match=r"GiB are free.*--cache"):
        store_maps(Stub(), images, volumes, tmp_path, CPU, num=3)


def without_times(result):
    return result.model_dump(exclude={"seconds", "seconds_per_volume"})


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_same_seed_gives_the_same_result_and_both_heads_start_from_the_same_encoder(
    bead_root, tmp_path, train_encoder
):
    volumes, images = opened(bead_root)
    data = label_volumes(volumes, "label", 0, bead_root)
    stub = Stub()
    before = {name: value.clone() for name, value in stub.state_dict().items()}
    load = images if train_encoder else store_maps(stub, images, volumes, tmp_path, CPU, num=8)
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        stub.load_state_dict(before)
        encoder = stub if train_encoder else None
        training = SHORT.model_copy(update={"seed": seed})
        runs.append(compare_heads(encoder, 8, load, data, TINY, training, CPU, num_resamples=20))
    assert [without_times(head) for head in runs[0]] == [without_times(head) for head in runs[1]]
    assert runs[0][0].auroc != runs[2][0].auroc or runs[0][1].auroc != runs[2][1].auroc
    assert torch.equal(torch.get_rng_state(), state)
    changed = any(not torch.equal(value, before[name]) for name, value in stub.state_dict().items())
    assert changed == train_encoder


def test_a_loss_that_is_no_number_ends_the_training(bead_root):
    volumes, _ = opened(bead_root)
    data = label_volumes(volumes, "label", 0, bead_root)
    load = lambda number, rows: torch.full((*rows.shape, 8, 2, 2), float("inf"))  # noqa: E731
    with pytest.raises(DivergedError, match="lower the learning rate"):
        compare_heads(None, 8, load, data, TINY, SHORT, CPU)


@pytest.mark.parametrize(
    "name", ["random:vit_pico", "random:swin_pico", "random:convnext_twin", "timm:test_vit"]
)
def test_encoders_of_every_kind_give_maps(name):
    encoder = load_encoder(name, "cpu")
    found = SliceEncoder(encoder)(torch.rand(1, 3, encoder.image_size, encoder.image_size))
    assert found.shape[:2] == (1, encoder.width)
    assert found.ndim == 4


def test_an_encoder_without_maps_is_refused():
    encoder = load_encoder("random:vit_pico", "cpu")
    object.__setattr__(encoder, "map", None)
    with pytest.raises(ConfigError, match="gives no map"):
        SliceEncoder(encoder)


def test_accuracy_counts_the_likeliest_class():
    scores = np.array([[0.1, 0.9], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    assert accuracy(scores, np.array([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize("options", [(), ("--train-encoder",)])
def test_the_command(tmp_path, options):
    source = tmp_path / "source"
    source.mkdir()
    rows = []
    for number in range(8):
        slices = moving_bead(number, to_the_right=number % 2 == 0, num=6)
        write_nifti(source / f"{number}.nii", slices.astype(np.int16) * 8 - 1000)
        rows.append(
            {"filename": f"{number}.nii", "way": "rl"[number % 2], "patient": f"p{number // 2}x{number % 2}"}
        )
    labels = write_labels(source, rows)
    config = BuildConfig(modality="ct", size=32, min_side=32, labels=labels, label_columns=("way",), jobs=1)
    build_dataset([source], tmp_path / "root", config)
    out = tmp_path / "results" / "volume.json"
    small = [f"--head={item}" for item in ("width=16", "depth=2", "num_heads=2", "num_slices=4", "overlap=2")]
    arguments = ["random:vit_pico", str(tmp_path / "root"), "--label-column", "way", "--window", "full"]
    arguments += [*small, "--train", "epochs=1", "--out", str(out), "--smoke-test", *options]
    ran = CliRunner().invoke(evaluate_volume, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    for words in ("with other slices", "each slice alone (2D)", "l 3 + 1, r 3 + 1", "smoke test"):
        assert words in ran.output
    result = VolumeResult.model_validate_json(out.read_text())
    assert result.train_encoder == bool(options)
    assert (result.encode_seconds_per_volume is None) == bool(options)
    assert result.num_slices == (6, 6.0, 6)
    assert result.settings.width == 16
    assert isinstance(result.volume, HeadResult)
    assert json.loads(out.read_text())["snapshot"] == load_snapshot(tmp_path / "root").hash
    assert list(tmp_path.glob("frepa-volume-*")) == []


def test_the_command_refuses_unknown_settings_and_datasets_without_volumes(tmp_path, small_dataset):
    with pytest.raises(ConfigError, match="unknown key 'deep'"):
        CliRunner().invoke(evaluate_volume, ["x", "y", "--head", "deep=1"], catch_exceptions=False)
    with pytest.raises(DataError, match="holds no volumes"):
        CliRunner().invoke(evaluate_volume, ["random:vit_pico", str(small_dataset)], catch_exceptions=False)


def test_windows_of_the_command_are_all_there_are():
    assert tuple(CT_WINDOWS) == WINDOWS
